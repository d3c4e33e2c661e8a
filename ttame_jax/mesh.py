"""Data parallelism: one mesh over all devices, batches split over it, the rest on each of them."""

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "data"


def data_mesh() -> Mesh:
    """One axis over every device of every process."""
    return Mesh(np.array(jax.devices()), (AXIS,))


def check_batch_size(batch_size: int) -> None:
    """Raises ValueError if a global batch does not divide over the devices of all processes."""
    devices, processes = jax.device_count(), jax.process_count()
    if batch_size % devices:
        where = f" of {processes} processes" if processes > 1 else ""
        raise ValueError(f"--batch-size {batch_size} does not divide over {devices} devices{where}")


def replicate(tree, mesh: Mesh):
    """The same arrays on every device; every process gives all of them."""
    sharding = NamedSharding(mesh, P())
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def put(array):  # through the host: a process cannot write to another's devices
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            return array  # there already
        return jax.make_array_from_process_local_data(sharding, np.asarray(array))

    return jax.tree.map(put, tree)


def shard_batch(batch: np.ndarray, mesh: Mesh) -> jax.Array:
    """This process's part ``[b, ...]`` of a global batch, spread over its devices."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, P(AXIS)), batch)


def gather(tree):
    """Global arrays, whole, on the host of every process."""
    return multihost_utils.process_allgather(tree, tiled=True)

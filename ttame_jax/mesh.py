"""Data parallelism: one mesh over all devices, with sharded batches and replicated parameters."""

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "data"


def data_mesh() -> Mesh:
    """A mesh with one axis over all devices of all processes."""
    return Mesh(np.array(jax.devices()), (AXIS,))


def check_batch_size(batch_size: int) -> None:
    """Raises ValueError if a global batch does not divide over the devices of all processes."""
    devices, processes = jax.device_count(), jax.process_count()
    if batch_size % devices:
        where = f" of {processes} processes" if processes > 1 else ""
        raise ValueError(f"--batch-size {batch_size} does not divide over {devices} devices{where}")


def replicate(tree, mesh: Mesh):
    """Replicates arrays on every device. Every process passes the same arrays."""
    sharding = NamedSharding(mesh, P())
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def put(array):  # from the host: a process cannot write to the devices of another
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            return array  # already replicated
        return jax.make_array_from_process_local_data(sharding, np.asarray(array))

    return jax.tree.map(put, tree)


def shard_batch(batch: np.ndarray, mesh: Mesh) -> jax.Array:
    """Shards a global batch, of which each process passes its part ``[b, ...]``."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, P(AXIS)), batch)


def gather(tree):
    """Global arrays as complete NumPy arrays on the host of every process."""
    return multihost_utils.process_allgather(tree, tiled=True)

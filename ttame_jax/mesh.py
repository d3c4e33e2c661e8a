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


def replicate(tree, mesh: Mesh):
    """The same arrays on every device."""
    return jax.device_put(tree, NamedSharding(mesh, P()))


def shard_batch(batch: np.ndarray, mesh: Mesh) -> jax.Array:
    """This process's part ``[b, ...]`` of a global batch, spread over its devices."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, P(AXIS)), batch)


def gather(tree):
    """Global arrays, whole, on the host of every process."""
    return multihost_utils.process_allgather(tree, tiled=True)

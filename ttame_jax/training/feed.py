"""Copies batches to the devices ahead of time."""

import time
from concurrent.futures import ThreadPoolExecutor

import jax
from jax.sharding import Mesh

from ttame_jax.data.loader import Batches
from ttame_jax.mesh import shard_batch


class Feed:
    """Batches of images on the devices, loaded while the previous step runs. A context manager.

    Args:
      batches: this process's part of each global batch, without end.
      mesh: the mesh over which the images are sharded.

    Attributes:
      waited: total seconds during which no step ran because the next batch was not ready.
      state: the state of `batches` after the last batch taken.
    """

    def __init__(self, batches: Batches, mesh: Mesh):
        self.waited = 0.0
        self.state = batches.get_state()
        self._batches, self._mesh = batches, mesh
        self._running = None
        self._pool = ThreadPoolExecutor(1)  # one thread: batches are loaded in order, one ahead
        self._next = self._pool.submit(self._load)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._pool.shutdown()

    def take(self, running) -> jax.Array:
        """Returns the next images, uint8 ``[B, S, S, 3]``.

        Args:
          running: outputs of the previous step, or None. That step may still run when this method
            returns, but not the one before it, so at most one step is queued on the devices.
        """
        jax.block_until_ready(self._running)
        self._running = running
        if not self._next.done():
            jax.block_until_ready(running)
        start = time.perf_counter()
        images, self.state = self._next.result()
        self.waited += time.perf_counter() - start
        self._next = self._pool.submit(self._load)
        return images

    def _load(self) -> tuple[jax.Array, dict[str, int]]:
        images = shard_batch(next(self._batches)["image"], self._mesh)
        return images, self._batches.get_state()

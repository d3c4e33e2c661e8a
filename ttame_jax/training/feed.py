"""Batches on their way to the devices."""

import time
from concurrent.futures import ThreadPoolExecutor

import jax
from jax.sharding import Mesh

from ttame_jax.data import Batches
from ttame_jax.mesh import shard_batch


class Feed:
    """Images on the devices, read and copied there while the step before runs; a context manager.

    Attributes:
      waited: seconds in all for which no step ran for want of a batch.
      state: that of the batches after the one taken last.

    Args:
      batches: endless; this process's part of each global batch.
      mesh: over which the images are spread.
    """

    def __init__(self, batches: Batches, mesh: Mesh):
        self.waited = 0.0
        self.state = batches.get_state()
        self._batches, self._mesh = batches, mesh
        self._running = None
        self._pool = ThreadPoolExecutor(1)  # a batch is made in order, and one ahead
        self._next = self._pool.submit(self._load)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._pool.shutdown()

    def take(self, running) -> jax.Array:
        """The next images, uint8 ``[B, S, S, 3]``.

        Args:
          running: arrays that the step before gives, or None. It may still run when this returns,
            but not the one before it: no more than one step waits its turn on the devices.
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

"""Batches of images for training through Grain: endless and shuffled.

Neither this module nor its worker processes touch JAX's devices.
"""

import atexit
import functools
import weakref

import grain
import numpy as np

from ttame_jax.data.elements import ENOUGH_SEEN, Element, Unreadable, element
from ttame_jax.data.sources import Source
from ttame_jax.data.transforms import training_image
from ttame_jax.data.workers import Prefetched, bounded, end_if_waiting, prefetched
from ttame_jax.errors import Damaged
from ttame_jax.preprocessing import Preprocessing

_open_batches = weakref.WeakSet()


@atexit.register  # Grain's own clean-up prints errors when the interpreter shuts down
def _close_all():
    for batches in list(_open_batches):
        batches.close()
    end_if_waiting()


def train_batches(
    source: Source,
    preprocessing: Preprocessing,
    batch_size: int,
    *,
    seed: int,
    flip: bool = True,
    workers: int = 2,
    process_index: int = 0,
    process_count: int = 1,
) -> "Batches":
    """Returns endless shuffled batches of random crops: this process's part of each global batch.

    A global batch has `batch_size` images per process, and each process reads only its own images.
    Each epoch has a different order and different crops. Both depend only on `seed`, not on the
    number of workers, nor on the number of processes if the global batch size is the same. Batches
    continue across epochs, so that all are full. All images are `valid`: the next readable image
    of the source replaces an unreadable one.

    Args:
      source: the images.
      preprocessing: the backbone's.
      batch_size: images per batch of this process.
      seed: any non-negative int.
      flip: whether to mirror half of the images.
      workers: number of processes that prepare batches; 0 uses threads of this process. Workers
        are spawned, so a script must guard its entry point with `if __name__ == "__main__":`.
      process_index: `jax.process_index()`.
      process_count: `jax.process_count()`.
    """
    # Grain seeds an epoch with seed + epoch: without mixing, adjacent seeds would share epochs.
    seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    load = functools.partial(_load_for_training, source, preprocessing, flip)
    dataset = grain.MapDataset.source(range(len(source))).seed(seed).shuffle().repeat(None)
    dataset = dataset.random_map(load).batch(batch_size, drop_remainder=True)
    # Processes take the batches in turn as their parts of the global batches.
    dataset = dataset[process_index::process_count]
    size = batch_size * 3 * preprocessing.image_size**2
    return Batches(dataset, source, workers, images=len(source), size=size)


class Batches(grain.DatasetIterator):
    """Iterator over a data set of batches, whose state is the number of batches taken.

    A state can be restored with any number of workers. Too many unreadable images are an error, see
    `Unreadable`. Closing or deleting the iterator stops its workers.
    """

    def __init__(
        self, dataset: grain.MapDataset, source: Source, workers: int, images: int, size: int
    ):
        super().__init__()
        self._dataset = dataset
        self._workers = bounded(workers)
        self._size = size  # of a batch, in bytes
        self._taken = 0
        self._closed = False
        self._ahead = None  # Grain's iterator, which prefetches batches from `_taken` on
        self._unreadable = Unreadable(source, images)
        _open_batches.add(self)

    def __len__(self) -> int:
        """Returns the total number of batches, sys.maxsize."""
        return len(self._dataset)

    def __next__(self) -> dict[str, np.ndarray]:
        if self._closed:
            raise ValueError("these batches are closed")
        batch = next(self._prefetching())
        self._taken += 1
        try:
            self._unreadable.check(batch["index"], batch.pop("unreadable"))
        except Damaged:
            self.close()
            raise
        return {name: np.array(value) for name, value in batch.items()}  # copied from shared memory

    def get_state(self) -> dict[str, int]:
        return {"batches": self._taken}

    def set_state(self, state: dict[str, int]):
        self._stop()
        self._taken = state["batches"]

    def start_prefetch(self):
        self._prefetching()

    def _prefetching(self) -> Prefetched:
        if self._ahead is None:
            self._ahead = prefetched(self._dataset[self._taken :], self._workers, self._size)
        return self._ahead

    def close(self):
        self._closed = True
        self._stop()

    def _stop(self):
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None


def _load_for_training(
    source: Source, preprocessing: Preprocessing, flip: bool, index: int, rng: np.random.Generator
) -> Element:
    unreadable = -1
    # After more consecutive failures than are tolerated in total, give up.
    for candidate in range(index, index + min(len(source), ENOUGH_SEEN)):
        candidate %= len(source)
        try:
            record = source[candidate]
            image = training_image(record["image"], preprocessing, rng, flip, source.max_pixels)
        except OSError:
            unreadable = index
        else:
            return element(image, record["label"], candidate, unreadable)
    raise Damaged(f"images {index} to {candidate} of {source} are all unreadable")

"""Batches of images through Grain: shuffled without end for training, once in order to evaluate.

A batch is a dict of numpy arrays:
  image: uint8 [b, S, S, 3]
  label: int32 [b], -1 where unknown
  index: int32 [b], the image's index in the source, -1 for padding
  valid: bool [b], False for padding and for unreadable images

Nothing in here, nor in the worker processes, touches JAX's devices.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import threading
import warnings
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import grain
import numpy as np
from absl import flags

from ttame_jax.data.sources import Source
from ttame_jax.data.transforms import evaluation_image, training_image

if TYPE_CHECKING:
    from ttame_jax.backbones import Preprocessing

_PREFETCH = 2  # batches made ahead, by each worker process or in-process by threads
_MAX_UNREADABLE = 0.01  # share of the images seen
_ENOUGH_SEEN = 1000  # images before that share is judged

_open_batches = weakref.WeakSet()


@atexit.register  # Grain's own clean-up fails noisily once the interpreter is being taken down
def _close_all():
    for batches in list(_open_batches):
        batches.close()


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
) -> Batches:
    """Returns endless shuffled batches of random crops: this process's part of each global batch.

    A global batch has `batch_size` images for every process, and each process reads only its own.
    Each epoch has an order of its own, and each image of each epoch a random crop of its own. Both
    follow from `seed` alone: neither the number of workers nor, with global batches of one size,
    that of processes changes anything. Batches run across the ends of epochs, so all are full and
    all `valid`: the next readable image of the source takes the place of an unreadable one.

    Args:
      source: the images.
      preprocessing: that of the backbone.
      batch_size: images per batch of this process.
      seed: any non-negative int.
      flip: whether to mirror half of the images.
      workers: processes that make batches ahead; 0 makes them in threads of this process. As
        workers are spawned, a script needs `if __name__ == "__main__":` around its start.
      process_index: as `jax.process_index()`.
      process_count: as `jax.process_count()`.
    """
    # Grain seeds an epoch with seed + epoch: unmixed, neighbouring seeds would share epochs.
    seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    load = functools.partial(_load_for_training, source, preprocessing, flip)
    dataset = grain.MapDataset.source(range(len(source))).seed(seed).shuffle().repeat(None)
    dataset = dataset.random_map(load).batch(batch_size, drop_remainder=True)
    # As parts of global batches, in turn; parts of other processes are never read.
    dataset = dataset[process_index::process_count]
    return Batches(dataset, source, workers, images=-(-len(source) // process_count))


def evaluation_batches(
    source: Source,
    preprocessing: Preprocessing,
    batch_size: int,
    *,
    indices: Sequence[int] | None = None,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Returns batches of centre crops: each image once and in order, padded at the end.

    Args:
      source: the images.
      preprocessing: that of the backbone.
      batch_size: images per batch of this process.
      indices: the images to read, all by default.
      workers: as in `train_batches`.
      process_index: of the batches of all processes in a row, this process gets every
        `process_count`-th from here on. All get equally many.
      process_count: as `jax.process_count()`.
    """
    indices = np.arange(len(source)) if indices is None else np.asarray(indices, np.int64)
    padded = np.pad(indices, (0, -len(indices) % (batch_size * process_count)), constant_values=-1)
    shard = padded.reshape(-1, process_count, batch_size)[:, process_index].ravel()
    load = functools.partial(_load_for_evaluation, source, preprocessing)
    dataset = grain.MapDataset.source(shard).map(load).batch(batch_size)
    return Batches(dataset, source, workers, images=int((shard >= 0).sum()))


class Batches(grain.DatasetIterator):
    """Iterator over a data set of batches, whose state is the number of batches taken.

    The state can be restored under any number of workers. Warns once of each unreadable image, by
    name, and raises ValueError where they are more than 1 % of the images seen, judged from 1000
    images on, or at the end of a smaller set. `close`, or dropping the iterator, ends its workers.
    """

    def __init__(self, dataset: grain.MapDataset, source: Source, workers: int, images: int):
        super().__init__()
        self._dataset = dataset
        self._source = source
        self._workers = workers
        self._images = images  # of this process, in an epoch
        self._taken = 0
        self._closed = False
        self._ahead = None  # Grain's iterator, which makes batches ahead from `_taken` on
        self._seen = 0
        self._unreadable = set()
        _open_batches.add(self)

    def __len__(self) -> int:
        """Returns the number of batches in all; training has no end (sys.maxsize)."""
        return len(self._dataset)

    def __next__(self) -> dict[str, np.ndarray]:
        if self._closed:
            raise ValueError("these batches are closed")
        self.start_prefetch()
        batch = next(self._ahead)
        self._taken += 1
        self._check(batch["index"], batch.pop("unreadable"))
        return {name: np.array(value) for name, value in batch.items()}  # off shared memory

    def get_state(self) -> dict[str, int]:
        return {"batches": self._taken}

    def set_state(self, state: dict[str, int]):
        self._stop()
        self._taken = state["batches"]

    def start_prefetch(self):
        if self._ahead is None:
            self._ahead = _iterate(self._dataset[self._taken :], self._workers)
            self._ahead.start_prefetch()

    def close(self):
        self._closed = True
        self._stop()

    def _stop(self):
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _check(self, index: np.ndarray, unreadable: np.ndarray):
        for image in set(unreadable[unreadable >= 0].tolist()) - self._unreadable:
            self._unreadable.add(image)
            warnings.warn(f"skipping an unreadable image: {self._source.name(image)}", stacklevel=3)
        self._seen = min(self._seen + np.count_nonzero(index >= 0), self._images)
        judged = self._seen >= min(self._images, _ENOUGH_SEEN)
        if judged and len(self._unreadable) > _MAX_UNREADABLE * self._seen:
            self.close()
            raise ValueError(
                f"{len(self._unreadable)} of {self._seen} images of {self._source} are unreadable "
                "(the warnings name them): repair or remove them"
            )


def _iterate(dataset: grain.MapDataset, workers: int) -> grain.DatasetIterator:
    if not flags.FLAGS.is_parsed():  # grain 0.2.18 reads a flag for workers, parsed or not (#1355)
        flags.FLAGS.mark_as_parsed()
    threads = 1 if workers else _PREFETCH
    batches = dataset.to_iter_dataset(grain.ReadOptions(threads, prefetch_buffer_size=_PREFETCH))
    # Only images are worth a block of shared memory of their own.
    options = grain.experimental.DatasetOptions(min_shm_size=2**16)
    batches = grain.experimental.WithOptionsIterDataset(batches, options)
    return iter(
        batches.mp_prefetch(
            grain.MultiprocessingOptions(workers, per_worker_buffer_size=_PREFETCH),
            worker_init_fn=_end_with_parent,
        )
    )


def _end_with_parent(worker_index: int, worker_count: int):
    """Ends this worker when its parent dies, even by SIGKILL: Grain's would wait for ever."""

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _load_for_training(
    source: Source, preprocessing: Preprocessing, flip: bool, index: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    unreadable = -1
    # More failures in a row than may be tolerated in all: give up, and be judged at once.
    for candidate in range(index, index + min(len(source), _ENOUGH_SEEN)):
        candidate %= len(source)
        try:
            record = source[candidate]
            image = training_image(record["image"], preprocessing, rng, flip)
        except OSError:
            unreadable = index
        else:
            return _element(image, record["label"], candidate, unreadable)
    raise ValueError(f"images {index} to {candidate} of {source} are all unreadable")


def _load_for_evaluation(
    source: Source, preprocessing: Preprocessing, index: int
) -> dict[str, np.ndarray]:
    unreadable = -1
    if index >= 0:
        try:
            record = source[index]
            image = evaluation_image(record["image"], preprocessing)
            return _element(image, record["label"], index)
        except OSError:
            unreadable = index
    size = preprocessing.image_size
    return _element(np.zeros((size, size, 3), np.uint8), -1, index, unreadable, valid=False)


def _element(
    image: np.ndarray, label: int, index: int, unreadable: int = -1, valid: bool = True
) -> dict[str, np.ndarray]:
    """`unreadable` is the index of the image that failed, whose place this one takes, or -1."""
    return {
        "image": image,
        "label": np.int32(label),
        "index": np.int32(index),
        "valid": np.bool_(valid),
        "unreadable": np.int32(unreadable),
    }

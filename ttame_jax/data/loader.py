"""Batches of images through Grain: endless and shuffled for training, in order for evaluation.

A batch is a dict of NumPy arrays:
  image: uint8 [b, S, S, 3]
  label: int32 [b], -1 if unknown
  index: int32 [b], the image's index in the source, -1 for padding
  valid: bool [b], False for padding and for unreadable images

Neither this module nor its worker processes touch JAX's devices.
"""

import atexit
import functools
import warnings
import weakref
from collections.abc import Sequence

import grain
import numpy as np

from ttame_jax.data.sources import Source
from ttame_jax.data.transforms import centre_crop, decode, inside_boxes, training_image
from ttame_jax.data.workers import Prefetched, bounded, end_if_waiting, prefetched
from ttame_jax.errors import Damaged
from ttame_jax.preprocessing import Preprocessing

_MAX_UNREADABLE = 0.01  # share of the images seen
_ENOUGH_SEEN = 1000  # images, before that share is checked

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
    return Batches(dataset, source, workers, images=-(-len(source) // process_count), size=size)


def evaluation_batches(
    source: Source,
    preprocessing: Preprocessing,
    batch_size: int,
    *,
    indices: Sequence[int] | np.ndarray | None = None,
    boxes: bool = False,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> "Batches":
    """Returns batches of centre crops: each image once and in order, padded at the end.

    With `boxes`, a batch has another array, `inside`: bool [b, S, S], whether a pixel's centre
    lies in any box of the image. It is all False for images without boxes, images whose boxes are
    outside the crop, and padding.

    Args:
      source: the images.
      preprocessing: the backbone's.
      batch_size: images per batch of this process.
      indices: the images to read; all by default.
      boxes: whether to add `inside`; the source must have boxes.
      workers: as in `train_batches`.
      process_index: `jax.process_index()`. Of all batches, the process takes every
        `process_count`-th, starting with this one. All processes take equally many.
      process_count: `jax.process_count()`.

    Raises:
      ValueError: `boxes` is True and the source has no boxes.
    """
    if boxes and not source.has_boxes:
        raise ValueError(f"{source} has no boxes")
    chosen = np.arange(len(source)) if indices is None else np.asarray(indices, np.int64)
    padded = np.pad(chosen, (0, -len(chosen) % (batch_size * process_count)), constant_values=-1)
    shard = padded.reshape(-1, process_count, batch_size)[:, process_index].ravel()
    load = functools.partial(_load_for_evaluation, source, preprocessing, boxes)
    # pyrefly: ignore[bad-argument-type]  # an array is a sequence
    dataset = grain.MapDataset.source(shard).map(load).batch(batch_size)
    size = batch_size * 3 * preprocessing.image_size**2
    return Batches(dataset, source, workers, images=int((shard >= 0).sum()), size=size)


class Batches(grain.DatasetIterator):
    """Iterator over a data set of batches, whose state is the number of batches taken.

    A state can be restored with any number of workers. Each unreadable image causes one warning
    with its name. More than 1 % of unreadable images among those seen is `Damaged`, checked
    after 1000 images or at the end of a smaller data set. Closing or deleting the iterator stops
    its workers.
    """

    def __init__(
        self, dataset: grain.MapDataset, source: Source, workers: int, images: int, size: int
    ):
        super().__init__()
        self._dataset = dataset
        self._source = source
        self._workers = bounded(workers)
        self._size = size  # of a batch, in bytes
        self._images = images  # of this process, in an epoch
        self._taken = 0
        self._closed = False
        self._ahead = None  # Grain's iterator, which prefetches batches from `_taken` on
        self._seen = 0
        self._unreadable = set()
        _open_batches.add(self)

    def __len__(self) -> int:
        """Returns the total number of batches, sys.maxsize for training."""
        return len(self._dataset)

    def __next__(self) -> dict[str, np.ndarray]:
        if self._closed:
            raise ValueError("these batches are closed")
        batch = next(self._prefetching())
        self._taken += 1
        self._check(batch["index"], batch.pop("unreadable"))
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

    def _check(self, index: np.ndarray, unreadable: np.ndarray):
        for image in set(unreadable[unreadable >= 0].tolist()) - self._unreadable:
            self._unreadable.add(image)
            warnings.warn(f"skipping an unreadable image: {self._source.name(image)}", stacklevel=3)
        self._seen = min(self._seen + int(np.count_nonzero(index >= 0)), self._images)
        judged = self._seen >= min(self._images, _ENOUGH_SEEN)
        if judged and len(self._unreadable) > _MAX_UNREADABLE * self._seen:
            self.close()
            raise Damaged(
                f"{len(self._unreadable)} of {self._seen} images of {self._source} are unreadable "
                "(the warnings name them): repair or remove them"
            )


def _load_for_training(
    source: Source, preprocessing: Preprocessing, flip: bool, index: int, rng: np.random.Generator
) -> dict[str, np.ndarray | np.generic]:
    unreadable = -1
    # After more consecutive failures than are tolerated in total, give up.
    for candidate in range(index, index + min(len(source), _ENOUGH_SEEN)):
        candidate %= len(source)
        try:
            record = source[candidate]
            image = training_image(record["image"], preprocessing, rng, flip, source.max_pixels)
        except OSError:
            unreadable = index
        else:
            return _element(image, record["label"], candidate, unreadable)
    raise Damaged(f"images {index} to {candidate} of {source} are all unreadable")


def _load_for_evaluation(
    source: Source, preprocessing: Preprocessing, boxes: bool, index: int
) -> dict[str, np.ndarray | np.generic]:
    size, unreadable = preprocessing.image_size, -1
    if index >= 0:
        try:
            record = source[index]
            image = decode(record["image"], max_pixels=source.max_pixels)
        except OSError:
            unreadable = index
        else:
            element = _element(centre_crop(image, preprocessing), record["label"], index)
            if boxes:
                element["inside"] = inside_boxes(record["boxes"], image.size, preprocessing)
            return element
    blank = np.zeros((size, size, 3), np.uint8)
    element = _element(blank, -1, index, unreadable, valid=False)
    return element | {"inside": np.zeros((size, size), bool)} if boxes else element


def _element(
    image: np.ndarray, label: int, index: int, unreadable: int = -1, valid: bool = True
) -> dict[str, np.ndarray | np.generic]:
    """Returns one element. `unreadable` is the index of the image it replaces because that image
    could not be read, or -1."""
    return {
        "image": image,
        "label": np.int32(label),
        "index": np.int32(index),
        "valid": np.bool_(valid),
        "unreadable": np.int32(unreadable),
    }

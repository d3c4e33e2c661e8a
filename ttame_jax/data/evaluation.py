"""Batches of images for evaluation: each image once and in order, decoded by threads."""

import collections
import concurrent.futures
import math
import os
from collections.abc import Iterator, Sequence

import numpy as np

from ttame_jax.data.elements import Element, Unreadable, element
from ttame_jax.data.sources import Source
from ttame_jax.data.transforms import centre_crop, crop_boxes, decode
from ttame_jax.errors import Failure
from ttame_jax.preprocessing import Preprocessing

_AHEAD = 2  # batches that are decoded while another one is used

MOST_BOXES = 64
"""Boxes that an image may have. All images are padded to as many."""


def evaluation_batches(
    source: Source,
    preprocessing: Preprocessing,
    batch_size: int,
    *,
    indices: Sequence[int] | np.ndarray | None = None,
    boxes: bool = False,
    before: tuple[int, int] = (0, 0),
    process_index: int = 0,
    process_count: int = 1,
) -> "EvaluationBatches":
    """Returns batches of centre crops: each image once and in order, padded at the end.

    With `boxes`, a batch has another array, `boxes`: float32 [b, MOST_BOXES, 4], the ymin, xmin,
    ymax and xmax of an image's boxes as fractions of the crop, then NaN.

    Args:
      source: the images.
      preprocessing: the backbone's.
      batch_size: images per batch of this process.
      indices: the images to read; all by default.
      boxes: whether to add `boxes`; the source must have boxes.
      before: see `Unreadable`.
      process_index: `jax.process_index()`. Of all batches, the process takes every
        `process_count`-th, starting with this one. All processes take equally many.
      process_count: `jax.process_count()`.

    Raises:
      ValueError: `boxes` is True and the source has no boxes.
    """
    if boxes and not source.has_boxes:
        raise ValueError(f"{source} has no boxes")
    chosen = np.arange(len(source)) if indices is None else np.asarray(indices, np.int64)
    shard = in_batches(chosen, (process_count, batch_size))[:, process_index]
    return EvaluationBatches(source, preprocessing, shard, boxes, before)


def in_batches(indices: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns indices as ``[N, *shape]``, padded with -1."""
    padded = np.pad(indices, (0, -len(indices) % math.prod(shape)), constant_values=-1)
    return padded.reshape(-1, *shape)


def readable_crops(
    source: Source, preprocessing: Preprocessing, indices: Sequence[int] | np.ndarray
) -> np.ndarray:
    """Returns the centre crops of a few images, uint8 ``[n, S, S, 3]``, without unreadable ones."""
    batches = EvaluationBatches(source, preprocessing, np.asarray(indices)[None])
    loaded = [batches.load(index) for index in indices]
    size = preprocessing.image_size
    crops = [one["image"] for one in loaded if one["valid"]]
    return np.asarray(crops, np.uint8).reshape(-1, size, size, 3)


class EvaluationBatches:
    """An iterable over batches, see `ttame_jax.data.elements`.

    Iterating raises `Damaged` if too many images are unreadable, see `Unreadable`.

    Args:
      source: the images.
      preprocessing: the backbone's.
      indices: the images of each batch, int64 [N, b], -1 for padding.
      boxes: see `evaluation_batches`.
      before: see `Unreadable`.
    """

    def __init__(
        self,
        source: Source,
        preprocessing: Preprocessing,
        indices: np.ndarray,
        boxes: bool = False,
        before: tuple[int, int] = (0, 0),
    ):
        self._source, self._preprocessing = source, preprocessing
        self._indices, self._boxes, self._before = indices, boxes, before

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        images = int((self._indices >= 0).sum())
        unreadable = Unreadable(self._source, images, self._before)
        with concurrent.futures.ThreadPoolExecutor(max(os.cpu_count() or 1, 2)) as threads:
            waiting = collections.deque()
            try:
                for indices in self._indices.tolist():
                    waiting.append([threads.submit(self.load, index) for index in indices])
                    if len(waiting) > _AHEAD:
                        yield _batch(waiting.popleft(), unreadable)
                while waiting:
                    yield _batch(waiting.popleft(), unreadable)
            finally:  # also if the caller stops early
                threads.shutdown(cancel_futures=True)

    def load(self, index: int) -> Element:
        """Returns one image; a blank one for padding and unreadable images."""
        size, failed = self._preprocessing.image_size, -1
        if index >= 0:
            try:
                record = self._source[index]
                image = decode(record["image"], max_pixels=self._source.max_pixels)
            except OSError:
                failed = index
            else:
                crop = centre_crop(image, self._preprocessing)
                loaded = element(crop, record["label"], index)
                if self._boxes:
                    boxes = crop_boxes(record["boxes"], image.size, self._preprocessing)
                    loaded["boxes"] = self._padded(boxes, index)
                return loaded
        blank = element(np.zeros((size, size, 3), np.uint8), -1, index, failed, valid=False)
        return blank | {"boxes": _no_boxes()} if self._boxes else blank

    def _padded(self, boxes: np.ndarray, index: int) -> np.ndarray:
        if len(boxes) > MOST_BOXES:
            raise Failure(
                f"{self._source.name(index)} has {len(boxes)} boxes, more than {MOST_BOXES}"
            )
        padded = _no_boxes()
        padded[: len(boxes)] = boxes
        return padded


def _no_boxes() -> np.ndarray:
    return np.full((MOST_BOXES, 4), np.nan, np.float32)


def _batch(
    elements: Sequence[concurrent.futures.Future[Element]], unreadable: Unreadable
) -> dict[str, np.ndarray]:
    loaded = [future.result() for future in elements]
    batch = {name: np.stack([one[name] for one in loaded]) for name in loaded[0]}
    unreadable.check(batch["index"], batch.pop("unreadable"))
    return batch

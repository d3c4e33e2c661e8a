"""Boxes of objects from a file, for data sets that have none."""

import csv
import itertools
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import numpy as np

from ttame_jax.data.sources import Source, read_text
from ttame_jax.errors import Damaged
from ttame_jax.files import digest

CORNERS = ("ymin", "xmin", "ymax", "xmax")
NO_BOXES = np.zeros((0, 4), np.float32)

Boxes = Mapping[str, np.ndarray]
"""Boxes float32 ``[N, 4]`` by file name: ymin, xmin, ymax, xmax in fractions of the image."""


def read_boxes(path: str | Path) -> Boxes:
    """Reads a CSV file with one box per line and the columns file_name, xmin, ymin, xmax, ymax.

    Corners are fractions of the image's width and height. An image may have several lines.

    Raises:
      FileNotFoundError: the file does not exist.
      Damaged: it is something else.
    """
    try:
        lines = csv.DictReader(read_text(path).splitlines())
        rows = [(line["file_name"], [float(line[corner]) for corner in CORNERS]) for line in lines]
    except (KeyError, TypeError, ValueError) as error:
        raise Damaged(
            f"{path} is not a CSV file with the columns file_name,xmin,ymin,xmax,ymax: {error!r}"
        ) from error
    if not rows:
        raise Damaged(f"{path} has no boxes")
    boxes: dict[str, list[list[float]]] = {}
    for number, (name, box) in enumerate(rows, start=2):
        (top, left, bottom, right) = box
        if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
            raise Damaged(f"{path}, line {number}: corners must be fractions, the lower one first")
        boxes.setdefault(name, []).append(box)
    return {name: np.array(each, np.float32) for name, each in boxes.items()}


class BoxedSource(Source):
    """A source whose images have boxes by name, or by file name without folders. Others have none.

    Args:
      source: the images.
      boxes: see `read_boxes`.
    """

    has_boxes = True

    def __init__(self, source: Source, boxes: Boxes):
        self._source, self._boxes = source, boxes
        self.class_names, self.max_pixels = source.class_names, source.max_pixels

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        return self._source[index] | {"boxes": self._of(index)}

    def _of(self, index: int) -> np.ndarray:
        key = self._key(index)
        return NO_BOXES if key is None else self._boxes[key]

    def _key(self, index: int) -> str | None:
        """The name under which an image has boxes."""
        name = self.name(index)
        return next((key for key in (name, PurePosixPath(name).name) if key in self._boxes), None)

    def count(self, indices: np.ndarray) -> int:
        """Returns how many of these images have boxes.

        Raises:
          ValueError: two images have the same file name, so that boxes could be those of either.
        """
        images: dict[str, str] = {}
        for index in indices.tolist():
            if (key := self._key(index)) is not None:
                name = self.name(index)
                if (other := images.setdefault(key, name)) != name:
                    raise ValueError(
                        f"the boxes of {key} could be those of {other} and of {name}: give them "
                        "under these names"
                    )
        return len(images)

    def name(self, index: int) -> str:
        return self._source.name(index)

    @property
    def fingerprint(self) -> str:
        parts = itertools.chain.from_iterable(sorted(self._boxes.items()))
        return f"{self._source.fingerprint}, boxes {digest(parts)}"

    def __repr__(self) -> str:
        return str(self._source)

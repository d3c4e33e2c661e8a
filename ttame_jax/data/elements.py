"""What a batch consists of, and what becomes of unreadable images.

A batch is a dict of NumPy arrays:
  image: uint8 [b, S, S, 3]
  label: int32 [b], -1 if unknown
  index: int32 [b], the image's index in the source, -1 for padding
  valid: bool [b], False for padding and for unreadable images
"""

import warnings

import numpy as np

from ttame_jax.data.sources import Source
from ttame_jax.errors import Damaged

MAX_UNREADABLE = 0.01  # share of the images seen
ENOUGH_SEEN = 1000  # images, before that share is checked

Element = dict[str, np.ndarray | np.generic]


def element(
    image: np.ndarray, label: int, index: int, unreadable: int = -1, valid: bool = True
) -> Element:
    """Returns one element of a batch. `unreadable` is the index of the image it replaces because
    that image could not be read, or -1."""
    return {
        "image": image,
        "label": np.int32(label),
        "index": np.int32(index),
        "valid": np.bool_(valid),
        "unreadable": np.int32(unreadable),
    }


class Unreadable:
    """The unreadable images among those seen.

    Each causes one warning with its name. More than 1 % of the images seen are an error, checked
    after 1000 images or at the end of a smaller data set. A single one is an error only if no image
    is left.

    Args:
      source: the images.
      images: number of images that a process may read.
      before: the images that it had read before an interruption, and how many of them were
        unreadable.
    """

    def __init__(self, source: Source, images: int, before: tuple[int, int] = (0, 0)):
        self._source = source
        self._seen, self._before = before
        self._images = images + self._seen
        self._unreadable = set()

    def check(self, index: np.ndarray, unreadable: np.ndarray) -> None:
        """Counts the images of a batch, `index` and `unreadable` of its elements.

        Raises:
          Damaged: too many images are unreadable.
        """
        for image in set(unreadable[unreadable >= 0].tolist()) - self._unreadable:
            self._unreadable.add(image)
            warnings.warn(f"skipping an unreadable image: {self._source.name(image)}", stacklevel=4)
        self._seen = min(self._seen + int(np.count_nonzero(index >= 0)), self._images)
        judged = self._seen >= min(self._images, ENOUGH_SEEN)
        count = self._before + len(self._unreadable)
        if judged and (count > max(MAX_UNREADABLE * self._seen, 1) or count == self._seen > 0):
            raise Damaged(
                f"{count} of {self._seen} images of {self._source} are unreadable "
                "(the warnings name them): repair or remove them"
            )

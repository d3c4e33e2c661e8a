"""What a classifier is shown of a picture of any size."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from ttame_jax.data.transforms import centre_corner, centre_crop, resampling, resized_size
from ttame_jax.preprocessing import Preprocessing

ViewName = Literal["whole", "crop"]
"""The whole picture, or the centre crop that the classifier was evaluated with."""

STEPS = 8
"""The longer side of a whole view is a multiple of this part of the shorter one."""

MOST_ELONGATED = 8
"""Largest ratio of the sides of a picture that is shown as a whole."""


@dataclass(frozen=True)
class View:
    """A part of a picture, resized for a classifier.

    Attributes:
      pixels: uint8 [h, w, 3].
      box: left, top, right and bottom of the part, in pixels of the picture.
    """

    pixels: np.ndarray
    box: tuple[float, float, float, float]


def crop_view(picture: Image.Image, preprocessing: Preprocessing) -> View:
    """The centre crop of an RGB picture, as in evaluation."""
    width, height = resized_size(picture.size, preprocessing)
    across, down = picture.width / width, picture.height / height
    left, top = centre_corner((width, height), preprocessing)
    size = preprocessing.image_size
    box = (left * across, top * down, (left + size) * across, (top + size) * down)
    return View(centre_crop(picture, preprocessing), box)


def whole_view(picture: Image.Image, preprocessing: Preprocessing) -> View:
    """A whole RGB picture at the scale of evaluation, the ratio of its sides rounded to 1/8.

    Rounding limits the number of different sizes, each of which needs a program of its own. It
    changes the aspect by at most 6 %.

    Raises:
      ValueError: the picture is too elongated.
    """
    check_elongation(picture)
    short = min(picture.size)
    width, height = (
        round(preprocessing.resize_size * math.floor(STEPS * side / short + 0.5) / STEPS)
        for side in picture.size
    )
    resized = picture.resize((width, height), resampling(preprocessing))
    return View(np.asarray(resized), (0, 0, picture.width, picture.height))


def tiles(picture: Image.Image, preprocessing: Preprocessing) -> list[View]:
    """Squares that cover a whole RGB picture, evenly spaced along its longer side.

    Their side is the picture's shorter one. Neighbours overlap by less than a half, unless two
    cover the picture.

    Raises:
      ValueError: the picture is too elongated.
    """
    check_elongation(picture)
    short, long = sorted(picture.size)
    count, size = math.ceil(long / short), preprocessing.image_size
    views = []
    for start in np.linspace(0, long - short, count).tolist():
        left, top = (start, 0.0) if picture.width == long else (0.0, start)
        box = (left, top, left + short, top + short)
        pixels = np.asarray(picture.resize((size, size), resampling(preprocessing), box))
        views.append(View(pixels, box))
    return views


def check_elongation(picture: Image.Image) -> None:
    """Raises ValueError if a picture is too elongated to be shown as a whole."""
    if max(picture.size) > MOST_ELONGATED * min(picture.size):
        raise ValueError(
            f"a picture of {picture.width}x{picture.height} pixels is too elongated to be shown as "
            f"a whole: crop it, or choose the centre crop (--view crop)"
        )

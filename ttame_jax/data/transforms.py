"""From an encoded image to the uint8 square a classifier sees, on the CPU with Pillow.

Resizing and cropping equal torchvision's `Resize` and `CenterCrop` on PIL images, bit for bit.
Scaling to [0, 1] and standardising follow on the device.
"""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

if TYPE_CHECKING:
    from ttame_jax.backbones import Preprocessing


class UnreadableImage(OSError):
    """The bytes are not an image, or a damaged one."""


def decode(encoded: bytes) -> Image.Image:
    """Decodes an image of any format Pillow reads to RGB; transparency is dropped.

    An EXIF orientation is ignored, as in the data sets the classifiers were trained on.
    Raises UnreadableImage.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return _to_rgb(image)
    except Exception as error:  # damaged files raise nearly anything from within Pillow
        raise UnreadableImage(f"cannot decode the image: {error}") from error


def training_image(
    encoded: bytes, preprocessing: Preprocessing, rng: np.random.Generator, flip: bool = True
) -> np.ndarray:
    """Returns a random crop, mirrored half of the time if `flip`: uint8 [S, S, 3]."""
    image = _resize_shortest(decode(encoded), preprocessing)
    size = preprocessing.image_size
    left = rng.integers(image.width - size, endpoint=True)
    top = rng.integers(image.height - size, endpoint=True)
    crop = _crop(image, left, top, size)
    return crop[:, ::-1] if flip and rng.random() < 0.5 else crop


def evaluation_image(encoded: bytes, preprocessing: Preprocessing) -> np.ndarray:
    """Returns the centre crop: uint8 [S, S, 3]."""
    return _centre_crop(decode(encoded), preprocessing)


def preprocess(image: str | os.PathLike | Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """Returns the centre crop of a single picture, turned upright by its EXIF orientation.

    Args:
      image: a path or an open PIL image of any mode.
      preprocessing: that of the backbone.

    Returns:
      uint8 [S, S, 3].

    Raises:
      FileNotFoundError: there is no such file.
      UnreadableImage: the file is not an image, or a damaged one.
    """
    if isinstance(image, Image.Image):
        return _centre_crop(_to_rgb(ImageOps.exif_transpose(image)), preprocessing)
    try:
        with Image.open(image) as opened:
            return preprocess(opened, preprocessing)
    except FileNotFoundError:
        raise
    except Exception as error:  # see decode
        raise UnreadableImage(f"cannot decode {os.fspath(image)}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "P":  # by way of RGBA, or Pillow warns of a transparent palette colour
        image = image.convert("RGBA")
    elif image.mode.startswith("I;16"):  # grey of 16 bits, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _resize_shortest(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    short, target = min(image.size), preprocessing.resize_size
    if short == target:
        return image
    size = [target if side == short else int(target * side / short) for side in image.size]
    return image.resize(size, Image.Resampling[preprocessing.interpolation.upper()])


def _centre_crop(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    image = _resize_shortest(image, preprocessing)
    size = preprocessing.image_size
    # `round` is Python's, to even, as in torchvision
    return _crop(image, round((image.width - size) / 2), round((image.height - size) / 2), size)


def _crop(image: Image.Image, left: int, top: int, size: int) -> np.ndarray:
    return np.asarray(image.crop((left, top, left + size, top + size)))

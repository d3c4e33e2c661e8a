"""From an encoded image to the uint8 square a classifier sees, on the CPU with Pillow.

To evaluate, resizing and cropping equal torchvision's `Resize` and `CenterCrop` on PIL images, bit
for bit. To train, only the crop is resized, and very large JPEGs are decoded smaller: quicker,
and the same to the eye. Scaling to [0, 1] and standardising follow on the device.
"""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

if TYPE_CHECKING:
    from ttame_jax.backbones import Preprocessing


# A JPEG may be decoded at a half, a quarter or an eighth of its size for next to nothing. As long
# as the result is resized to at most half of that, less changes than between bilinear and bicubic.
DRAFT_MARGIN = 2


class UnreadableImage(OSError):
    """The bytes are not an image, or a damaged one."""


def decode(encoded: bytes, shortest: int | None = None) -> Image.Image:
    """Decodes an image of any format Pillow reads to RGB; transparency is dropped.

    An EXIF orientation is ignored, as in the data sets the classifiers were trained on.

    Args:
      encoded: the file's bytes.
      shortest: a JPEG may come smaller by 2, 4 or 8 while its shortest side stays as long as this.

    Raises:
      UnreadableImage: the bytes are not an image, or a damaged one.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            if shortest is not None:
                image.draft(None, (shortest, shortest))
            return _to_rgb(image)
    except Exception as error:  # damaged files raise nearly anything from within Pillow
        raise UnreadableImage(f"cannot decode the image: {error}") from error


def training_image(
    encoded: bytes, preprocessing: Preprocessing, rng: np.random.Generator, flip: bool = True
) -> np.ndarray:
    """Returns a random crop, mirrored half of the time if `flip`: uint8 [S, S, 3]."""
    image = decode(encoded, DRAFT_MARGIN * preprocessing.resize_size)
    return random_crop(image, preprocessing, rng, flip)


def random_crop(
    image: Image.Image, preprocessing: Preprocessing, rng: np.random.Generator, flip: bool = True
) -> np.ndarray:
    """The part of `training_image` that follows decoding."""
    width, height = _resized_size(image, preprocessing)
    size = preprocessing.image_size
    left = rng.integers(width - size, endpoint=True)
    top = rng.integers(height - size, endpoint=True)
    across, down = image.width / width, image.height / height  # pixels of `image` in one of ours
    box = (left * across, top * down, (left + size) * across, (top + size) * down)
    crop = np.asarray(image.resize((size, size), _filter(preprocessing), box))
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


def _resized_size(image: Image.Image, preprocessing: Preprocessing) -> tuple[int, ...]:
    short, target = min(image.size), preprocessing.resize_size
    return tuple(target if side == short else int(target * side / short) for side in image.size)


def _filter(preprocessing: Preprocessing) -> Image.Resampling:
    return Image.Resampling[preprocessing.interpolation.upper()]


def _centre_crop(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    image = image.resize(_resized_size(image, preprocessing), _filter(preprocessing))
    size = preprocessing.image_size
    # `round` is Python's, to even, as in torchvision
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))

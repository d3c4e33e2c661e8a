"""From an encoded image to the uint8 square that a classifier sees, on the CPU with Pillow.

Evaluation equals torchvision's `Resize` and `CenterCrop` on PIL images, bit for bit. Training
resizes only the crop and decodes very large JPEGs at a reduced size, which is faster and looks the
same. Conversion to [0, 1] and standardisation follow on the device.
"""

import io
import math
import os

import numpy as np
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import BITSPERSAMPLE

from ttame_jax.preprocessing import Preprocessing

# Decoding a JPEG at a half, a quarter or an eighth of its size is much cheaper. If it is then
# resized to at most half of the decoded size, the result changes less than between bilinear and
# bicubic.
DRAFT_MARGIN = 2

_LARGEST_RESIZED = 2**24  # pixels of a whole resized image


MAX_PIXELS = 50_000_000
"""Largest number of pixels of an image, unless another is given. Pillow itself refuses more than
178 million (twice `PIL.Image.MAX_IMAGE_PIXELS`)."""


class UnreadableImage(OSError):
    """The bytes are not an image, or the image is damaged or too large."""


def decode(
    encoded: bytes, shortest: int | None = None, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Decodes an image of any format that Pillow reads to RGB, without transparency.

    The EXIF orientation is ignored, as it was when the classifiers were trained.

    Args:
      encoded: the file's bytes.
      shortest: allows decoding a JPEG at 1/2, 1/4 or 1/8 of its size as long as its shortest side
        has at least this many pixels.
      max_pixels: largest number of pixels, which is checked before the image is decoded.

    Raises:
      UnreadableImage: the bytes are not an image, or the image is damaged or too large.
    """
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            _check_pixels(image, max_pixels)
            if shortest is not None:
                image.draft(None, (shortest, shortest))
            return _to_rgb(image, _grey_bits(image))
    except Exception as error:  # Pillow raises many types for damaged files
        raise UnreadableImage(f"cannot decode the image: {error}") from error


def training_image(
    encoded: bytes,
    preprocessing: Preprocessing,
    rng: np.random.Generator,
    flip: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Returns a random crop, mirrored with probability 1/2 if `flip`: uint8 [S, S, 3]."""
    image = decode(encoded, DRAFT_MARGIN * preprocessing.resize_size, max_pixels)
    return random_crop(image, preprocessing, rng, flip)


def random_crop(
    image: Image.Image, preprocessing: Preprocessing, rng: np.random.Generator, flip: bool = True
) -> np.ndarray:
    """Returns what `training_image` does, for a decoded image."""
    width, height = resized_size(image.size, preprocessing)
    size = preprocessing.image_size
    left = rng.integers(width - size, endpoint=True)
    top = rng.integers(height - size, endpoint=True)
    crop = _resized_part(image, (width, height), (int(left), int(top)), preprocessing)
    return crop[:, ::-1] if flip and rng.random() < 0.5 else crop


def evaluation_image(encoded: bytes, preprocessing: Preprocessing) -> np.ndarray:
    """Returns the centre crop: uint8 [S, S, 3]."""
    return centre_crop(decode(encoded), preprocessing)


def centre_crop(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """Returns what `evaluation_image` does, for a decoded image."""
    resized = resized_size(image.size, preprocessing)
    left, top = centre_corner(resized, preprocessing)
    if math.prod(resized) > _LARGEST_RESIZED:  # of a very long image, only the crop is resized
        return _resized_part(image, resized, (left, top), preprocessing)
    image = image.resize(resized, resampling(preprocessing))
    size = preprocessing.image_size
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _resized_part(
    image: Image.Image,
    resized: tuple[int, int],
    corner: tuple[int, int],
    preprocessing: Preprocessing,
) -> np.ndarray:
    """Resizes only the crop at `corner` (left, top) of the resized image: uint8 [S, S, 3]."""
    (width, height), (left, top), size = resized, corner, preprocessing.image_size
    across, down = image.width / width, image.height / height  # pixels of `image` per resized one
    box = (left * across, top * down, (left + size) * across, (top + size) * down)
    return np.asarray(image.resize((size, size), resampling(preprocessing), box))


def crop_boxes(
    boxes: np.ndarray, image_size: tuple[int, int], preprocessing: Preprocessing
) -> np.ndarray:
    """Returns boxes as fractions of the centre crop: float32 [N, 4]. They may lie outside of it.

    Args:
      boxes: [N, 4], as ymin, xmin, ymax, xmax in fractions of the whole image.
      image_size: width and height of the whole image in pixels.
      preprocessing: the backbone's, with its centre crop of S pixels.
    """
    (width, height) = resized = resized_size(image_size, preprocessing)
    left, top = centre_corner(resized, preprocessing)
    pixels = boxes * (height, width, height, width) - (top, left, top, left)
    return (pixels / preprocessing.image_size).astype(np.float32)


def preprocess(
    image: str | os.PathLike | Image.Image,
    preprocessing: Preprocessing,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Returns the centre crop of a single picture, rotated by its EXIF orientation.

    Args:
      image: a path, or an open PIL image of any mode.
      preprocessing: the backbone's.
      max_pixels: largest number of pixels of the image.

    Returns:
      uint8 [S, S, 3].

    Raises:
      FileNotFoundError: the file does not exist.
      UnreadableImage: the file is not an image, or the image is damaged or too large.
    """
    return centre_crop(open_picture(image, max_pixels), preprocessing)


def open_picture(
    image: str | os.PathLike | Image.Image, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Returns a picture in RGB, rotated by its EXIF orientation.

    Arguments and errors are those of `preprocess`.
    """
    if isinstance(image, Image.Image):
        _check_pixels(image, max_pixels)
        return _to_rgb(ImageOps.exif_transpose(image), _grey_bits(image))
    try:
        with Image.open(image) as opened:
            return open_picture(opened, max_pixels)
    except FileNotFoundError:
        raise
    except Exception as error:  # see decode
        raise UnreadableImage(f"cannot decode {os.fspath(image)}: {error}") from error


def _check_pixels(image: Image.Image, most: int) -> None:
    if image.width * image.height > most:
        raise UnreadableImage(
            f"it has {image.width} x {image.height} pixels, more than {most:,}: "
            "reduce it, or raise --max-pixels"
        )


def _grey_bits(image: Image.Image) -> int | None:
    """The bits of a grey pixel, if there are 9 to 16."""
    if image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", {})  # of a TIFF
        return tags.get(BITSPERSAMPLE, (16,))[0]
    return 16 if image.mode == "I" and image.format == "PPM" else None  # scaled by Pillow


def _to_rgb(image: Image.Image, grey_bits: int | None) -> Image.Image:
    if grey_bits:  # Pillow would clip it at 255
        image = Image.fromarray((np.asarray(image) >> grey_bits - 8).astype(np.uint8))
    if image.mode in ("F", "I"):  # 32 bits per pixel, of an unknown range
        raise ValueError(
            f"its pixels are 32-bit numbers (mode {image.mode}): convert it to 8 or 16 bits"
        )
    if image.mode == "P":  # via RGBA: Pillow warns about transparent palette colours
        image = image.convert("RGBA")
    return image.convert("RGB")


def resized_size(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    """Width and height of an image after its shortest side is resized."""
    short, target = min(size), preprocessing.resize_size
    width, height = (target if side == short else int(target * side / short) for side in size)
    return width, height


def centre_corner(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    """Left and top of the centre crop. Python's `round`, to even, as in torchvision."""
    left, top = (round((side - preprocessing.image_size) / 2) for side in size)
    return left, top


def resampling(preprocessing: Preprocessing) -> Image.Resampling:
    return Image.Resampling[preprocessing.interpolation.upper()]

"""How an image becomes a classifier's input."""

from dataclasses import dataclass, replace
from typing import Literal, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np

Masking = Literal["pixel", "standardised"]
"""How a mask E in [0, 1] masks an image I (paper, section III-C), with |.| the standardisation:
"pixel" is |E * I|, "standardised" is E * |I|."""

Interpolation = Literal["bilinear", "bicubic"]

Images = TypeVar("Images", np.ndarray, jax.Array)


def to_float(images: Images) -> Images:
    """Converts uint8 images of any shape to float32 in [0, 1]."""
    # pyrefly: ignore[bad-return]  # NumPy's stub widens the dtype of the quotient
    return images.astype(np.float32) / np.float32(255)


@dataclass(frozen=True)
class Preprocessing:
    """A classifier's preprocessing. The defaults are torchvision's for ImageNet.

    The shortest side is resized (antialiased) to `resize_size` pixels, the centre square of
    `image_size` pixels is cropped, converted to [0, 1] and standardised per channel (RGB).

    Raises:
      ValueError: a size is not a positive integer, `resize_size` is smaller than `image_size`, or
        `mean` and `std` are not three finite numbers, `std` positive.
    """

    image_size: int = 224
    resize_size: int = 256
    interpolation: Interpolation = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self):
        for name in ("image_size", "resize_size"):
            size = getattr(self, name)
            if not isinstance(size, int | np.integer) or size < 1:
                raise ValueError(f"{name} must be a positive integer, not {size!r}")
            object.__setattr__(self, name, int(size))
        if self.interpolation not in get_args(Interpolation):
            known = " or ".join(get_args(Interpolation))
            raise ValueError(f"interpolation must be {known}, not {self.interpolation!r}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != 3 or not np.isfinite(values).all():
                raise ValueError(f"{name} must be three finite numbers, not {values}")
            object.__setattr__(self, name, tuple(map(float, values)))  # hashable
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, not {self.std}")
        if self.resize_size < self.image_size:
            raise ValueError(
                f"resize_size must be at least image_size: cannot crop {self.image_size} pixels "
                f"from {self.resize_size}"
            )

    def standardise(self, images: jax.Array) -> jax.Array:
        """Images [..., 3] in [0, 1] -> (images - mean) / std, of the same shape and dtype."""
        mean, std = (jnp.asarray(values, images.dtype) for values in (self.mean, self.std))
        return (images - mean) / std

    def resized(self, image_size: int) -> "Preprocessing":
        """The same preprocessing for another input size, with the same cropped fraction."""
        resize_size = image_size * self.resize_size // self.image_size
        return replace(self, image_size=image_size, resize_size=resize_size)


IMAGENET = Preprocessing()

# The mean is the mean colour of the built-in digits, so that a masked digit disappears. With
# ImageNet's mean its outline would stay visible on the darker canvas.
DIGITS = Preprocessing(image_size=64, resize_size=64, mean=(0.31,) * 3, std=(0.24,) * 3)

"""The pointing game: does a map's maximum fall on the object?

Zhang et al., "Top-down Neural Attention by Excitation Backprop", ECCV 2016; without its tolerance
of 15 pixels around the object.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ttame_jax.masking import upsample


def peak(maps: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Where each map ``[B, h, w]``, upsampled to an image of `size`, has its maximum.

    Returns:
      ``[B, 2]``, the y and x of the pixel's centre as fractions of the image; of equal maxima the
      first in row order counts.
    """
    highest = upsample(maps, size).reshape(len(maps), -1).argmax(axis=1)
    return jnp.stack(
        [(highest // size[1] + 0.5) / size[0], (highest % size[1] + 0.5) / size[1]], axis=1
    )


def in_box(points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Whether points ``[B, 2]`` (y, x) lie in boxes ``[B, 4]`` (ymin, xmin, ymax, xmax): bool."""
    points, boxes = np.asarray(points), np.asarray(boxes)
    return ((boxes[:, :2] <= points) & (points <= boxes[:, 2:])).all(axis=1)

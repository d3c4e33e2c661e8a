"""The pointing game: does a map's maximum fall on the object?

Zhang et al., "Top-down Neural Attention by Excitation Backprop", ECCV 2016; without its tolerance
of 15 pixels around the object.
"""

import jax
import jax.numpy as jnp

from ttame_jax.masking import upsample


def pointing_hits(maps: jax.Array, boxes: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Whether the maximum of each map, upsampled to the image, lies in the image's box.

    Args:
      maps: ``[B, h, w]``.
      boxes: ``[B, 4]``, ymin, xmin, ymax, xmax as fractions of the image.
      size: height and width of the image in pixels.

    Returns:
      bool ``[B]``; of equal maxima the first in row order counts.
    """
    highest = upsample(maps, size).reshape(len(maps), -1).argmax(axis=1)
    y = (highest // size[1] + 0.5) / size[0]
    x = (highest % size[1] + 0.5) / size[1]
    top, left, bottom, right = jnp.asarray(boxes).T
    return (top <= y) & (y <= bottom) & (left <= x) & (x <= right)

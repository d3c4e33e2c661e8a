"""Confidence of a classifier in the explained class, also for masked images."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from ttame_jax.masking import mask_images
from ttame_jax.metrics.selection import pixel_count
from ttame_jax.preprocessing import Masking, Preprocessing

PERCENTAGES = (100, 50, 15)
"""Percentages v of pixels that the paper keeps for AD and IC (section IV-B)."""


def confidence(probabilities: jax.Array, classes: jax.Array) -> jax.Array:
    """Probability of the explained class: `[B, num_classes]`, int `[B]` -> `[B]` in [0, 1]."""
    return jnp.take_along_axis(probabilities, classes[:, None], axis=1)[:, 0]


def masked_confidences(
    predict: Callable[[jax.Array], jax.Array],
    images: jax.Array,
    maps: jax.Array,
    ranks: jax.Array,
    classes: jax.Array,
    preprocessing: Preprocessing,
    masking: Masking,
    percentages: Sequence[float] = PERCENTAGES,
) -> jax.Array:
    """Confidence in a class after masking the image with the top v % of its map.

    Args:
      predict: standardised images `[B, H, W, 3]` to softmax probabilities `[B, num_classes]`.
      images: `[B, H, W, 3]` in [0, 1].
      maps: `[B, H, W]` in [0, 1], at the size of the images.
      ranks: `relevance_rank(maps)`.
      classes: int `[B]`.
      preprocessing: the backbone's.
      masking: how the map masks the image.
      percentages: the values of v.

    Returns:
      `[B, len(percentages)]` in [0, 1].
    """

    def masked_confidence(percent: float) -> jax.Array:
        masks = jnp.where(ranks < pixel_count(percent, maps[0].size), maps, 0)
        return confidence(predict(mask_images(images, masks, preprocessing, masking)), classes)

    return jnp.stack([masked_confidence(percent) for percent in percentages], axis=1)

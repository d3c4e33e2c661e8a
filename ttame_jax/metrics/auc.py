"""Insertion and deletion: the area under the confidence as pixels come or go by relevance.

Petsiuk et al., "RISE: Randomized Input Sampling for Explanation of Black-box Models", BMVC 2018:
deletion sets the most relevant pixels to the mean colour first (lower is better), insertion puts
them into a blurred image first (higher is better). The original moves one image row's worth of
pixels at a time; the area is by the trapezoid rule over equal steps here as there.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ttame_jax.metrics.selection import relevance_rank

STEPS = 56
BLUR_SIZE, BLUR_SIGMA = 11, 5.0  # pixels

Predict = Callable[[jax.Array], jax.Array]


def deletion(
    predict: Predict, images: jax.Array, maps: jax.Array, classes: jax.Array, steps: int = STEPS
) -> jax.Array:
    """Area under the confidence while pixels are removed: ``[B]`` in [0, 1], lower is better.

    Args:
      predict: standardised images ``[B, H, W, C]`` to probabilities ``[B, Cls]``.
      images: ``[B, H, W, C]``, standardised.
      maps: relevance ``[B, H, W]`` at the size of the images; only its order counts.
      classes: int ``[B]``, the explained classes.
      steps: in which all pixels are removed.
    """
    return _area(predict, images, jnp.zeros_like(images), maps, classes, steps)


def insertion(
    predict: Predict, images: jax.Array, maps: jax.Array, classes: jax.Array, steps: int = STEPS
) -> jax.Array:
    """Area under the confidence while pixels are put into a blurred image: higher is better.

    Arguments and result are those of `deletion`.
    """
    return _area(predict, blur(images), images, maps, classes, steps)


def blur(images: jax.Array) -> jax.Array:
    """Gaussian blur of images ``[B, H, W, C]``, zeros beyond the border as in the original."""
    offsets = np.arange(BLUR_SIZE) - BLUR_SIZE // 2
    weights = np.exp(-(offsets**2) / (2 * BLUR_SIGMA**2))
    weights = jnp.asarray(weights / weights.sum(), images.dtype)
    margin = BLUR_SIZE // 2
    convolve = functools.partial(jnp.convolve, v=weights, precision="highest")
    along = jax.vmap(lambda line: convolve(line)[margin:-margin])
    for axis in (1, 2):
        lines = jnp.moveaxis(images, axis, -1)
        blurred = along(lines.reshape(-1, lines.shape[-1])).reshape(lines.shape)
        images = jnp.moveaxis(blurred, -1, axis)
    return images


def _area(predict, start, end, maps, classes, steps: int) -> jax.Array:
    """Area under the confidence while pixels of `end` replace those of `start` by relevance."""
    ranks = relevance_rank(maps)
    counts = jnp.asarray(np.linspace(0, maps[0].size, steps + 1).round(), jnp.int32)

    def confidence(count):
        mixed = jnp.where((ranks < count)[..., None], end, start)
        return jnp.take_along_axis(predict(mixed), classes[:, None], axis=1)[:, 0]

    values = jax.lax.map(confidence, counts)  # [steps + 1, B]
    return (values[:-1] + values[1:]).mean(axis=0) / 2

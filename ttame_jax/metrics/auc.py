"""Insertion and deletion: the area under the confidence as pixels are added or removed.

Petsiuk et al., "RISE: Randomized Input Sampling for Explanation of Black-box Models", BMVC 2018.
Deletion replaces pixels with the mean colour, most relevant first; insertion restores them in a
blurred image, most relevant first. The original moves one image row's worth of pixels per step.
The area follows from the trapezoidal rule with equal steps, as in the original.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from scipy.ndimage import gaussian_filter1d

from ttame_jax.metrics.base import Metric, Sample
from ttame_jax.metrics.confidence import confidence

STEPS = 56
BLUR_SIZE, BLUR_SIGMA = 11, 5.0  # pixels

Predict = Callable[[jax.Array], jax.Array]


def deletion(
    predict: Predict, images: jax.Array, ranks: jax.Array, classes: jax.Array, steps: int = STEPS
) -> jax.Array:
    """Area under the confidence while pixels are removed: `[B]` in [0, 1], lower is better.

    Args:
      predict: standardised images `[B, H, W, C]` to probabilities `[B, num_classes]`.
      images: `[B, H, W, C]`, standardised.
      ranks: `relevance_rank` of the maps, int32 `[B, H, W]`.
      classes: int `[B]`, the explained classes.
      steps: the number of steps until all pixels are removed.
    """
    return _area(predict, images, jnp.zeros_like(images), ranks, classes, steps)


def insertion(
    predict: Predict, images: jax.Array, ranks: jax.Array, classes: jax.Array, steps: int = STEPS
) -> jax.Array:
    """Area under the confidence while pixels are inserted: `[B]` in [0, 1], higher is better.

    Arguments as in `deletion`.
    """
    return _area(predict, blur(images), images, ranks, classes, steps)


def blur(images: jax.Array) -> jax.Array:
    """Blurs images `[B, H, W, C]` with the original's kernel, padding with zeros as it does.

    The kernel is a Gaussian that is reflected at the borders of its 11 pixels, so it is nearly
    flat.
    """
    margin = BLUR_SIZE // 2
    weights = gaussian_filter1d(np.eye(BLUR_SIZE)[margin], BLUR_SIGMA)
    weights = jnp.asarray(weights, images.dtype)
    convolve = functools.partial(jnp.convolve, v=weights, precision="highest")
    along = jax.vmap(lambda line: convolve(line)[margin:-margin])
    for axis in (1, 2):
        lines = jnp.moveaxis(images, axis, -1)
        blurred = along(lines.reshape(-1, lines.shape[-1])).reshape(lines.shape)
        images = jnp.moveaxis(blurred, -1, axis)
    return images


def _area(predict, start, end, ranks, classes, steps: int) -> jax.Array:
    """Area under the confidence while pixels of `end` replace those of `start` by rank."""
    counts = jnp.asarray(np.linspace(0, ranks[0].size, steps + 1).round(), jnp.int32)

    def mixed_confidence(count):
        return confidence(predict(jnp.where((ranks < count)[..., None], end, start)), classes)

    values = jax.lax.map(mixed_confidence, counts)  # [steps + 1, B]
    return (values[:-1] + values[1:]).mean(axis=0) / 2


class _Area(Metric):
    table = "insertion_deletion"
    area: Callable[..., jax.Array]

    def measure(self, sample: Sample) -> dict[str, jax.Array]:
        args = (sample.predict, sample.standardised, sample.ranks, sample.classes)
        return {self.name: self.area(*args)}


class Insertion(_Area, name="insertion"):
    label = "Insertion"
    lower_is_better = False
    area = staticmethod(insertion)


class Deletion(_Area, name="deletion"):
    label = "Deletion"
    lower_is_better = True
    area = staticmethod(deletion)

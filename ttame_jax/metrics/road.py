"""ROAD: how the prediction changes as pixels are imputed in the order of their relevance.

Rong et al., "A Consistent and Efficient Evaluation Strategy for Attribution Methods", ICML 2022;
Sec. IV-B2 of the T-TAME paper. MoRF(v) removes the v % most relevant pixels (lower is better),
LeRF(v) the v % least relevant (higher is better).

Differences from the ROAD classes of pytorch-grad-cam 1.5, which the T-TAME authors' code uses:
there, `percentile` is the share that *stays* (percentile 90 removes 10 %); the threshold is an
interpolated percentile and pixels equal to it are removed too, so that ties remove more than the
share (a constant map loses every pixel), where this module removes exactly `pixel_count` pixels;
the score is the change against the untouched image unless `return_diff=False`; and the noise
comes from a global generator. Neighbours, weights, borders and the noise itself are the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ttame_jax.metrics.imputation import noisy_linear_imputation
from ttame_jax.metrics.selection import pixel_count, relevance_rank


def confidence(probabilities: jax.Array, classes: jax.Array) -> jax.Array:
    """Probability of the explained class: `[B, num_classes]`, int `[B]` -> `[B]` in [0, 1]."""
    return jnp.take_along_axis(probabilities, classes[:, None], axis=1)[:, 0]


def unchanged(probabilities: jax.Array, classes: jax.Array) -> jax.Array:
    """1 where the explained class is still the predicted one, else 0: `[B]`."""
    return (probabilities.argmax(axis=1) == classes).astype(probabilities.dtype)


@dataclass(frozen=True)
class Protocol:
    """Which shares of the pixels are removed (in %), and what is read from the prediction."""

    percentages: tuple[int, ...]
    score: Callable[[jax.Array, jax.Array], jax.Array]


PROTOCOLS = {
    "paper": Protocol((10, 20, 30, 40, 50, 60, 70, 80, 90), confidence),
    "reference": Protocol((10, 20, 30, 40, 50, 70, 90), unchanged),
}
"""The paper's text and figures, and `src/tame/metrics.py` of the authors' code."""


class RoadScores(NamedTuple):
    """Scores of every image at every percentage, in [0, 1]; the single figure is their mean."""

    morf: jax.Array  # [B, P]
    lerf: jax.Array  # [B, P]


def road(
    predict: Callable[[jax.Array], jax.Array],
    images: jax.Array,
    maps: jax.Array,
    classes: jax.Array,
    indices: jax.Array,
    key: jax.Array,
    protocol: Protocol = PROTOCOLS["paper"],
) -> RoadScores:
    """MoRF and LeRF of a batch of explained images; to be called under `jax.jit`.

    One percentage of one order is imputed at a time, for the whole batch, so that memory and
    compilation are those of a single imputation. The noise follows from the key, the image's
    index and the percentage alone: scores do not depend on how images are batched or spread over
    devices.

    Args:
      predict: standardised images `[B, H, W, C]` -> probabilities `[B, num_classes]`.
      images: `[B, H, W, C]`, standardised.
      maps: relevance `[B, H, W]` at the size of the images; only its order counts.
      classes: int `[B]`, the explained classes.
      indices: int `[B]`, each image's number in its data set.
      key: a typed key (`jax.random.key`), the same for all batches.
      protocol: percentages and score, one of `PROTOCOLS`.

    Raises:
      ValueError: the maps do not have the size of the images.
    """
    if maps.shape != images.shape[:3]:
        raise ValueError(
            f"maps must have the size of the images: resize {maps.shape} to {images.shape[:3]}"
        )
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
    percentages = jnp.array(protocol.percentages)
    counts = jnp.array([pixel_count(v, maps[0].size) for v in protocol.percentages])

    def scores(ranks):
        def score(step):
            imputed = remove_first(images, ranks, *step, keys)
            return protocol.score(predict(imputed), classes)

        return jnp.moveaxis(lax.map(score, (percentages, counts)), 0, 1)

    orders = jnp.stack([relevance_rank(maps), relevance_rank(-maps)])
    return RoadScores(*lax.map(scores, orders))


def remove_first(
    images: jax.Array, ranks: jax.Array, percentage: int, count: int, keys: jax.Array
) -> jax.Array:
    """Imputes the `count` pixels that rank first in each image, `percentage` % of them.

    Images are `[B, H, W, C]`, ranks `relevance_rank`'s, `[B, H, W]`, keys one per image, `[B]`;
    the percentage chooses the noise.
    """
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, percentage)
    return noisy_linear_imputation(images, ranks < count, keys)

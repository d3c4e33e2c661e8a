"""ROAD: how the prediction changes as pixels are imputed in the order of their relevance.

Rong et al., "A Consistent and Efficient Evaluation Strategy for Attribution Methods", ICML 2022;
Sec. IV-B2 of the T-TAME paper. MoRF(v) removes the v % most relevant pixels (lower is better),
LeRF(v) the v % least relevant (higher is better).

The ROAD classes of pytorch-grad-cam 1.5, which the T-TAME authors' code uses, differ as follows:
- `percentile` is the share of pixels that is *kept*: percentile 90 removes 10 %.
- The threshold is an interpolated percentile, and pixels equal to it are removed too. With ties,
  more pixels are removed than requested (a constant map loses all of them). This module removes
  exactly `pixel_count` pixels.
- The score is the change from the original image unless `return_diff=False`.
- The noise comes from a global generator.

Neighbours, weights, borders and the standard deviation of the noise are the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ttame_jax.metrics.base import Metric, Rows, Sample, TableRow, by_percentage
from ttame_jax.metrics.confidence import confidence
from ttame_jax.metrics.imputation import noisy_linear_imputation
from ttame_jax.metrics.selection import pixel_count


def unchanged(probabilities: jax.Array, classes: jax.Array) -> jax.Array:
    """1 where the explained class is still the predicted class, else 0: `[B]`."""
    return (probabilities.argmax(axis=1) == classes).astype(probabilities.dtype)


@dataclass(frozen=True)
class Protocol:
    """Percentages of pixels to remove, and the score of a prediction."""

    percentages: tuple[int, ...]
    score: Callable[[jax.Array, jax.Array], jax.Array]


PROTOCOLS = {
    "paper": Protocol((10, 20, 30, 40, 50, 60, 70, 80, 90), confidence),
    "reference": Protocol((10, 20, 30, 40, 50, 70, 90), unchanged),
}
"""The paper's text and figures ("paper"); the authors' `src/tame/metrics.py` ("reference")."""


DIRECTIONS = {"MoRF": True, "LeRF": False}
"""Orders of removal, and whether lower is better."""


class RoadScores(NamedTuple):
    """Scores of each image at each percentage, in [0, 1]."""

    morf: jax.Array  # [B, P]
    lerf: jax.Array  # [B, P]


def road(
    predict: Callable[[jax.Array], jax.Array],
    images: jax.Array,
    ranks: jax.Array,
    reverse_ranks: jax.Array,
    classes: jax.Array,
    indices: jax.Array,
    key: jax.Array,
    protocol: Protocol = PROTOCOLS["paper"],
) -> RoadScores:
    """Computes MoRF and LeRF of a batch of explained images; call it under `jax.jit`.

    One percentage of one order is imputed at a time for the whole batch, which keeps memory and
    compile time at those of a single imputation. The noise depends only on the key, the image's
    index and the percentage, so that scores depend neither on batches nor on devices.

    Args:
      predict: standardised images `[B, H, W, C]` -> probabilities `[B, num_classes]`.
      images: `[B, H, W, C]`, standardised.
      ranks: `relevance_rank(maps)`, int32 `[B, H, W]`, for maps at the size of the images.
      reverse_ranks: `relevance_rank(-maps)`.
      classes: int `[B]`, the explained classes.
      indices: int `[B]`, the images' indices in their data set.
      key: a typed key (`jax.random.key`), the same for all batches.
      protocol: percentages and score, one of `PROTOCOLS`.

    Raises:
      ValueError: the ranks do not have the size of the images.
    """
    if ranks.shape != images.shape[:3]:
        raise ValueError(
            f"resize the maps to the size of the images: got {ranks.shape} for {images.shape[:3]}"
        )
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
    percentages = jnp.array(protocol.percentages)
    counts = jnp.array([pixel_count(v, ranks[0].size) for v in protocol.percentages])

    def scores(ranks):
        def score(step):
            percentage, count = step
            imputed = remove_first(images, ranks, percentage, count, keys)
            return protocol.score(predict(imputed), classes)

        return jnp.moveaxis(lax.map(score, (percentages, counts)), 0, 1)

    return RoadScores(*lax.map(scores, jnp.stack([ranks, reverse_ranks])))


def remove_first(
    images: jax.Array, ranks: jax.Array, percentage: int, count: int, keys: jax.Array
) -> jax.Array:
    """Imputes the `count` pixels that rank first in each image.

    Args:
      images: `[B, H, W, C]`, standardised.
      ranks: int32 `[B, H, W]`, as `relevance_rank` returns.
      percentage: the share of these pixels in %; selects the noise.
      count: the number of pixels to impute.
      keys: one typed key per image, `[B]`.

    Returns:
      float32 `[B, H, W, C]`.
    """
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, percentage)
    return noisy_linear_imputation(images, ranks < count, keys)


class _Road(Metric):
    protocol: Protocol

    def measure(self, sample: Sample) -> dict[str, jax.Array]:
        scores = road(
            sample.predict,
            sample.standardised,
            sample.ranks,
            sample.reverse_ranks,
            sample.classes,
            sample.index,
            sample.key,
            self.protocol,
        )
        return {f"{self.name}_morf": scores.morf, f"{self.name}_lerf": scores.lerf}

    def summarise(self, rows: Rows) -> dict[str, dict[str, float]]:
        means = {
            order: 100 * rows[f"{self.name}_{order.lower()}"].mean(axis=0) for order in DIRECTIONS
        }
        return {
            order: {"mean": float(values.mean())} | by_percentage(self.protocol.percentages, values)
            for order, values in means.items()
        }

    def table_rows(self) -> list[TableRow]:
        return [
            TableRow(order, (self.key, order, "mean"), lower) for order, lower in DIRECTIONS.items()
        ]


class Road(_Road, name="road", key="ROAD"):
    table = "road"
    protocol = PROTOCOLS["paper"]


class RoadReference(_Road, name="road_reference", key="ROAD_REFERENCE"):
    table = "road_reference"
    protocol = PROTOCOLS["reference"]

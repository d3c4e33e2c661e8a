"""The energy-based pointing game: how much of a map's energy lies on the object.

Wang et al., "Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural Networks",
CVPR Workshops 2020, section 4.3.
"""

import jax
import jax.numpy as jnp

from ttame_jax.metrics.base import Metric, Sample


def energy_inside(maps: jax.Array, inside: jax.Array) -> jax.Array:
    """Returns the share of each map's sum that lies on the object, `[B]` in [0, 1].

    Args:
      maps: `[B, H, W]`, non-negative. A map of zeros has the share 0.
      inside: bool `[B, H, W]`, the pixels of the object. The result is NaN without any.
    """
    total = maps.sum((1, 2))
    share = jnp.where(inside, maps, 0).sum((1, 2)) / jnp.where(total > 0, total, 1)
    return jnp.where(inside.any((1, 2)), share, jnp.nan)


class Energy(Metric, name="energy"):
    table = "localisation"
    label = "Energy"
    lower_is_better = False
    needs = "inside"

    def measure(self, sample: Sample) -> dict[str, jax.Array]:
        return {self.name: energy_inside(sample.maps, sample.inside)}

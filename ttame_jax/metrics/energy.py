"""The energy-based pointing game: how much of a map's energy lies on the object.

Wang et al., "Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural Networks",
CVPR Workshops 2020, section 4.3.
"""

import jax
import jax.numpy as jnp

from ttame_jax.metrics.base import Metric, Sample


def energy_inside(maps: jax.Array, inside: jax.Array) -> jax.Array:
    """Returns the share of each map's sum that lies in the boxes, `[B]` in [0, 1].

    Args:
      maps: `[B, H, W]`, non-negative. A map of zeros has the share 0.
      inside: bool `[B, H, W]`, the pixels in any box. An image without such pixels has the share 0.
    """
    total = maps.sum((1, 2))
    return jnp.where(inside, maps, 0).sum((1, 2)) / jnp.where(total > 0, total, 1)


class Energy(Metric, name="energy"):
    table = "localisation"
    label = "Energy"
    lower_is_better = False
    needs_boxes = True

    def measure(self, sample: Sample) -> dict[str, jax.Array]:
        return {self.name: energy_inside(sample.maps, sample.inside)}

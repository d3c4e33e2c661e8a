"""The pointing game: whether a map's maximum lies on the object.

Zhang et al., "Top-down Neural Attention by Excitation Backprop", ECCV 2016, without the tolerance
of 15 pixels around the object.
"""

import jax
import jax.numpy as jnp

from ttame_jax.metrics.base import Metric, Sample


def hits(maps: jax.Array, inside: jax.Array) -> jax.Array:
    """Returns whether the maximum of each map lies in a box, bool `[B]`.

    Args:
      maps: `[B, H, W]`. The first of equal maxima counts, in row-major order.
      inside: bool `[B, H, W]`, the pixels in any box. An image without such pixels is a miss.
    """
    highest = maps.reshape(len(maps), -1).argmax(axis=1)
    flat = inside.reshape(len(inside), -1)
    return jnp.take_along_axis(flat, highest[:, None], axis=1)[:, 0]


class PointingGame(Metric, name="pointing"):
    table = "localisation"
    label = "Pointing game"
    lower_is_better = False
    needs_boxes = True

    def measure(self, sample: Sample) -> dict[str, jax.Array]:
        return {self.name: hits(sample.maps, sample.inside)}

"""The pointing game: whether a map's maximum lies on the object.

Zhang et al., "Top-down Neural Attention by Excitation Backprop", ECCV 2016, without the tolerance
of 15 pixels around the object.
"""

import jax
import jax.numpy as jnp

from ttame_jax.metrics.base import Metric, Sample


def hits(maps: jax.Array, inside: jax.Array) -> jax.Array:
    """Returns 1 where the maximum of a map lies on the object, 0 where it does not, `[B]`.

    Args:
      maps: `[B, H, W]`. The first of equal maxima counts, in row-major order.
      inside: bool `[B, H, W]`, the pixels of the object. The result is NaN without any.
    """
    highest = maps.reshape(len(maps), -1).argmax(axis=1)
    flat = inside.reshape(len(inside), -1)
    hit = jnp.take_along_axis(flat, highest[:, None], axis=1)[:, 0]
    return jnp.where(flat.any(axis=1), hit, jnp.nan)


class PointingGame(Metric, name="pointing"):
    table = "localisation"
    label = "Pointing game"
    lower_is_better = False
    needs = "inside"

    def measure(self, sample: Sample) -> dict[str, jax.Array]:
        return {self.name: hits(sample.maps, sample.inside)}

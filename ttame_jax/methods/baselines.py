"""Maps that do not look at the classifier: what a method must beat.

Choe et al., "Evaluating Weakly Supervised Object Localization Methods Right", CVPR 2020, has the
centred Gaussian; Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018, says why.
"""

import jax
import jax.numpy as jnp

from ttame_jax.backbones import Backbone
from ttame_jax.masking import min_max_scale
from ttame_jax.methods.base import Method


class CentredGaussian(Method, name="gaussian", title="Centred Gaussian"):
    """The same map for every image: photographs often have their object in the middle.

    Its standard deviation is a quarter of the image's side.
    """

    @property
    def forward_passes(self) -> int:
        return 0

    def __call__(self, images: jax.Array, classes: jax.Array) -> jax.Array:
        rows, columns = (jax.scipy.stats.norm.pdf(_places(side)) for side in images.shape[1:3])
        map_ = min_max_scale(rows[:, None] * columns)
        return jnp.broadcast_to(map_, (*classes.shape, *map_.shape))


def _places(side: int) -> jax.Array:
    """The pixels' distances from the middle in standard deviations, which are a quarter side."""
    return 4 * ((jnp.arange(side) + 0.5) / side - 0.5)


class RandomMap(Method, name="random", title="Random"):
    """Uniform noise on a coarse grid, different for every image and class.

    Args:
      backbone: the classifier.
      cells: height and width of the grid.
      seed: of the noise.

    Raises:
      ValueError: fewer than two cells.
    """

    def __init__(self, backbone: Backbone, cells: int = 7, seed: int = 0):
        super().__init__(backbone)
        if cells < 2:
            raise ValueError(f"{self.name} needs 2 cells or more, not {cells}")
        self.cells, self.seed = cells, seed

    @property
    def forward_passes(self) -> int:
        return 0

    def __call__(self, images: jax.Array, classes: jax.Array) -> jax.Array:
        def noise(image, class_id):
            bits = jax.lax.bitcast_convert_type(image.astype(jnp.float32), jnp.uint32)
            key = jax.random.fold_in(jax.random.key(self.seed), bits.sum(dtype=jnp.uint32))
            return jax.random.uniform(jax.random.fold_in(key, class_id), (self.cells, self.cells))

        maps = jax.vmap(jax.vmap(noise, (None, 0)))(images, classes)
        return min_max_scale(maps)

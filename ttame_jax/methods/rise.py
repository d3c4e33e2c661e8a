"""RISE (Petsiuk et al., BMVC 2018): random masks, weighted by the confidence they leave."""

import jax
import jax.numpy as jnp

from ttame_jax.backbones import Backbone
from ttame_jax.masking import min_max_scale
from ttame_jax.methods.base import Method, Recipe, checked_recipe, chunk_size
from ttame_jax.methods.interpolation import interpolate, mirrored

GRIDS = {"paper": (7, 0.5), "reference": (8, 0.1)}
"""Number of cells per side and the probability of keeping a cell: section 4 of the paper, and the
defaults of the authors' code."""


class RISE(Method, name="rise", title="RISE"):
    """The mean of random masks, weighted by the confidence in a class of the masked image.

    A mask is a coarse grid of zeros and ones, upsampled bilinearly and shifted at random by less
    than a cell. It multiplies the standardised image. All images share the same masks.

    Args:
      backbone: the classifier to explain.
      masks: number of masks; None is the backbone's `rise_masks`.
      recipe: a key of `GRIDS`.
      seed: of the masks.

    Raises:
      ValueError: fewer than one mask, or an unknown recipe.
    """

    def __init__(
        self,
        backbone: Backbone,
        masks: int | None = None,
        recipe: Recipe = "paper",
        seed: int = 0,
    ):
        super().__init__(backbone)
        if masks is not None and masks < 1:
            raise ValueError(f"{self.name} needs 1 mask or more, not {masks}")
        self.masks = masks or backbone.rise_masks
        self.cells, self.probability = GRIDS[checked_recipe(self.name, recipe)]
        self.seed = seed

    @property
    def forward_passes(self) -> int:
        return self.masks

    def __call__(self, images: jax.Array, classes: jax.Array) -> jax.Array:
        images = self.backbone.preprocessing.standardise(images)
        size = chunk_size(self.masks, images.shape[0])

        def add(total, chunk):  # [B, K, H, W], mask numbers [c]
            masks = self.random_masks(chunk, images.shape[1:3])
            masked = masks[:, None, ..., None].astype(images.dtype) * images
            logits, _ = self.backbone(masked.reshape(-1, *images.shape[1:]))
            self.report(size)
            probabilities = jax.nn.softmax(logits).reshape(*masked.shape[:2], -1)
            confidence = jnp.take_along_axis(probabilities, classes[None], axis=-1)
            return total + jnp.einsum("cbk,chw->bkhw", confidence, masks), None

        total = jnp.zeros((*classes.shape, *images.shape[1:3]))
        chunks = jnp.arange(self.masks).reshape(-1, size)
        return min_max_scale(jax.lax.scan(add, total, chunks)[0])

    def random_masks(self, numbers: jax.Array, size: tuple[int, ...]) -> jax.Array:
        """The masks with the given numbers ``[N]``, each with its own key: ``[N, *size]``."""
        cells = self.cells
        cell = [-(-side // cells) for side in size]
        places = [mirrored(cells, (cells + 1) * side) for side in cell]

        def mask(number):
            key = jax.random.fold_in(jax.random.key(self.seed), number)
            grid_key, shift_key = jax.random.split(key)
            grid = jax.random.bernoulli(grid_key, self.probability, (cells, cells))
            shift = jax.random.randint(shift_key, (2,), 0, jnp.array(cell))
            return jax.lax.dynamic_slice(interpolate(grid.astype(float), *places), shift, size)

        return jax.vmap(mask)(numbers)

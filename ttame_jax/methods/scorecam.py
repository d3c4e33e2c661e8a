"""Score-CAM (Wang et al., CVPR Workshops 2020): channels as masks of the image."""

import jax
import jax.numpy as jnp

from ttame_jax.backbones import Backbone
from ttame_jax.masking import min_max_scale, upsample
from ttame_jax.methods.base import Recipe, checked_recipe, chunk_size
from ttame_jax.methods.cam import CAM
from ttame_jax.methods.interpolation import aligned, interpolate


class ScoreCAM(CAM, name="scorecam", title="Score-CAM"):
    """Weighs channels by a softmax over channels of the logit of the masked image.

    The mask is the channel, scaled to [0, 1] and resized to the image. It multiplies the
    standardised image.

    Args:
      backbone: the classifier to explain.
      layer: as for `CAM`.
      recipe: ``"paper"`` upsamples with half-pixel centres, as the authors' code does;
        ``"reference"`` with aligned corners, as pytorch-grad-cam does.
    """

    def __init__(
        self,
        backbone: Backbone,
        layer: str | None = None,
        recipe: Recipe = "paper",
    ):
        super().__init__(backbone, layer)
        self.recipe = checked_recipe(self.name, recipe)

    @property
    def forward_passes(self) -> int:
        return 1 + self.channels

    def __call__(self, images: jax.Array, classes: jax.Array) -> jax.Array:
        images = self.backbone.preprocessing.standardise(images)
        output, *_ = self.split()[0](images)
        channels = jnp.moveaxis(self.backbone.feature_map(output), -1, 0)  # [C, B, h, w]

        def score(channels):  # [c, B, h, w] -> [c, B, K]
            masks = min_max_scale(self.upsample(channels, images.shape[1:3]))
            masked = masks[..., None].astype(images.dtype) * images
            logits, _ = self.backbone(masked.reshape(-1, *images.shape[1:]))
            self.report(len(channels))
            logits = logits.reshape(*masks.shape[:2], -1)
            return jnp.take_along_axis(logits, classes[None], axis=-1)

        size = chunk_size(len(channels), images.shape[0])
        scores = jax.lax.map(score, channels.reshape(-1, size, *channels.shape[1:]))
        scores = scores.reshape(-1, *classes.shape)  # [C, B, K]
        return self.combine(
            self.activations(output), jnp.moveaxis(jax.nn.softmax(scores, axis=0), 0, -1)
        )

    def upsample(self, maps: jax.Array, size: tuple[int, ...]) -> jax.Array:
        if self.recipe == "paper":
            return upsample(maps, size)
        return interpolate(maps, *map(aligned, maps.shape[-2:], size))

"""T-TAME and L-CAM-Img: a trained attention mechanism as an explanation method."""

from collections.abc import Sequence

import jax

from ttame_jax.attention import AttentionMechanism
from ttame_jax.backbones import Backbone
from ttame_jax.methods.base import Method


class TrainedMethod(Method):
    """The maps of an attention mechanism of any variant, in one forward pass.

    Args:
      backbone: the classifier to explain.
      attention: the mechanism trained on its feature maps.
    """

    forward_passes = 1

    def __init__(self, backbone: Backbone, attention: AttentionMechanism):
        super().__init__(backbone)
        self.attention = attention
        self.name = attention.variant

    def __call__(self, images: jax.Array, classes: jax.Array) -> jax.Array:
        _, features = self.backbone(self.backbone.preprocessing.standardise(images))
        return self.explain_features(images, features, classes)

    def explain_features(
        self, images: jax.Array, features: Sequence[jax.Array], classes: jax.Array
    ) -> jax.Array:
        return self.attention.explanation_maps(self.attention(features, classes))


class LCAM(TrainedMethod, name="lcam", title="L-CAM-Img"):
    """L-CAM-Img (Gkartzonika, Gkalelis and Mezaris, ECCV Workshops 2022), trained as T-TAME is."""


class TTAME(TrainedMethod, name="ttame", title="T-TAME"):
    """T-TAME (Ntrougkas, Gkalelis and Mezaris, IEEE Access 2024)."""

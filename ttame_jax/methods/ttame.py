"""T-TAME and L-CAM-Img: a trained attention mechanism as an explanation method."""

import jax

from ttame_jax.attention import AttentionMechanism
from ttame_jax.backbones import Backbone
from ttame_jax.explainer import explain
from ttame_jax.methods.base import Method


class TTAME(Method):
    """The maps of an attention mechanism trained for this backbone, in one forward pass."""

    forward_passes = 1

    def __init__(self, backbone: Backbone, attention: AttentionMechanism):
        super().__init__(backbone)
        self.attention = attention
        self.name = attention.variant

    def __call__(self, images: jax.Array, classes: jax.Array) -> jax.Array:
        return explain(self.backbone, self.attention, images, classes).maps

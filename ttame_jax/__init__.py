"""T-TAME: explanation maps for frozen image classifiers in one forward pass."""

from ttame_jax.attention import AttentionMechanism
from ttame_jax.backbones import Backbone, Preprocessing, list_backbones, load_backbone
from ttame_jax.explainer import Explainer, Explanation, load_explainer

__all__ = [
    "AttentionMechanism",
    "Backbone",
    "Explainer",
    "Explanation",
    "Preprocessing",
    "list_backbones",
    "load_backbone",
    "load_explainer",
]

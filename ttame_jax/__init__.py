"""T-TAME: explanation maps for frozen image classifiers in one forward pass."""

from ttame_jax.attention import AttentionMechanism
from ttame_jax.backbones import Backbone
from ttame_jax.data import UnreadableImage, preprocess
from ttame_jax.explainer import Explainer
from ttame_jax.explaining import explain
from ttame_jax.explanation import Explanation
from ttame_jax.methods import TTAME, Explanations, Method, list_methods, load_method
from ttame_jax.pictures import heatmap, overlay
from ttame_jax.preprocessing import Preprocessing
from ttame_jax.runs import load_explainer
from ttame_jax.weights import list_backbones, load_backbone, save_backbone

__all__ = [
    "TTAME",
    "AttentionMechanism",
    "Backbone",
    "Explainer",
    "Explanation",
    "Explanations",
    "Method",
    "Preprocessing",
    "UnreadableImage",
    "explain",
    "heatmap",
    "list_backbones",
    "list_methods",
    "load_backbone",
    "load_explainer",
    "load_method",
    "overlay",
    "preprocess",
    "save_backbone",
]

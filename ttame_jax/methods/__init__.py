"""Explanation methods behind one interface."""

from ttame_jax.methods.ablationcam import AblationCAM
from ttame_jax.methods.base import Method, explain
from ttame_jax.methods.gradcam import GradCAM, GradCAMPlusPlus
from ttame_jax.methods.iia import IIA
from ttame_jax.methods.registry import list_methods, load_method
from ttame_jax.methods.rise import RISE
from ttame_jax.methods.scorecam import ScoreCAM
from ttame_jax.methods.transformer_lrp import TransformerLRP
from ttame_jax.methods.ttame import TTAME

__all__ = [
    "IIA",
    "RISE",
    "TTAME",
    "AblationCAM",
    "GradCAM",
    "GradCAMPlusPlus",
    "Method",
    "ScoreCAM",
    "TransformerLRP",
    "explain",
    "list_methods",
    "load_method",
]

"""Explanation methods behind one interface."""

# A method registers itself when it is imported. The order is that of the paper's tables.
# isort: off
from ttame_jax.methods.base import Explanations, Method, compute_maps
from ttame_jax.methods.gradcam import GradCAM, GradCAMPlusPlus
from ttame_jax.methods.layercam import LayerCAM
from ttame_jax.methods.scorecam import ScoreCAM
from ttame_jax.methods.ablationcam import AblationCAM
from ttame_jax.methods.rise import RISE
from ttame_jax.methods.transformer_lrp import TransformerLRP
from ttame_jax.methods.attnlrp import AttnLRP
from ttame_jax.methods.libragrad import LibraGrad
from ttame_jax.methods.iia import IIA
from ttame_jax.methods.integrated_gradients import IntegratedGradients
from ttame_jax.methods.ttame import LCAM, TTAME
from ttame_jax.methods.baselines import CentredGaussian, RandomMap
from ttame_jax.methods.registry import list_methods, load_method, method_title
# isort: on

__all__ = [
    "IIA",
    "LCAM",
    "RISE",
    "TTAME",
    "AblationCAM",
    "AttnLRP",
    "CentredGaussian",
    "Explanations",
    "GradCAM",
    "GradCAMPlusPlus",
    "IntegratedGradients",
    "LayerCAM",
    "LibraGrad",
    "Method",
    "RandomMap",
    "ScoreCAM",
    "TransformerLRP",
    "compute_maps",
    "list_methods",
    "load_method",
    "method_title",
]

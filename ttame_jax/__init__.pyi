"""T-TAME: explanation maps for frozen image classifiers in one forward pass."""

from .adapters import from_equinox, from_keras, from_linen, from_nnx
from .attention import AttentionMechanism
from .backbones import Backbone, FunctionBackbone
from .data import UnreadableImage, preprocess
from .explainer import Explainer
from .explaining import explain
from .explanation import Explanation
from .methods import TTAME, Explanations, Method, list_methods, load_method
from .pictures import heatmap, overlay
from .preprocessing import Preprocessing
from .runs import load_explainer
from .weights import list_backbones, load_backbone, save_backbone

__all__ = [
    "TTAME",
    "AttentionMechanism",
    "Backbone",
    "Explainer",
    "Explanation",
    "Explanations",
    "FunctionBackbone",
    "Method",
    "Preprocessing",
    "UnreadableImage",
    "explain",
    "from_equinox",
    "from_keras",
    "from_linen",
    "from_nnx",
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

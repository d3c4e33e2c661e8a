"""Methods by name."""

import inspect

from ttame_jax.attention import VARIANTS, AttentionMechanism
from ttame_jax.backbones import Backbone
from ttame_jax.methods.ablationcam import AblationCAM
from ttame_jax.methods.base import Method
from ttame_jax.methods.gradcam import GradCAM, GradCAMPlusPlus
from ttame_jax.methods.iia import IIA
from ttame_jax.methods.rise import RISE
from ttame_jax.methods.scorecam import ScoreCAM
from ttame_jax.methods.transformer_lrp import TransformerLRP
from ttame_jax.methods.ttame import TTAME

_METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (GradCAM, GradCAMPlusPlus, ScoreCAM, AblationCAM, RISE, TransformerLRP, IIA)
}
TRAINED = ("lcam", "ttame")
"""Methods that are an attention mechanism trained for the backbone."""


def list_methods() -> list[str]:
    """All names that `load_method` knows, as the columns of the paper's tables."""
    return [*_METHODS, *TRAINED]


def load_method(
    name: str,
    backbone: Backbone,
    attention: AttentionMechanism | None = None,
    **config: int | str,
) -> Method:
    """An explanation method for a backbone.

    Args:
      name: one of `list_methods()`, or another variant of the attention mechanism.
      backbone: the classifier to explain.
      attention: the mechanism trained for it, for methods that are trained.
      **config: options of the method's class, such as ``layer`` of the CAM methods.

    Raises:
      ValueError: for an unknown method or option, or one that does not apply to the backbone.
    """
    if name in _METHODS:
        method = _METHODS[name]
        options = list(inspect.signature(method.__init__).parameters)[2:]  # not self, backbone
        if unknown := config.keys() - options:
            raise ValueError(
                f"{name} has no option {', '.join(sorted(unknown))}; it has {', '.join(options)}"
            )
        return method(backbone, **config)
    if config:
        raise ValueError(f"{name} has no options, not {', '.join(config)}")
    if attention is not None and attention.variant == name:
        return TTAME(backbone, attention)
    if name in VARIANTS:
        trained = f"a run of variant {attention.variant!r}" if attention else "no run"
        raise ValueError(
            f"the method {name!r} needs an attention mechanism of that variant, and this is "
            f"{trained}: train one with --variant {name}"
        )
    raise ValueError(f"unknown method {name!r}; there are {', '.join(list_methods())}")

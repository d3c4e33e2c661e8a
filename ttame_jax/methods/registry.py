"""Methods by name."""

import inspect
import typing

from ttame_jax.attention import VARIANTS, AttentionMechanism
from ttame_jax.backbones import Backbone
from ttame_jax.checks import accepts
from ttame_jax.methods.base import REGISTERED, Method
from ttame_jax.methods.ttame import TrainedMethod


def list_methods() -> list[str]:
    """All names that `load_method` knows, in the order of the paper's tables."""
    return list(REGISTERED)


def method_title(name: str) -> str:
    """The name of a method in tables and figures; other names are returned unchanged.

    A dash separates the name of a method from that of a run: ``ttame-seed_1`` is "T-TAME, seed_1".
    """
    method, dash, run = name.partition("-")
    if method not in REGISTERED:
        return name
    return f"{REGISTERED[method].title}, {run}" if dash else REGISTERED[method].title


def load_method(
    name: str,
    backbone: Backbone,
    attention: AttentionMechanism | None = None,
    **config: float | str,
) -> Method:
    """Loads an explanation method for a backbone.

    Args:
      name: one of `list_methods()`, or another variant of the attention mechanism.
      backbone: the classifier to explain.
      attention: the mechanism trained for it, for the methods that are trained.
      **config: options of the method's class, such as ``layer`` of the CAM methods.

    Raises:
      ValueError: unknown method or option, or one that does not apply to the backbone.
    """
    method = REGISTERED.get(name)
    if method is not None and not issubclass(method, TrainedMethod):
        options = list(inspect.signature(method.__init__).parameters)[2:]  # not self, backbone
        if unknown := config.keys() - options:
            raise ValueError(
                f"{name} has no option {', '.join(sorted(unknown))}; it has {', '.join(options)}"
            )
        hints = typing.get_type_hints(method.__init__)
        for option, value in config.items():
            chosen = typing.get_origin(hints[option]) is typing.Literal  # the method names these
            if not chosen and not accepts(hints[option], value):
                raise ValueError(f"{option} of {name} cannot be {value!r}")
        return method(backbone, **config)
    if name not in VARIANTS:
        raise ValueError(f"unknown method {name!r}; there are {', '.join(list_methods())}")
    if config:
        raise ValueError(f"{name} has no options, not {', '.join(config)}")
    if attention is None or attention.variant != name:
        trained = f"a run of variant {attention.variant!r}" if attention else "no run"
        raise ValueError(
            f"the method {name!r} needs an attention mechanism of that variant, and this is "
            f"{trained}: train one with --variant {name}"
        )
    return (method or TrainedMethod)(backbone, attention)

"""The PyTorch module of a backbone: how torchvision or timm builds it, and its feature maps."""

from typing import Any

from ttame_jax.backbones import Backbone, family_of
from ttame_jax.backbones.family import Call
from ttame_jax.weights.backbones import TIMM
from ttame_jax.weights.transfer import layouts


def libraries(backbone: Backbone) -> list[str]:
    """The libraries that have a module of this backbone: torchvision, timm, both or none."""
    return [library for library in family_of(backbone).libraries if _call(backbone, library)]


def module_config(backbone: Backbone, library: str) -> dict[str, Any]:
    """How a library builds the backbone, with its input and its feature maps.

    Returns:
      A dict (JSON) of library, model and options (the call), nodes (names of the modules whose
      outputs are the feature maps), channels_last (whether those are [B, H, W, C]),
      prefix_tokens (tokens of a ViT before its patches), image_size, mean and std.

    Raises:
      ValueError: the library has no such model.
    """
    call = _call(backbone, library)
    if call is None:
        known = " or ".join(libraries(backbone)) or "neither torchvision nor timm"
        raise ValueError(f"{library} has no model of {backbone.name}; {known} has")
    model, options = call
    record = family_of(backbone).libraries[library]
    return {
        "library": library,
        "model": model,
        "options": options,
        "nodes": record.feature_nodes(backbone),
        "channels_last": record.channels_last,
        "prefix_tokens": backbone.prefix_tokens,
        "image_size": backbone.preprocessing.image_size,
        "mean": list(backbone.preprocessing.mean),
        "std": list(backbone.preprocessing.std),
    }


def _call(backbone: Backbone, library: str) -> Call | None:
    """The library's function or model name, and its arguments."""
    if library not in layouts(backbone):
        return None
    record, name = family_of(backbone).libraries[library], backbone.name
    call: Call | None
    if library == "timm" and name.startswith(TIMM):
        call = name.removeprefix(TIMM), {}
    elif name in record.models:
        call = record.models[name].partition(".")[0], {}  # without the tag of timm's weights
    else:
        call = record.build(backbone)
    if call is None:
        return None
    model, options = call
    return model, {"num_classes": backbone.num_classes, **record.options(backbone), **options}

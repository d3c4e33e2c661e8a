"""Which PyTorch module is which backbone: how torchvision or timm build it, and where in it the
feature maps are."""

from typing import Any

from ttame_jax.backbones import Backbone
from ttame_jax.backbones.registry import TIMM as TIMM_NAME
from ttame_jax.backbones.vit import Variant as ViTVariant

from .pretrained import TIMM, TORCHVISION
from .weights import layouts


def libraries(backbone: Backbone) -> list[str]:
    """The libraries that have a module of this backbone: torchvision, timm, both or none."""
    return [library for library in ("torchvision", "timm") if _build(backbone, library)]


def module_config(backbone: Backbone, library: str) -> dict[str, Any]:
    """How a library builds the backbone, and what it says of the input and the feature maps.

    Returns:
      a dict (JSON) of library, model and options (the call), nodes (names of the modules whose
      outputs are the feature maps), prefix_tokens (tokens of a ViT before its patches), mean
      and std.

    Raises:
      ValueError: the library has no such model.
    """
    build = _build(backbone, library)
    if build is None:
        known = " or ".join(libraries(backbone)) or "neither torchvision nor timm"
        raise ValueError(f"{library} has no model of {backbone.name}; {known} has")
    model, options = build
    return {
        "library": library,
        "model": model,
        "options": options,
        "nodes": nodes(backbone, library),
        "prefix_tokens": getattr(backbone, "prefix", 0),
        "image_size": backbone.preprocessing.image_size,
        "mean": list(backbone.preprocessing.mean),
        "std": list(backbone.preprocessing.std),
    }


def _build(backbone: Backbone, library: str) -> tuple[str, dict[str, Any]] | None:
    """The library's function or model name, and its arguments."""
    if library not in layouts(backbone):
        return None
    name, options = backbone.name, {"num_classes": backbone.num_classes}
    is_vit = type(backbone).__name__ == "ViT"
    if is_vit:
        size_option = "image_size" if library == "torchvision" else "img_size"
        options[size_option] = backbone.preprocessing.image_size
    if library == "torchvision" and name in TORCHVISION:
        return TORCHVISION[name], options
    if library == "timm" and name.startswith(TIMM_NAME):
        return name.removeprefix(TIMM_NAME), options
    if library == "timm" and name in TIMM:
        return TIMM[name].partition(".")[0], options
    if not is_vit or not _is_original(backbone):
        return None
    variant = backbone.variant
    if library == "torchvision":
        return "VisionTransformer", {
            **options,
            "patch_size": variant.patch_size,
            "num_layers": variant.depth,
            "num_heads": variant.num_heads,
            "hidden_dim": variant.width,
            "mlp_dim": variant.mlp_width or 4 * variant.width,
        }
    return "vit_small_patch16_224", {
        **options,
        "patch_size": variant.patch_size,
        "embed_dim": variant.width,
        "depth": variant.depth,
        "num_heads": variant.num_heads,
    }


def _is_original(backbone: Backbone) -> bool:
    """Whether it is the original ViT in all but its sizes, so that both libraries have it."""
    variant, original = backbone.variant, ViTVariant()
    fields = ("activation", "epsilon", "pool", "embed_prefix")
    return all(getattr(variant, field) == getattr(original, field) for field in fields)


def nodes(backbone: Backbone, library: str) -> list[str]:
    """Names of the modules whose outputs are the feature maps, earliest first."""
    family = type(backbone).__name__
    if family == "ResNet":
        return ["layer2", "layer3", "layer4"]
    if family == "ViT":
        block, norm = {
            "torchvision": ("encoder.layers.encoder_layer_{}", ".ln_1"),
            "timm": ("blocks.{}", ".norm1"),
        }[library]
        suffix = norm if backbone.features == "norm" else ""
        depth = backbone.variant.depth
        return [block.format(i) + suffix for i in range(max(depth - 3, 0), depth)]
    if family == "SqueezeNet":
        pools, index = [], 2  # a max-pool begins each stage
        for stage in backbone.stages:
            pools.append(index)
            index += 1 + len(stage)
        return [f"features.{i}" for i in (*pools[1:], index - 1)]
    pools, index = [], -1  # a max-pool ends each stage of a VGG
    layers = 3 if backbone.variant.batch_norm else 2  # of a block
    for depth in backbone.variant.depths:
        index += layers * depth + 1
        pools.append(index)
    return [f"features.{i - (backbone.features == 'conv')}" for i in pools[-3:]]


def reference_nodes(backbone: Backbone) -> list[str]:
    """The same as nodes of the graph that torchvision traces, as the authors' code names them."""
    names = nodes(backbone, "torchvision")
    if type(backbone).__name__ != "ViT":
        return names
    if backbone.features == "norm":
        return [name.replace(".ln_1", ".ln") for name in names]
    return [f"{name}.add_1" for name in names]  # the second sum of the block is its output

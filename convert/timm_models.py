"""timm's models by name: what they are made of, read from the module that timm itself builds."""

from collections.abc import Iterator
from typing import Any

from .files import INSTALL
from .torch_import import import_torchvision

LAYERS = {
    "VGG": "ConvMlp ClassifierHead MaxPool2d Dropout",
    "ResNet": "BasicBlock Bottleneck MaxPool2d AvgPool2d",
    "VisionTransformer": "PatchEmbed Block Attention Mlp LayerNorm LayerScale GELU QuickGELU "
    "Dropout DropPath",
}
"""What timm's modules may be made of to be built here, besides what all of them share."""

SHARED = "Sequential Identity Conv2d Linear BatchNorm2d ReLU SelectAdaptivePool2d "
SHARED += "AdaptiveAvgPool2d FastAdaptiveAvgPool2d Flatten"


def create(model: str, num_classes: int | None = None, device: str = "cpu", **options: Any):
    """timm's module of a model, without weights, in inference mode.

    On the device "meta" it has shapes and no values.

    Raises:
      ValueError: timm knows no such model.
      ImportError: timm is not installed.
    """
    try:
        import_torchvision()
        import timm
        import torch
    except ImportError:
        raise ImportError(f"the architecture of timm:{model} needs timm: {INSTALL}") from None
    if num_classes is not None:
        options["num_classes"] = num_classes
    if not timm.is_model(model):
        raise ValueError(
            f"timm {timm.__version__} has no model {model!r}: timm.list_models() names them"
        )
    with torch.device(device):
        return timm.create_model(model, **options).eval()


def describe(model: str, num_classes: int | None = None) -> dict[str, Any]:
    """The config with which `load_backbone` builds a model of timm's.

    Args:
      model: its name, with or without its tag.
      num_classes: another number of classes than the model's own.

    Returns:
      num_classes, preprocessing (the pretrained config's) and architecture: the family's class
      and the fields of its `Variant`.

    Raises:
      ValueError: a model that cannot be built here, with the reason.
      ImportError: timm is not installed.
    """
    return read(create(model, num_classes, device="meta"), f"timm:{model}")


def read(module, name: str) -> dict[str, Any]:
    """What `describe` returns, from timm's module (an abstract one will do)."""
    family = type(module).__name__
    reasons = list(_reasons(module))
    if not reasons:
        config = {
            "num_classes": module.num_classes,
            "preprocessing": preprocessing(module.pretrained_cfg),
            "architecture": _FAMILIES[family](module),
        }
        if family == "VisionTransformer":
            config["image_size"] = module.patch_embed.img_size[0]
        reasons = list(_differences(name, config, module))
    if reasons:
        raise ValueError(
            f"{name} is not supported: it {', it '.join(reasons)} "
            "(VGGs, ResNets and plain ViTs are)"
        )
    return config


def preprocessing(pretrained: dict[str, Any]) -> dict[str, Any]:
    """Fields of `Preprocessing` from a pretrained config of timm's."""
    image_size = pretrained["input_size"][-1]
    return {
        "image_size": image_size,
        "resize_size": int(image_size / pretrained["crop_pct"]),
        "interpolation": pretrained["interpolation"],
        "mean": pretrained["mean"],
        "std": pretrained["std"],
    }


def _reasons(module) -> Iterator[str]:
    """Why a module of timm's is none that is built here."""
    family = type(module).__name__
    if family not in LAYERS:
        yield f"is a {family}"
        return
    known = {family, *LAYERS[family].split(), *SHARED.split()}
    others = sorted({type(layer).__name__ for layer in module.modules()} - known)
    if others:
        yield f"has {', '.join(others)}"
    if not module.num_classes:
        yield "has no classifier (give it num_classes, and weights that have one)"
    if family == "ResNet" and type(module.maxpool).__name__ != "MaxPool2d":
        yield f"pools its stem by {type(module.maxpool).__name__}"
    if family == "VisionTransformer":
        if module.global_pool not in _POOLS or module.pool_include_prefix:
            yield f"pools its tokens by {module.global_pool!r}"
        if module.pos_embed is None:
            yield "has no position embeddings"


def _differences(name: str, config: dict[str, Any], module) -> Iterator[str]:
    """What the module has that the backbone built from its description lacks, and vice versa."""
    from flax import nnx

    from ttame_jax.backbones import load_backbone

    from .weights import shapes

    ours = shapes(nnx.eval_shape(lambda: load_backbone(name, **config)), "timm")
    theirs = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    different = sorted(k for k in {*ours, *theirs} if ours.get(k) != theirs.get(k))
    if different:
        yield f"differs in {different[0]} and {len(different) - 1} other tensors"


def _vgg(module) -> dict[str, Any]:
    depths = [0]
    for layer in module.features:
        if type(layer).__name__ == "Conv2d":
            depths[-1] += 1
        elif type(layer).__name__ == "MaxPool2d":
            depths.append(0)
    return {"family": "VGG", "depths": depths[:-1], "batch_norm": module.use_norm}


def _resnet(module) -> dict[str, Any]:
    layers = (module.layer1, module.layer2, module.layer3, module.layer4)
    block = layers[0][0]
    stem = [module.conv1] if hasattr(module.conv1, "weight") else module.conv1
    architecture = {
        "family": "ResNet",
        "block": type(block).__name__.lower().removesuffix("block"),
        "depths": [len(layer) for layer in layers],
        "widths": [layer[0].bn2.num_features for layer in layers],
        "stem": [layer.out_channels for layer in stem if hasattr(layer, "out_channels")],
        "average_down": len(layers[1][0].downsample) == 3,
    }
    if hasattr(block, "conv3"):
        groups, expansion = block.conv2.groups, block.expansion
        architecture["widths"] = [layer[0].conv3.out_channels // expansion for layer in layers]
        architecture["groups"] = groups
        width = architecture["widths"][0]
        architecture["base_width"] = 64 * block.conv2.out_channels // groups // width
    return architecture


_POOLS = {"token": "token", "avg": "average"}


def _vit(module) -> dict[str, Any]:
    block = module.blocks[0]
    return {
        "family": "ViT",
        "patch_size": module.patch_embed.patch_size[0],
        "width": module.embed_dim,
        "depth": len(module.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_width": block.mlp.fc1.out_features,
        "activation": "quick_gelu" if type(block.mlp.act).__name__ == "QuickGELU" else "gelu",
        "epsilon": block.norm1.eps,
        "qkv_bias": block.attn.qkv.bias is not None,
        "patch_bias": module.patch_embed.proj.bias is not None,
        "class_token": module.cls_token is not None,
        "registers": module.num_reg_tokens,
        "embed_prefix": not module.no_embed_class,
        "pre_norm": type(module.norm_pre).__name__ == "LayerNorm",
        "layer_scale": type(block.ls1).__name__ == "LayerScale",
        "pool": _POOLS[module.global_pool],
        "norm_after_pool": type(module.fc_norm).__name__ == "LayerNorm",
    }


_FAMILIES = {"VGG": _vgg, "ResNet": _resnet, "VisionTransformer": _vit}

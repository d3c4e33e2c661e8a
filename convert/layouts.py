"""Which PyTorch tensor is which Flax parameter: one table per family and layout.

A table is a list of `Entry(torch_key, flax_path, transform)`, read in both directions by
`convert.weights`. The tables follow the structure of the given module (depths, BatchNorm or
not), so that every variant of a family shares one.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple


class Transform(NamedTuple):
    """A reordering of values between the two layouts; each direction undoes the other."""

    to_flax: Callable[[Any], Any]
    to_torch: Callable[[Any], Any]


class Entry(NamedTuple):
    """A tensor under both names. Without a Flax path the module here does not hold it: it is
    known, ignored, and written as zero."""

    torch_key: str
    flax_path: str | None
    transform: Transform


Table = list[Entry]

SAME = Transform(lambda x: x, lambda x: x)
LINEAR = Transform(lambda x: x.transpose(1, 0), lambda x: x.transpose(1, 0))  # OI <-> IO
CONV = Transform(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # OIHW, HWIO
# timm writes a linear layer as a 1x1 convolution: OI11 <-> IO.
LINEAR_AS_CONV = Transform(
    lambda x: x.reshape(x.shape[:2]).transpose(1, 0),
    lambda x: x.transpose(1, 0).reshape(*x.shape[::-1], 1, 1),
)
# A linear layer on a flattened grid of 7x7: channels are outermost in PyTorch, innermost here.
GRID = 7
GRID_AS_CONV = Transform(
    lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
    lambda x: x.reshape(GRID, GRID, -1, x.shape[-1]).transpose(3, 2, 0, 1),
)
GRID_LINEAR = Transform(
    lambda x: GRID_AS_CONV.to_flax(x.reshape(x.shape[0], -1, GRID, GRID)),
    lambda x: GRID_AS_CONV.to_torch(x).reshape(x.shape[-1], -1),
)


def weights(torch: str, flax: str, transform: Transform, bias: bool = True) -> Table:
    """A convolution or linear layer."""
    table = [Entry(f"{torch}.weight", f"{flax}.kernel", transform)]
    return table + [Entry(f"{torch}.bias", f"{flax}.bias", SAME)] * bias


def layer_norm(torch: str, flax: str) -> Table:
    names = {"weight": "scale", "bias": "bias"}
    return [Entry(f"{torch}.{t}", f"{flax}.{f}", SAME) for t, f in names.items()]


def batch_norm(torch: str, flax: str) -> Table:
    names = {"running_mean": "mean", "running_var": "var", "num_batches_tracked": "count"}
    statistics = [Entry(f"{torch}.{t}", f"{flax}.{f}", SAME) for t, f in names.items()]
    return layer_norm(torch, flax) + statistics


def _vgg_features(backbone) -> Table:
    table, index = [], 0  # index in PyTorch's flat list of convolutions, norms, ReLUs and pools
    for i, stage in enumerate(backbone.stages):
        for j, block in enumerate(stage):
            table += weights(f"features.{index}", f"stages.{i}.{j}.conv", CONV)
            index += 1
            if block.norm is not None:
                table += batch_norm(f"features.{index}", f"stages.{i}.{j}.norm")
                index += 1
            index += 1
        index += 1
    return table


def _vgg_torchvision(backbone) -> Table:
    return (
        _vgg_features(backbone)
        + weights("classifier.0", "fc1", GRID_LINEAR)
        + weights("classifier.3", "fc2", LINEAR)
        + weights("classifier.6", "head", LINEAR)
    )


def _vgg_timm(backbone) -> Table:
    return (
        _vgg_features(backbone)
        + weights("pre_logits.fc1", "fc1", GRID_AS_CONV)
        + weights("pre_logits.fc2", "fc2", LINEAR_AS_CONV)
        + weights("head.fc", "head", LINEAR)
    )


def _resnet_torchvision(backbone) -> Table:
    return _resnet(backbone, "conv1", "bn1", "downsample.0", "downsample.1")


def _resnet_timm(backbone) -> Table:
    # A stem of several convolutions is one flat list: convolution, norm, ReLU, convolution, ...
    table = []
    for i in range(len(backbone.stem)):
        table += weights(f"conv1.{3 * i}", f"stem.{i}.conv", CONV, bias=False)
        table += batch_norm(f"conv1.{3 * i + 1}", f"stem.{i}.bn")
    last = f"conv1.{3 * len(backbone.stem)}" if backbone.stem else "conv1"
    pooled = int(backbone.variant.average_down)  # pooling comes first in the shortcut's list
    downsample = (f"downsample.{pooled}", f"downsample.{pooled + 1}")
    return table + _resnet(backbone, last, "bn1", *downsample)


def _resnet(backbone, conv1: str, bn1: str, down_conv: str, down_norm: str) -> Table:
    table = weights(conv1, "conv1", CONV, bias=False) + batch_norm(bn1, "bn1")
    for i, layer in enumerate(backbone.layers, 1):
        for j, block in enumerate(layer):
            torch, flax = f"layer{i}.{j}", f"layers.{i - 1}.{j}"
            for k in range(1, 1 + block.num_convs):
                table += weights(f"{torch}.conv{k}", f"{flax}.conv{k}", CONV, bias=False)
                table += batch_norm(f"{torch}.bn{k}", f"{flax}.bn{k}")
            if block.downsample is not None:
                flax = f"{flax}.downsample"
                table += weights(f"{torch}.{down_conv}", f"{flax}.conv", CONV, bias=False)
                table += batch_norm(f"{torch}.{down_norm}", f"{flax}.bn")
    return table + weights("fc", "fc", LINEAR)


def _squeezenet(backbone) -> Table:
    table, index = weights("features.0", "stem", CONV), 2  # 1 is a ReLU
    for i, stage in enumerate(backbone.stages):
        index += 1  # a max-pool
        for j in range(len(stage)):
            for part in ("squeeze", "expand1x1", "expand3x3"):
                table += weights(f"features.{index}.{part}", f"stages.{i}.{j}.{part}", CONV)
            index += 1
    return table + weights("classifier.1", "head", CONV)


def _vit_torchvision(backbone) -> Table:
    table = [
        Entry("class_token", "cls_token", SAME),
        Entry("encoder.pos_embedding", "pos_embed", SAME),
        *weights("conv_proj", "patch_embed", CONV),
    ]
    for i in range(len(backbone.blocks)):
        torch, flax = f"encoder.layers.encoder_layer_{i}", f"blocks.{i}"
        table += [
            *layer_norm(f"{torch}.ln_1", f"{flax}.norm1"),
            Entry(f"{torch}.self_attention.in_proj_weight", f"{flax}.attn.qkv.kernel", LINEAR),
            Entry(f"{torch}.self_attention.in_proj_bias", f"{flax}.attn.qkv.bias", SAME),
            *weights(f"{torch}.self_attention.out_proj", f"{flax}.attn.proj", LINEAR),
            *layer_norm(f"{torch}.ln_2", f"{flax}.norm2"),
            *weights(f"{torch}.mlp.0", f"{flax}.mlp.fc1", LINEAR),
            *weights(f"{torch}.mlp.3", f"{flax}.mlp.fc2", LINEAR),
        ]
    return table + layer_norm("encoder.ln", "norm") + weights("heads.head", "head", LINEAR)


def _vit_timm(backbone) -> Table:
    variant = backbone.variant
    table = [
        *[Entry("cls_token", "cls_token", SAME)] * variant.class_token,
        *[Entry("reg_token", "reg_token", SAME)] * (variant.registers > 0),
        Entry("pos_embed", "pos_embed", SAME),
        *weights("patch_embed.proj", "patch_embed", CONV, bias=variant.patch_bias),
    ]
    if variant.pre_norm:
        table += layer_norm("norm_pre", "pre_norm")
    for i in range(len(backbone.blocks)):
        block = f"blocks.{i}"
        for name in ("norm1", "norm2"):
            table += layer_norm(f"{block}.{name}", f"{block}.{name}")
        table += weights(f"{block}.attn.qkv", f"{block}.attn.qkv", LINEAR, bias=variant.qkv_bias)
        for name in ("attn.proj", "mlp.fc1", "mlp.fc2"):
            table += weights(f"{block}.{name}", f"{block}.{name}", LINEAR)
        if variant.layer_scale:
            table += [Entry(f"{block}.ls{k}.gamma", f"{block}.scale{k}", SAME) for k in (1, 2)]
    norm = "fc_norm" if variant.norm_after_pool else "norm"
    return table + layer_norm(norm, "norm") + weights("head", "head", LINEAR)


def attention_table(attention) -> Table:
    """The attention mechanism in the authors' code, under `generic.attn_mech.` there (for a ViT
    `generic.attn_mech.1.`). Its BatchNorms count the training steps, which a run knows."""
    if not attention.branches:
        return weights("op", "fusion", LINEAR_AS_CONV)
    table = []
    for i, branch in enumerate(attention.branches):
        table += weights(f"convs.{i}", f"branches.{i}.conv", LINEAR_AS_CONV)
        if branch.norm is not None:
            *norm, count = batch_norm(f"bns.{i}", f"branches.{i}.norm")
            table += [*norm, count._replace(flax_path=None)]
    return table + weights("fuser", "fusion", LINEAR_AS_CONV)


_LAYOUTS: dict[str, dict[str, Callable[[Any], Table]]] = {
    "VGG": {"torchvision": _vgg_torchvision, "timm": _vgg_timm},
    "ResNet": {"torchvision": _resnet_torchvision, "timm": _resnet_timm},
    "SqueezeNet": {"torchvision": _squeezenet},
    "ViT": {"torchvision": _vit_torchvision, "timm": _vit_timm},
}


def backbone_tables(backbone) -> dict[str, Table]:
    """The backbone's table in every layout of its family, by the layout's name."""
    return {name: table(backbone) for name, table in _LAYOUTS[type(backbone).__name__].items()}


def current_key(key: str) -> str:
    """The key that today's torchvision gives a tensor: its published ViT files still have the
    names of its first release, `mlp.linear_1` and `mlp.linear_2`."""
    return re.sub(
        r"(encoder_layer_\d+\.mlp)\.linear_([12])\.",
        lambda match: f"{match[1]}.{3 * int(match[2]) - 3}.",
        key,
    )

"""ConvNeXt (Liu et al., 2022, arXiv:2201.03545) and ConvNeXt V2 (Woo et al., 2023,
arXiv:2301.00808), including timm's smaller models and their overlapping stems."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from ttame_jax.compilers import gelu
from ttame_jax.preprocessing import Preprocessing

from . import base
from .base import Backbone, chain
from .family import Family, Timm, Torchvision
from .layers import Conv, classify
from .tensors import (
    CONV,
    LINEAR,
    LINEAR_AS_CONV,
    SAME,
    Entry,
    Table,
    Transform,
    layer_norm,
    weights,
)


@dataclass(frozen=True, kw_only=True)
class Architecture(base.Architecture):
    """Sizes of the four stages, and what the models differ in. The defaults are the original's."""

    depths: tuple[int, int, int, int]
    widths: tuple[int, int, int, int]
    stem: tuple[int, ...] = ()  # widths of overlapping 3x3 convolutions in place of one of 4x4
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    layer_scale: bool = True  # a learned factor per channel on each residual branch
    response_norm: bool = False  # global response normalisation in each MLP (V2)
    conv_mlp: bool = False  # whether timm stores each MLP as 1x1 convolutions
    norm_first: bool = False  # whether the head normalises before it averages
    head_width: int = 0  # of a hidden layer in the head; 0 is none
    epsilon: float = 1e-6  # of every LayerNorm


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_tanh": partial(nnx.gelu, approximate=True),
}


class Stem(nnx.Module):
    """Convolutions with a total stride of 4, and LayerNorm: images -> [B, H/4, W/4, width]."""

    def __init__(self, architecture: Architecture, **options):
        width = architecture.widths[0]
        self.convs = nnx.List()
        for inner, out in zip((3, *architecture.stem), architecture.stem):
            self.convs.append(Conv(inner, out, (3, 3), strides=2, padding=1, **options))
        if not self.convs:
            self.convs.append(Conv(3, width, (4, 4), strides=4, **options))
        self.norm = nnx.LayerNorm(width, epsilon=architecture.epsilon, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv in self.convs:
            x = conv(x)
        return self.norm(x)


class Downsample(nnx.Module):
    """LayerNorm and a strided convolution, [B, H, W, in] -> [B, H/2, W/2, out]."""

    def __init__(self, in_features: int, out_features: int, epsilon: float, **options):
        self.norm = nnx.LayerNorm(in_features, epsilon=epsilon, **options)
        self.conv = Conv(in_features, out_features, (2, 2), strides=2, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv(self.norm(x))


class ResponseNorm(nnx.Module):
    """Global response normalisation (V2, section 3.2) of [B, H, W, C].

    Each channel is multiplied by its norm over all positions, relative to the other channels'.
    """

    def __init__(self, features: int):
        self.scale = nnx.Param(jnp.zeros(features))
        self.bias = nnx.Param(jnp.zeros(features))

    def __call__(self, x: jax.Array) -> jax.Array:
        squares = jnp.square(x.astype(jnp.float32)).sum(axis=(1, 2), keepdims=True)
        norms = jnp.sqrt(jnp.maximum(squares, 1e-30))  # the root has no gradient at zero
        relative = norms / (norms.mean(axis=-1, keepdims=True) + 1e-6)
        factor, bias = 1 + self.scale[...] * relative, self.bias[...]
        return x * factor.astype(x.dtype) + bias.astype(x.dtype)


class Block(nnx.Module):
    """A 7x7 depthwise convolution, LayerNorm and MLP beside a shortcut: [B, H, W, width]."""

    def __init__(self, width: int, architecture: Architecture, **options):
        inner = 4 * width
        self.conv = Conv(width, width, (7, 7), padding=3, feature_group_count=width, **options)
        self.norm = nnx.LayerNorm(width, epsilon=architecture.epsilon, **options)
        self.fc1 = nnx.Linear(width, inner, **options)
        self.response_norm = ResponseNorm(inner) if architecture.response_norm else None
        self.fc2 = nnx.Linear(inner, width, **options)
        self.scale = nnx.Param(jnp.ones(width)) if architecture.layer_scale else None
        self.activate = ACTIVATIONS[architecture.activation]

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.activate(self.fc1(self.norm(self.conv(x))))
        y = self.fc2(y if self.response_norm is None else self.response_norm(y))
        return x + (y if self.scale is None else y * self.scale[...].astype(y.dtype))


class Stage(nnx.Module):
    """Blocks of one width, and in all stages but the first a reduction of the resolution before."""

    def __init__(self, number: int, architecture: Architecture, **options):
        before, width = architecture.widths[number - 1], architecture.widths[number]
        self.downsample = (
            Downsample(before, width, architecture.epsilon, **options) if number else None
        )
        depth = architecture.depths[number]
        self.blocks = nnx.List([Block(width, architecture, **options) for _ in range(depth)])


class ConvNeXt(Backbone):
    """Feature maps: the last three of the four stages (strides 8, 16 and 32).

    `target_layer` is the last layer with a spatial extent: the last block, or the LayerNorm after
    it where the head normalises before it averages.
    """

    architecture: Architecture

    def __init__(self, name: str, architecture: Architecture, *, rngs: nnx.Rngs, **options: Any):
        super().__init__(name, architecture, **options)
        ends = tuple(
            f"stages.{i}.blocks.{depth - 1}" for i, depth in enumerate(architecture.depths)
        )
        self.feature_layers = ends[-3:]
        self.target_layer = "norm" if architecture.norm_first else ends[-1]
        self.min_size = 29 if architecture.stem else 32  # one position in the last stage
        layer_options: dict[str, Any] = {"dtype": self.dtype, "rngs": rngs}
        self.stem = Stem(architecture, **layer_options)
        self.stages = nnx.List(
            [Stage(i, architecture, **layer_options) for i in range(len(architecture.depths))]
        )
        channels = architecture.widths[-1]
        head_options: dict[str, Any] = {"dtype": jnp.float32, "rngs": rngs}
        self.norm = nnx.LayerNorm(channels, epsilon=architecture.epsilon, **head_options)
        width = architecture.head_width
        self.head_hidden = nnx.Linear(channels, width, **head_options) if width else None
        self.head = nnx.Linear(width or channels, self.num_classes, **head_options)

    def named_layers(self):
        layers: list[tuple[str, Callable]] = [("stem", self.stem)]
        for i, stage in enumerate(self.stages):
            if stage.downsample is not None:
                layers.append((f"stages.{i}.downsample", stage.downsample))
            layers += [(f"stages.{i}.blocks.{j}", block) for j, block in enumerate(stage.blocks)]
        if self.architecture.norm_first:
            layers.append(("norm", self.norm))
        return chain([*layers, ("head", self._classify)])

    def _classify(self, x, classes=None):
        x = x.astype(jnp.float32).mean(axis=(1, 2))
        if not self.architecture.norm_first:
            x = self.norm(x)
        if self.head_hidden is not None:
            x = gelu(self.head_hidden(x))
        return classify(self.head, x, classes)


def _torchvision_tensors(backbone: ConvNeXt) -> Table:
    architecture = backbone.architecture
    if architecture.activation != "gelu" or architecture.epsilon != 1e-6 or architecture.norm_first:
        return []
    table = weights("features.0.0", "stem.convs.0", CONV) + layer_norm("features.0.1", "stem.norm")
    for i, stage in enumerate(backbone.stages):
        if stage.downsample is not None:
            table += _downsample(f"features.{2 * i}", f"stages.{i}.downsample")
        for j in range(len(stage.blocks)):
            torch, flax = f"features.{2 * i + 1}.{j}", f"stages.{i}.blocks.{j}"
            table += [
                *weights(f"{torch}.block.0", f"{flax}.conv", CONV),
                *layer_norm(f"{torch}.block.2", f"{flax}.norm"),
                *weights(f"{torch}.block.3", f"{flax}.fc1", LINEAR),
                *weights(f"{torch}.block.5", f"{flax}.fc2", LINEAR),
                Entry(f"{torch}.layer_scale", f"{flax}.scale", PER_CHANNEL),
            ]
    return table + layer_norm("classifier.0", "norm") + weights("classifier.2", "head", LINEAR)


PER_CHANNEL = Transform(lambda x: x.reshape(-1), lambda x: x.reshape(-1, 1, 1))  # C11 <-> C


def _downsample(torch: str, flax: str) -> Table:
    return layer_norm(f"{torch}.0", f"{flax}.norm") + weights(f"{torch}.1", f"{flax}.conv", CONV)


def _timm_tensors(backbone: ConvNeXt) -> Table:
    architecture, table = backbone.architecture, []
    count = len(backbone.stem.convs)
    for i in range(count):
        table += weights(f"stem.{i}", f"stem.convs.{i}", CONV)
    table += layer_norm(f"stem.{count}", "stem.norm")
    for i, stage in enumerate(backbone.stages):
        if stage.downsample is not None:
            table += _downsample(f"stages.{i}.downsample", f"stages.{i}.downsample")
        for j in range(len(stage.blocks)):
            table += _timm_block(f"stages.{i}.blocks.{j}", architecture)
    norm = "norm_pre" if architecture.norm_first else "head.norm"
    table += layer_norm(norm, "norm") + weights("head.fc", "head", LINEAR)
    if architecture.head_width:
        table += weights("head.pre_logits.fc", "head_hidden", LINEAR)
    return table


def _timm_block(block: str, architecture: Architecture) -> Table:
    """A block has the same path in both."""
    linear = LINEAR_AS_CONV if architecture.conv_mlp else LINEAR
    table = [
        *weights(f"{block}.conv_dw", f"{block}.conv", CONV),
        *layer_norm(f"{block}.norm", f"{block}.norm"),
        *weights(f"{block}.mlp.fc1", f"{block}.fc1", linear),
        *weights(f"{block}.mlp.fc2", f"{block}.fc2", linear),
    ]
    if architecture.response_norm:
        table += layer_norm(f"{block}.mlp.grn", f"{block}.response_norm")
    if architecture.layer_scale:
        table += [Entry(f"{block}.gamma", f"{block}.scale", SAME)]
    return table


def _read(module) -> dict[str, Any]:
    block = module.stages[0].blocks[0]
    convolutions = [layer for layer in module.stem if hasattr(layer, "out_channels")]
    return {
        "depths": tuple(len(stage.blocks) for stage in module.stages),
        "widths": tuple(stage.blocks[0].conv_dw.out_channels for stage in module.stages),
        "stem": tuple(layer.out_channels for layer in convolutions) * (len(convolutions) > 1),
        "activation": "gelu_tanh" if type(block.mlp.act).__name__ == "GELUTanh" else "gelu",
        "layer_scale": block.gamma is not None,
        "response_norm": hasattr(block.mlp, "grn"),
        "conv_mlp": block.use_conv_mlp,
        "norm_first": type(module.norm_pre).__name__ != "Identity",
        "head_width": getattr(module.head, "hidden_size", None) or 0,
        "epsilon": block.norm.eps,
    }


def _sized(depth: int, width: int, resize_size: int) -> Architecture:
    return Architecture(
        depths=(3, 3, depth, 3),
        widths=(width, 2 * width, 4 * width, 8 * width),
        preprocessing=Preprocessing(resize_size=resize_size),
    )


PUBLISHED = {
    "convnext_tiny": _sized(9, 96, 236),
    "convnext_small": _sized(27, 96, 230),
    "convnext_base": _sized(27, 128, 232),
    "convnext_large": _sized(27, 192, 232),
}

FAMILY = Family(
    backbone=ConvNeXt,
    architecture=Architecture,
    architectures=PUBLISHED,
    torchvision=Torchvision(
        models={name: name for name in PUBLISHED},
        tensors=_torchvision_tensors,
        feature_nodes=lambda backbone: ["features.3", "features.5", "features.7"],
        target_node=lambda backbone: "features.7",
    ),
    timm=Timm(
        models={
            "convnext_tiny": "convnext_tiny.in12k_ft_in1k",
            "convnext_small": "convnext_small.in12k_ft_in1k",
            "convnext_base": "convnext_base.fb_in22k_ft_in1k",
            "convnext_large": "convnext_large.fb_in22k_ft_in1k",
        },
        tensors=_timm_tensors,
        feature_nodes=lambda backbone: ["stages.1", "stages.2", "stages.3"],
        module="ConvNeXt",
        files=("convnext",),
        layers=frozenset(
            [
                "ConvNeXtStage",
                "ConvNeXtBlock",
                "LayerNorm",
                "LayerNorm2d",
                "Mlp",
                "GlobalResponseNormMlp",
                "GlobalResponseNorm",
                "GELU",
                "GELUTanh",
                "Dropout",
                "DropPath",
                "NormMlpClassifierHead",
                "ClassifierHead",
            ]
        ),
        read=_read,
    ),
)

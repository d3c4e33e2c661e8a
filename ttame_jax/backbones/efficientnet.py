"""EfficientNet (Tan and Le, 2019, arXiv:1905.11946), EfficientNet-Lite, and other stacks of
inverted residuals that timm builds from the same blocks, such as MobileNetV2 and EfficientNetV2."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ttame_jax.preprocessing import Preprocessing

from . import base
from .base import Backbone, chain
from .family import Family, Timm
from .layers import Conv, FrozenBatchNorm, classify
from .tensors import CONV, LINEAR, LINEAR_AS_CONV, Table, batch_norm, weights

Kind = Literal["mbconv", "separable", "fused", "conv"]


class Block(NamedTuple):
    """The plan of one block.

    Attributes:
      kind: "mbconv" (1x1 expansion, depthwise convolution, 1x1 projection), "separable" (no
        expansion), "fused" (a dense convolution expands; EfficientNetV2) or "conv" (a dense
        convolution alone).
      kernel: size of the depthwise or dense convolution.
      stride: of the same convolution.
      inner: number of channels before the projection.
      width: number of output channels.
      squeeze: number of channels in squeeze-and-excitation; 0 is none.
      skip: whether the input is added to the output.
    """

    kind: Kind
    kernel: int
    stride: int
    inner: int
    width: int
    squeeze: int
    skip: bool


@dataclass(frozen=True, kw_only=True)
class Architecture(base.Architecture):
    """Widths of stem and head, and the plan of each block in each stage."""

    stem: int
    stages: tuple[tuple[Block, ...], ...]
    head: int
    activation: Literal["silu", "relu6", "relu"] = "silu"
    padding: Literal["symmetric", "SAME"] = "symmetric"  # PyTorch's or TensorFlow's
    epsilon: float = 1e-5  # of every BatchNorm


ACTIVATIONS = {"silu": nnx.silu, "relu6": nnx.relu6, "relu": nnx.relu}


class ConvNorm(nnx.Module):
    """Convolution and BatchNorm."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel: int,
        stride: int,
        architecture: Architecture,
        **options,
    ):
        self.conv = Conv(
            in_features,
            out_features,
            (kernel, kernel),
            strides=stride,
            padding="SAME" if architecture.padding == "SAME" else kernel // 2,
            use_bias=False,
            **options,
        )
        self.bn = FrozenBatchNorm(out_features, epsilon=architecture.epsilon)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.bn(self.conv(x))


class SqueezeExcite(nnx.Module):
    """Scales each channel of [B, H, W, C] by a gate in (0, 1), computed from all their averages."""

    def __init__(self, features: int, squeeze: int, activation: str, **options):
        self.reduce = nnx.Linear(features, squeeze, **options)
        self.expand = nnx.Linear(squeeze, features, **options)
        self.activate = ACTIVATIONS[activation]

    def __call__(self, x: jax.Array) -> jax.Array:
        averages = x.mean(axis=(1, 2), keepdims=True)
        return x * nnx.sigmoid(self.expand(self.activate(self.reduce(averages))))


class MBConv(nnx.Module):
    """A block of any kind: [B, H, W, in] -> [B, H/stride, W/stride, width]."""

    def __init__(self, in_features: int, block: Block, architecture: Architecture, **options):
        kind, kernel, stride, inner, width, squeeze, self.skip = block
        self.activate = ACTIVATIONS[architecture.activation]
        expands, dense = kind == "mbconv", kind in ("fused", "conv")
        self.expand = (
            ConvNorm(in_features, inner, 1, 1, architecture, **options) if expands else None
        )
        self.spatial = ConvNorm(
            inner if expands else in_features,
            inner,
            kernel,
            stride,
            architecture,
            feature_group_count=1 if dense else inner,
            **options,
        )
        self.squeeze_excite = (
            SqueezeExcite(inner, squeeze, architecture.activation, **options) if squeeze else None
        )
        self.project = (
            None if kind == "conv" else ConvNorm(inner, width, 1, 1, architecture, **options)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x if self.expand is None else self.activate(self.expand(x))
        y = self.activate(self.spatial(y))
        if self.squeeze_excite is not None:
            y = self.squeeze_excite(y)
        if self.project is not None:
            y = self.project(y)
        return x + y if self.skip else y


class EfficientNet(Backbone):
    """Feature maps: the last blocks of the last three resolutions (strides 8, 16 and 32).

    `target_layer` is the 1x1 convolution after the blocks: the last layer with a spatial extent,
    and the one whose output the classifier averages. It is no feature map, as it has no more
    resolution than the last block and four times its channels; hence there are no `class_weights`.
    """

    architecture: Architecture

    def __init__(self, name: str, architecture: Architecture, *, rngs: nnx.Rngs, **options: Any):
        super().__init__(name, architecture, **options)
        self.feature_layers, self.target_layer = _feature_layers(architecture), "conv_head"
        self.activate = ACTIVATIONS[architecture.activation]
        layer_options: dict[str, Any] = {"dtype": self.dtype, "rngs": rngs}
        channels = architecture.stem
        self.stem = ConvNorm(3, channels, 3, 2, architecture, **layer_options)
        self.stages = nnx.List()
        for blocks in architecture.stages:
            stage = nnx.List()
            for block in blocks:
                stage.append(MBConv(channels, block, architecture, **layer_options))
                channels = Block(*block).width
            self.stages.append(stage)
        self.conv_head = ConvNorm(channels, architecture.head, 1, 1, architecture, **layer_options)
        self.head = nnx.Linear(architecture.head, self.num_classes, dtype=jnp.float32, rngs=rngs)

    def named_layers(self):
        blocks = [
            (f"stages.{i}.{j}", block)
            for i, stage in enumerate(self.stages)
            for j, block in enumerate(stage)
        ]
        stem = ("stem", lambda x: self.activate(self.stem(x)))
        conv_head = ("conv_head", lambda x: self.activate(self.conv_head(x)))
        return chain([stem, *blocks, conv_head, ("head", self._classify)])

    def _classify(self, x, classes=None):
        return classify(self.head, x.astype(jnp.float32).mean(axis=(1, 2)), classes)


def _feature_layers(architecture: Architecture) -> tuple[str, ...]:
    strides = [
        (f"stages.{i}.{j}", Block(*block).stride)
        for i, blocks in enumerate(architecture.stages)
        for j, block in enumerate(blocks)
    ]
    ends = [name for (name, _), (_, stride) in pairwise(strides) if stride > 1]
    return (*ends[-2:], strides[-1][0])


# timm's class of each kind of block, and its names of our parts, in the order of computation.
CLASSES: dict[str, Kind] = {
    "InvertedResidual": "mbconv",
    "DepthwiseSeparableConv": "separable",
    "EdgeResidual": "fused",
    "ConvBnAct": "conv",
}
PARTS: dict[Kind, dict[str, str]] = {
    "mbconv": {"expand": "conv_pw", "spatial": "conv_dw", "project": "conv_pwl"},
    "separable": {"spatial": "conv_dw", "project": "conv_pw"},
    "fused": {"spatial": "conv_exp", "project": "conv_pwl"},
    "conv": {"spatial": "conv"},
}


def _tensors(backbone: EfficientNet) -> Table:
    table = _conv_norm("conv_stem", "bn1", "stem")
    for i, blocks in enumerate(backbone.architecture.stages):
        for j, block in enumerate(blocks):
            table += _block_tensors(f"blocks.{i}.{j}", f"stages.{i}.{j}", Block(*block))
    table += _conv_norm("conv_head", "bn2", "conv_head")
    return table + weights("classifier", "head", LINEAR)


def _block_tensors(torch: str, flax: str, block: Block) -> Table:
    table = []
    for k, (part, name) in enumerate(PARTS[block.kind].items(), 1):
        table += _conv_norm(f"{torch}.{name}", f"{torch}.bn{k}", f"{flax}.{part}")
    if block.squeeze:
        for part in ("reduce", "expand"):
            flax_path = f"{flax}.squeeze_excite.{part}"
            table += weights(f"{torch}.se.conv_{part}", flax_path, LINEAR_AS_CONV)
    return table


def _conv_norm(conv: str, norm: str, flax: str) -> Table:
    return weights(conv, f"{flax}.conv", CONV, bias=False) + batch_norm(norm, f"{flax}.bn")


def _feature_nodes(backbone: EfficientNet) -> list[str]:
    return [name.replace("stages", "blocks") for name in backbone.feature_layers]


def _refusals(module) -> Iterator[str]:
    activations = {type(layer).__name__ for layer in module.modules()} & {"SiLU", "ReLU6", "ReLU"}
    if len(activations) > 1:
        yield f"mixes {' and '.join(sorted(activations))}"
    if any(getattr(block, "has_pw_act", False) for stage in module.blocks for block in stage):
        yield "activates the outputs of its blocks"


def _read(module) -> dict[str, Any]:
    return {
        "stem": module.conv_stem.out_channels,
        "stages": tuple(tuple(map(_read_block, stage)) for stage in module.blocks),
        "head": module.num_features,
        "activation": type(module.bn1.act).__name__.lower(),
        "padding": "SAME" if type(module.conv_stem).__name__ == "Conv2dSame" else "symmetric",
        "epsilon": module.bn1.eps,
    }


def _read_block(block) -> Block:
    kind = CLASSES[type(block).__name__]
    convolutions = {part: getattr(block, name) for part, name in PARTS[kind].items()}
    spatial = convolutions["spatial"]
    squeeze = getattr(getattr(block, "se", None), "conv_reduce", None)
    return Block(
        kind=kind,
        kernel=spatial.kernel_size[0],
        stride=spatial.stride[0],
        inner=spatial.out_channels,
        width=convolutions.get("project", spatial).out_channels,
        squeeze=0 if squeeze is None else squeeze.out_channels,
        skip=block.has_skip,
    )


# Kernel, stride, expansion, width and depth of the stages of EfficientNet-B0 (paper, table 1).
B0 = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
# Factors of width and depth of B0 to B4, and of Lite0 to Lite4.
SCALES = ((1.0, 1.0), (1.0, 1.1), (1.1, 1.2), (1.2, 1.4), (1.4, 1.8))


def _scaled(size: int, preprocessing: Preprocessing, lite: bool = False, **fields) -> Architecture:
    """B0 scaled to B`size`, or to Lite`size`.

    Lite models keep the stem, the head and the depths of the first and last stage, and have no
    squeeze-and-excitation.
    """
    width, depth = SCALES[size]
    stem, head = (32, 1280) if lite else (_rounded(32 * width), _rounded(1280 * width))
    channels, stages = stem, []
    for i, (kernel, stride, expansion, features, repeats) in enumerate(B0):
        out = _rounded(features * width)
        fixed = lite and i in (0, len(B0) - 1)
        stage = []
        for j in range(repeats if fixed else math.ceil(repeats * depth)):
            step = stride if j == 0 else 1
            block = Block(
                kind="separable" if expansion == 1 else "mbconv",
                kernel=kernel,
                stride=step,
                inner=expansion * channels,
                width=out,
                squeeze=0 if lite else channels // 4,
                skip=step == 1 and channels == out,
            )
            stage.append(block)
            channels = out
        stages.append(tuple(stage))
    return Architecture(
        stem=stem, stages=tuple(stages), head=head, preprocessing=preprocessing, **fields
    )


def _rounded(width: float) -> int:
    """The nearest multiple of 8, but at least 90 % of the width."""
    nearest = max(8, int(width + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * width else nearest + 8


def _input(
    image_size: int,
    resize_size: int,
    interpolation: Literal["bilinear", "bicubic"] = "bicubic",
    **fields,
) -> Preprocessing:
    return Preprocessing(image_size, resize_size, interpolation, **fields)


HALF: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
LINEAR_HALF: dict[str, Any] = {"interpolation": "bilinear", **HALF}
TENSORFLOW = {"padding": "SAME", "epsilon": 1e-3}
LITE = {"lite": True, "activation": "relu6", **TENSORFLOW}

# By timm's names of its default weights, with their preprocessing.
PUBLISHED = {
    "efficientnet_b0.ra_in1k": _scaled(0, _input(224, 256)),
    "efficientnet_b1.ra4_e3600_r240_in1k": _scaled(1, _input(240, 266, **HALF)),
    "efficientnet_b2.ra_in1k": _scaled(2, _input(256, 292)),
    "efficientnet_b3.ra2_in1k": _scaled(3, _input(288, 329)),
    "efficientnet_b4.ra2_in1k": _scaled(4, _input(320, 365)),
    "tf_efficientnet_b0.ns_jft_in1k": _scaled(0, _input(224, 256), **TENSORFLOW),
    "tf_efficientnet_b1.ns_jft_in1k": _scaled(1, _input(240, 272), **TENSORFLOW),
    "tf_efficientnet_b2.ns_jft_in1k": _scaled(2, _input(260, 292), **TENSORFLOW),
    "tf_efficientnet_b3.ns_jft_in1k": _scaled(3, _input(300, 331), **TENSORFLOW),
    "tf_efficientnet_b4.ns_jft_in1k": _scaled(4, _input(380, 412), **TENSORFLOW),
    "tf_efficientnet_lite0.in1k": _scaled(0, _input(224, 256, **HALF), **LITE),
    "tf_efficientnet_lite1.in1k": _scaled(1, _input(240, 272, **HALF), **LITE),
    "tf_efficientnet_lite2.in1k": _scaled(2, _input(260, 292, **HALF), **LITE),
    "tf_efficientnet_lite3.in1k": _scaled(3, _input(300, 331, **LINEAR_HALF), **LITE),
    "tf_efficientnet_lite4.in1k": _scaled(4, _input(380, 413, **LINEAR_HALF), **LITE),
}
MODELS = {name.partition(".")[0]: name for name in PUBLISHED}

FAMILY = Family(
    backbone=EfficientNet,
    architecture=Architecture,
    architectures={name: PUBLISHED[model] for name, model in MODELS.items()},
    timm=Timm(
        models=MODELS,
        tensors=_tensors,
        feature_nodes=_feature_nodes,
        module="EfficientNet",
        files=("efficientnet",),
        layers=frozenset(
            [*CLASSES, "SqueezeExcite", "BatchNormAct2d", "Conv2dSame", "SiLU", "ReLU6", "Sigmoid"]
        ),
        read=_read,
        refusals=_refusals,
    ),
)

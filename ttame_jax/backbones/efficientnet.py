"""EfficientNet (Tan and Le, 2019, arXiv:1905.11946), EfficientNet-Lite, MobileNetV2, and other stacks
of inverted residuals that timm builds from the same blocks, such as EfficientNetV2 and MnasNet."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ttame_jax.preprocessing import Preprocessing

from . import base
from .base import Backbone, State, chain
from .family import AuthorsCode, Family, Timm, Torchvision
from .layers import ConvNorm, SqueezeExcite, classify
from .tensors import LINEAR, Table, conv_norm, squeeze_excite, weights

Kind = Literal["mbconv", "separable", "fused", "conv", "universal"]
Activation = Literal["silu", "relu", "relu6", "hardswish"]
Gate = Literal["sigmoid", "hardsigmoid"]

# By the lower-case names of PyTorch's classes.
FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nnx.silu,
    "relu": nnx.relu,
    "relu6": nnx.relu6,
    "hardswish": nnx.hard_swish,
    "sigmoid": nnx.sigmoid,
    "hardsigmoid": nnx.hard_sigmoid,
}


class Block(NamedTuple):
    """The plan of one block.

    Attributes:
      kind: "mbconv" (1x1 expansion, depthwise convolution, 1x1 projection), "separable" (no
        expansion), "fused" (a dense convolution expands; EfficientNetV2), "conv" (a dense
        convolution alone) or "universal" (an mbconv with another depthwise convolution before the
        expansion, each of the two optional; MobileNetV4).
      kernel: size of the depthwise or dense convolution; 0 is none.
      stride: of the same convolution, or else of the first one of "universal".
      groups: of the same convolution: as many as its channels if it is depthwise.
      inner: number of channels before the projection.
      width: number of output channels.
      skip: whether the input is added to the output.
      activation: after every convolution except the projection and the first one of "universal".
      squeeze: squeeze-and-excitation before the projection: its number of channels, activation and
        gate.
      linear: whether the projection has no activation (MobileNetV1 has one).
      first_kernel: size of the depthwise convolution before the expansion; 0 is none.
    """

    kind: Kind
    kernel: int
    stride: int
    groups: int
    inner: int
    width: int
    skip: bool
    activation: Activation
    squeeze: tuple[int, Activation, Gate] | None = None
    linear: bool = True
    first_kernel: int = 0


@dataclass(frozen=True, kw_only=True)
class Architecture(base.Architecture):
    """Widths of stem and head, and the plan of each block in each stage."""

    stem: int
    stages: tuple[tuple[Block, ...], ...]
    head: int
    stem_kernel: int = 3
    activation: Activation = "silu"  # of stem and head
    padding: Literal["symmetric", "SAME"] = "symmetric"  # PyTorch's or TensorFlow's
    epsilon: float = 1e-5  # of every BatchNorm

    @property
    def blocks(self) -> dict[str, Block]:
        """All blocks by the names of their layers, in order."""
        return {
            f"stages.{i}.{j}": Block(*block)
            for i, stage in enumerate(self.stages)
            for j, block in enumerate(stage)
        }

    def conv_norm(self, *sizes: int, **options: Any) -> ConvNorm:
        """A convolution (see `ConvNorm`) with this padding and BatchNorm."""
        return ConvNorm(*sizes, padding=self.padding, epsilon=self.epsilon, **options)


class MBConv(nnx.Module):
    """A block of any kind: [B, H, W, in] -> [B, H/stride, W/stride, width]."""

    def __init__(self, in_features: int, block: Block, architecture: Architecture, **options):
        kind, kernel, stride, groups, inner, width, self.skip = block[:7]
        self.linear, self.activation = block.linear, FUNCTIONS[block.activation]
        expands = kind in ("mbconv", "universal")
        squeeze, *names = block.squeeze or (0,)
        functions = [FUNCTIONS[name] for name in names]
        first_sizes = (in_features, in_features, block.first_kernel, 1 if kernel else stride)
        sizes = (inner if expands else in_features, inner, kernel, stride)
        conv_norm = partial(architecture.conv_norm, **options)
        depthwise = partial(conv_norm, feature_group_count=in_features)
        self.first = depthwise(*first_sizes) if block.first_kernel else None
        self.expand = conv_norm(in_features, inner, 1) if expands else None
        self.spatial = conv_norm(*sizes, feature_group_count=groups) if kernel else None
        self.squeeze_excite = (
            SqueezeExcite(inner, squeeze, *functions, **options) if squeeze else None
        )
        self.project = None if kind == "conv" else conv_norm(inner, width, 1)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x if self.first is None else self.first(x)
        for convolution in (self.expand, self.spatial):
            if convolution is not None:
                y = self.activation(convolution(y))
        if self.squeeze_excite is not None:
            y = self.squeeze_excite(y)
        if self.project is not None:
            y = self.project(y)
            y = y if self.linear else self.activation(y)
        return x + y if self.skip else y


class BlockStack(Backbone):
    """A stem and stages of blocks, to which subclasses add a head.

    Feature maps: the last blocks of the last three resolutions (strides 8, 16 and 32).
    """

    architecture: Architecture

    def __init__(self, name: str, architecture: Architecture, *, rngs: nnx.Rngs, **options: Any):
        super().__init__(name, architecture, **options)
        strides = [(name, block.stride) for name, block in architecture.blocks.items()]
        ends = [name for (name, _), (_, stride) in itertools.pairwise(strides) if stride > 1]
        self.feature_layers = (*ends[-2:], strides[-1][0])
        self.activation = FUNCTIONS[architecture.activation]
        layer_options: dict[str, Any] = {"dtype": self.dtype, "rngs": rngs}
        channels = architecture.stem
        self.stem = architecture.conv_norm(
            3, channels, architecture.stem_kernel, 2, **layer_options
        )
        self.stages = nnx.List()
        for blocks in architecture.stages:
            stage = nnx.List()
            for block in itertools.starmap(Block, blocks):
                stage.append(MBConv(channels, block, architecture, **layer_options))
                channels = block.width
            self.stages.append(stage)

    @property
    def blocks(self) -> dict[str, MBConv]:
        """All blocks by the names of their layers, in order."""
        return {
            f"stages.{i}.{j}": block
            for i, stage in enumerate(self.stages)
            for j, block in enumerate(stage)
        }

    def stem_and_blocks(self) -> list[tuple[str, Callable[..., State]]]:
        """The first of the `named_layers`."""
        return chain([("stem", lambda x: self.activation(self.stem(x))), *self.blocks.items()])


class EfficientNet(BlockStack):
    """Feature maps: the last blocks of the last three resolutions (strides 8, 16 and 32).

    `target_layer` is the 1x1 convolution after the blocks: the last layer with a spatial extent,
    and the one whose output the classifier averages. It is no feature map, as it has no more
    resolution than the last block and four times its channels; hence there are no `class_weights`.
    """

    def __init__(self, name: str, architecture: Architecture, *, rngs: nnx.Rngs, **options: Any):
        super().__init__(name, architecture, rngs=rngs, **options)
        self.target_layer = "conv_head"
        channels = Block(*architecture.stages[-1][-1]).width
        self.conv_head = architecture.conv_norm(
            channels, architecture.head, 1, dtype=self.dtype, rngs=rngs
        )
        self.head = nnx.Linear(architecture.head, self.num_classes, dtype=jnp.float32, rngs=rngs)

    def named_layers(self):
        conv_head = ("conv_head", lambda x: self.activation(self.conv_head(x)))
        return self.stem_and_blocks() + chain([conv_head, ("head", self._classify)])

    def _classify(self, x, classes=None):
        return classify(self.head, x.astype(jnp.float32).mean(axis=(1, 2)), classes)


# timm's class of each kind of block, and its names of the convolution and norm of our parts.
CLASSES: dict[str, Kind] = {
    "InvertedResidual": "mbconv",
    "DepthwiseSeparableConv": "separable",
    "EdgeResidual": "fused",
    "ConvBnAct": "conv",
    "UniversalInvertedResidual": "universal",
}
PARTS: dict[Kind, dict[str, tuple[str, str]]] = {
    "mbconv": {
        "expand": ("conv_pw", "bn1"),
        "spatial": ("conv_dw", "bn2"),
        "project": ("conv_pwl", "bn3"),
    },
    "separable": {"spatial": ("conv_dw", "bn1"), "project": ("conv_pw", "bn2")},
    "fused": {"spatial": ("conv_exp", "bn1"), "project": ("conv_pwl", "bn2")},
    "conv": {"spatial": ("conv", "bn1")},
    "universal": {
        "first": ("dw_start.conv", "dw_start.bn"),
        "expand": ("pw_exp.conv", "pw_exp.bn"),
        "spatial": ("dw_mid.conv", "dw_mid.bn"),
        "project": ("pw_proj.conv", "pw_proj.bn"),
    },
}


def _timm_tensors(backbone: EfficientNet) -> Table:
    table = block_tensors(backbone) + conv_norm("conv_head", "bn2", "conv_head")
    return table + weights("classifier", "head", LINEAR)


def block_tensors(backbone: BlockStack) -> Table:
    """timm's tensors of the stem and the blocks."""
    table = conv_norm("conv_stem", "bn1", "stem")
    for (path, block), plan in zip(backbone.blocks.items(), backbone.architecture.blocks.values()):
        torch = path.replace("stages", "blocks")
        for part, (conv, norm) in PARTS[plan.kind].items():
            if getattr(block, part) is not None:
                table += conv_norm(f"{torch}.{conv}", f"{torch}.{norm}", f"{path}.{part}")
        if block.squeeze_excite is not None:
            names = (f"{torch}.se.conv_reduce", f"{torch}.se.conv_expand")
            table += squeeze_excite(*names, f"{path}.squeeze_excite")
    return table


def timm_feature_nodes(backbone: BlockStack) -> list[str]:
    return [name.replace("stages", "blocks") for name in backbone.feature_layers]


def _torchvision_tensors(backbone: EfficientNet) -> Table:
    """The tensors of torchvision's MobileNetV2; none of a backbone that this class cannot build."""
    architecture = backbone.architecture
    plans = {(plan.kernel, plan.activation) for plan in architecture.blocks.values()}
    if plans != {(3, "relu6")} or architecture.padding != "symmetric":
        return []
    table = conv_norm("features.0.0", "features.0.1", "stem")
    for i, (path, block) in enumerate(backbone.blocks.items(), 1):
        convolutions = [part for part in ("expand", "spatial") if getattr(block, part) is not None]
        for j, part in enumerate(convolutions):
            torch = f"features.{i}.conv.{j}"
            table += conv_norm(f"{torch}.0", f"{torch}.1", f"{path}.{part}")
        torch, j = f"features.{i}.conv", len(convolutions)
        table += conv_norm(f"{torch}.{j}", f"{torch}.{j + 1}", f"{path}.project")
    last = f"features.{len(backbone.blocks) + 1}"
    table += conv_norm(f"{last}.0", f"{last}.1", "conv_head")
    return table + weights("classifier.1", "head", LINEAR)


def torchvision_node(backbone: BlockStack, layer: str) -> str:
    """torchvision's name of one of our layers: a flat list of stem, blocks and last convolution."""
    names = [name for name, _ in backbone.named_layers()]
    return f"features.{names.index(layer)}"


def torchvision_feature_nodes(backbone: BlockStack) -> list[str]:
    return [torchvision_node(backbone, layer) for layer in backbone.feature_layers]


def read_stages(module) -> dict[str, Any]:
    """The fields of an architecture that timm's EfficientNet and MobileNetV3 share."""
    return {
        "stem": module.conv_stem.out_channels,
        "stem_kernel": module.conv_stem.kernel_size[0],
        "stages": tuple(tuple(map(_read_block, stage)) for stage in module.blocks),
        "activation": _name(module.bn1.act),
        "padding": "SAME" if type(module.conv_stem).__name__ == "Conv2dSame" else "symmetric",
        "epsilon": module.bn1.eps,
    }


def _read_block(block) -> Block:
    kind, modules = CLASSES[type(block).__name__], dict(block.named_modules())
    parts = {part: modules[conv] for part, (conv, _) in PARTS[kind].items() if conv in modules}
    depthwise = [parts[part] for part in ("first", "spatial") if part in parts]
    first, spatial = parts.get("first"), parts.get("spatial")
    activated = "expand" if "expand" in parts else "spatial"
    squeeze = None
    if "se.conv_reduce" in modules:
        functions = (_name(modules[f"se.{part}"]) for part in ("act1", "gate"))
        squeeze = (modules["se.conv_reduce"].out_channels, *functions)
    return Block(
        kind=kind,
        kernel=spatial.kernel_size[0] if spatial else 0,
        stride=math.prod(convolution.stride[0] for convolution in depthwise),
        groups=spatial.groups if spatial else 1,
        inner=parts[activated].out_channels,
        width=parts.get("project", spatial).out_channels,
        skip=block.has_skip,
        activation=_name(modules[PARTS[kind][activated][1]].act),
        squeeze=squeeze,
        linear=not getattr(block, "has_pw_act", False),
        first_kernel=first.kernel_size[0] if first else 0,
    )


def refusals(module) -> Iterator[str]:
    if any(getattr(block, "conv_s2d", None) is not None for block in module.blocks.modules()):
        yield "moves pixels into channels"


def _name(function) -> Any:
    """The key in `FUNCTIONS` of a module of PyTorch's."""
    return type(function).__name__.lower()


Row = tuple[int, int, int, int, int]
"""Kernel, stride, expansion, width and depth of a stage."""

# EfficientNet-B0 (paper, table 1).
B0: tuple[Row, ...] = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
# MobileNetV2 (paper, table 2).
V2: tuple[Row, ...] = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (3, 2, 6, 32, 3),
    (3, 2, 6, 64, 4),
    (3, 1, 6, 96, 3),
    (3, 2, 6, 160, 3),
    (3, 1, 6, 320, 1),
)
# Factors of width and depth of B0 to B4, and of Lite0 to Lite4.
SCALES = ((1.0, 1.0), (1.0, 1.1), (1.1, 1.2), (1.2, 1.4), (1.4, 1.8))


def _scaled(size: int, preprocessing: Preprocessing, lite: bool = False, **fields) -> Architecture:
    """B0 scaled to B`size`, or to Lite`size`.

    Lite models keep the stem, the head and the depths of the first and last stage, have no
    squeeze-and-excitation, and ReLU6 in place of SiLU.
    """
    width, depth = SCALES[size]
    stem, head = (32, 1280) if lite else (rounded(32 * width), rounded(1280 * width))
    activation = "relu6" if lite else "silu"
    rows = []
    for i, (kernel, stride, expansion, features, repeats) in enumerate(B0):
        fixed = lite and i in (0, len(B0) - 1)
        repeats = repeats if fixed else math.ceil(repeats * depth)
        rows.append((kernel, stride, expansion, rounded(features * width), repeats))
    return Architecture(
        stem=stem,
        stages=_stages(rows, stem, activation, squeeze=not lite),
        head=head,
        activation=activation,
        preprocessing=preprocessing,
        **fields,
    )


def _stages(
    rows: Iterable[Row], channels: int, activation: Activation, squeeze: bool
) -> tuple[tuple[Block, ...], ...]:
    """Stages of inverted residuals, the first of which has `channels` input channels."""
    stages = []
    for kernel, stride, expansion, width, depth in rows:
        stage = []
        for j in range(depth):
            step = stride if j == 0 else 1
            block = Block(
                kind="separable" if expansion == 1 else "mbconv",
                kernel=kernel,
                stride=step,
                groups=expansion * channels,
                inner=expansion * channels,
                width=width,
                skip=step == 1 and channels == width,
                activation=activation,
                squeeze=(channels // 4, activation, "sigmoid") if squeeze else None,
            )
            stage.append(block)
            channels = width
        stages.append(tuple(stage))
    return tuple(stages)


def rounded(width: float) -> int:
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
LITE = {"lite": True, **TENSORFLOW}

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
ARCHITECTURES = {name: PUBLISHED[model] for name, model in MODELS.items()}
MOBILENET_V2 = Architecture(
    stem=32, stages=_stages(V2, 32, "relu6", squeeze=False), head=1280, activation="relu6"
)
# Layers of timm's that its EfficientNet and MobileNetV3 are made of, besides those of all families.
LAYERS = frozenset(
    [*CLASSES, "ConvNormAct", "SqueezeExcite", "BatchNormAct2d", "Conv2dSame"]
    + ["SiLU", "ReLU6", "Hardswish", "Sigmoid", "Hardsigmoid"]
)

FAMILY = Family(
    backbone=EfficientNet,
    architecture=Architecture,
    architectures={**ARCHITECTURES, "mobilenet_v2": MOBILENET_V2},
    torchvision=Torchvision(
        models={"mobilenet_v2": "mobilenet_v2"},
        tensors=_torchvision_tensors,
        feature_nodes=torchvision_feature_nodes,
        target_node=lambda backbone: torchvision_node(backbone, backbone.target_layer),
    ),
    timm=Timm(
        models={**MODELS, "mobilenet_v2": "mobilenetv2_100.ra_in1k"},
        tensors=_timm_tensors,
        feature_nodes=timm_feature_nodes,
        module="EfficientNet",
        files=("efficientnet",),
        layers=LAYERS,
        read=lambda module: read_stages(module) | {"head": module.num_features},
        refusals=refusals,
    ),
    authors=AuthorsCode(nodes=torchvision_feature_nodes),
)

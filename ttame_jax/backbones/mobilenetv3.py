"""MobileNetV3 (Howard et al., 2019, arXiv:1905.02244), and other stacks of inverted residuals that
timm builds with its head, such as LCNet and MobileNetV4."""

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import jax.numpy as jnp
from flax import nnx

from . import efficientnet
from .base import chain
from .efficientnet import (
    LAYERS,
    Activation,
    Block,
    BlockStack,
    block_tensors,
    read_stages,
    refusals,
    rounded,
    timm_feature_nodes,
    torchvision_feature_nodes,
    torchvision_node,
)
from .family import AuthorsCode, Family, Timm, Torchvision
from .layers import FrozenBatchNorm, classify
from .tensors import LINEAR, LINEAR_AS_CONV, Table, batch_norm, conv_norm, squeeze_excite, weights


@dataclass(frozen=True, kw_only=True)
class Architecture(efficientnet.Architecture):
    """As of an EfficientNet. Its last block is the last convolution."""

    head_bias: bool = True
    head_norm: bool = False  # BatchNorm in the head (MobileNetV4)


class MobileNetV3(BlockStack):
    """Feature maps: the last blocks of the last three resolutions (strides 8, 16 and 32).

    The classifier averages the last one, but there is a hidden layer between the average and the
    logits. Hence there are no `class_weights`.
    """

    architecture: Architecture

    def __init__(self, name: str, architecture: Architecture, *, rngs: nnx.Rngs, **options: Any):
        super().__init__(name, architecture, rngs=rngs, **options)
        self.target_layer = self.feature_layers[-1]
        channels = Block(*architecture.stages[-1][-1]).width
        layer_options: dict[str, Any] = {"dtype": jnp.float32, "rngs": rngs}
        self.hidden = nnx.Linear(
            channels, architecture.head, use_bias=architecture.head_bias, **layer_options
        )
        self.norm = (
            FrozenBatchNorm(architecture.head, epsilon=architecture.epsilon)
            if architecture.head_norm
            else None
        )
        self.head = nnx.Linear(architecture.head, self.num_classes, **layer_options)

    def named_layers(self):
        return self.stem_and_blocks() + chain([("head", self._classify)])

    def _classify(self, x, classes=None):
        x = self.hidden(x.astype(jnp.float32).mean(axis=(1, 2)))
        x = x if self.norm is None else self.norm(x)
        return classify(self.head, self.activation(x), classes)


def _timm_tensors(backbone: MobileNetV3) -> Table:
    architecture = backbone.architecture
    table = block_tensors(backbone)
    table += weights("conv_head", "hidden", LINEAR_AS_CONV, bias=architecture.head_bias)
    if architecture.head_norm:
        table += batch_norm("norm_head", "norm")
    return table + weights("classifier", "head", LINEAR)


def _torchvision_tensors(backbone: MobileNetV3) -> Table:
    table = conv_norm("features.0.0", "features.0.1", "stem")
    *blocks, (last, _) = backbone.blocks.items()
    for i, (path, block) in enumerate(blocks, 1):
        parts = ("expand", "spatial", "squeeze_excite", "project")
        for j, part in enumerate(part for part in parts if getattr(block, part) is not None):
            torch, flax = f"features.{i}.block.{j}", f"{path}.{part}"
            if part == "squeeze_excite":
                table += squeeze_excite(f"{torch}.fc1", f"{torch}.fc2", flax)
            else:
                table += conv_norm(f"{torch}.0", f"{torch}.1", flax)
    torch = f"features.{len(blocks) + 1}"
    table += conv_norm(f"{torch}.0", f"{torch}.1", f"{last}.spatial")
    return (
        table + weights("classifier.0", "hidden", LINEAR) + weights("classifier.3", "head", LINEAR)
    )


def _read(module) -> dict[str, Any]:
    return read_stages(module) | {
        "head": module.head_hidden_size,
        "head_bias": module.conv_head.bias is not None,
        "head_norm": type(module.norm_head).__name__ == "BatchNormAct2d",
    }


Row = tuple[int, int, int, bool, Activation, int]
"""Kernel, inner channels, width, squeeze-and-excitation, activation and stride of a block."""

# The paper's tables 1 and 2.
LARGE: tuple[Row, ...] = (
    (3, 16, 16, False, "relu", 1),
    (3, 64, 24, False, "relu", 2),
    (3, 72, 24, False, "relu", 1),
    (5, 72, 40, True, "relu", 2),
    (5, 120, 40, True, "relu", 1),
    (5, 120, 40, True, "relu", 1),
    (3, 240, 80, False, "hardswish", 2),
    (3, 200, 80, False, "hardswish", 1),
    (3, 184, 80, False, "hardswish", 1),
    (3, 184, 80, False, "hardswish", 1),
    (3, 480, 112, True, "hardswish", 1),
    (3, 672, 112, True, "hardswish", 1),
    (5, 672, 160, True, "hardswish", 2),
    (5, 960, 160, True, "hardswish", 1),
    (5, 960, 160, True, "hardswish", 1),
)
SMALL: tuple[Row, ...] = (
    (3, 16, 16, True, "relu", 2),
    (3, 72, 24, False, "relu", 2),
    (3, 88, 24, False, "relu", 1),
    (5, 96, 40, True, "hardswish", 2),
    (5, 240, 40, True, "hardswish", 1),
    (5, 240, 40, True, "hardswish", 1),
    (5, 120, 48, True, "hardswish", 1),
    (5, 144, 48, True, "hardswish", 1),
    (5, 288, 96, True, "hardswish", 2),
    (5, 576, 96, True, "hardswish", 1),
    (5, 576, 96, True, "hardswish", 1),
)


def _published(rows: tuple[Row, ...], head: int) -> Architecture:
    channels, blocks = 16, []
    for kernel, inner, width, squeezes, activation, stride in rows:
        block = Block(
            kind="separable" if inner == channels else "mbconv",
            kernel=kernel,
            stride=stride,
            groups=inner,
            inner=inner,
            width=width,
            skip=stride == 1 and channels == width,
            activation=activation,
            squeeze=(rounded(inner / 4), "relu", "hardsigmoid") if squeezes else None,
        )
        blocks.append(block)
        channels = width
    last = Block("conv", 1, 1, 1, 6 * channels, 6 * channels, False, "hardswish")
    stages = [tuple(stage) for _, stage in groupby(blocks, key=lambda block: block.width)]
    return Architecture(
        stem=16, stages=(*stages, (last,)), head=head, activation="hardswish", epsilon=1e-3
    )


FAMILY = Family(
    backbone=MobileNetV3,
    architecture=Architecture,
    architectures={
        "mobilenet_v3_small": _published(SMALL, 1024),
        "mobilenet_v3_large": _published(LARGE, 1280),
    },
    torchvision=Torchvision(
        models={name: name for name in ("mobilenet_v3_small", "mobilenet_v3_large")},
        tensors=_torchvision_tensors,
        feature_nodes=torchvision_feature_nodes,
        target_node=lambda backbone: torchvision_node(backbone, backbone.target_layer),
    ),
    timm=Timm(
        models={},  # timm's have another epsilon than torchvision's
        tensors=_timm_tensors,
        feature_nodes=timm_feature_nodes,
        module="MobileNetV3",
        files=("mobilenetv3", "hardcorenas"),
        layers=LAYERS,
        read=_read,
        refusals=refusals,
    ),
    authors=AuthorsCode(nodes=torchvision_feature_nodes),
)

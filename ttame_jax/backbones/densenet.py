"""DenseNet (Huang et al., 2017, arXiv:1608.06993) with bottlenecks and compression (DenseNet-BC)."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ttame_jax.compilers import max_pool

from . import base
from .base import Backbone, chain
from .family import Family, Timm, Torchvision
from .layers import Conv, FrozenBatchNorm, classify
from .tensors import CONV, LINEAR, Table, batch_norm, weights


@dataclass(frozen=True, kw_only=True)
class Architecture(base.Architecture):
    """Number of layers in each of the four dense blocks, and of channels that each layer adds."""

    depths: tuple[int, int, int, int]
    growth: int = 32


class DenseLayer(nnx.Module):
    """Adds `growth` channels: [B, H, W, in] -> [B, H, W, in + growth]."""

    def __init__(self, in_features: int, growth: int, **options):
        self.norm1 = FrozenBatchNorm(in_features)
        self.conv1 = Conv(in_features, 4 * growth, (1, 1), **options)
        self.norm2 = FrozenBatchNorm(4 * growth)
        self.conv2 = Conv(4 * growth, growth, (3, 3), padding=1, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv1(nnx.relu(self.norm1(x)))
        return jnp.concatenate([x, self.conv2(nnx.relu(self.norm2(y)))], axis=-1)


class DenseNet(Backbone):
    """Feature maps: the last three of the four dense blocks (strides 8, 16 and 32), each after the
    BatchNorm and ReLU through which the next layer reads it."""

    architecture: Architecture
    min_size = 29

    def __init__(self, name: str, architecture: Architecture, *, rngs: nnx.Rngs, **options: Any):
        super().__init__(name, architecture, **options)
        depths, growth = architecture.depths, architecture.growth
        self.feature_layers, self.target_layer = ("norms.1", "norms.2", "norms.3"), "norms.3"
        layer_options: dict[str, Any] = {"use_bias": False, "dtype": self.dtype, "rngs": rngs}
        channels = 2 * growth
        self.conv = Conv(3, channels, (7, 7), strides=2, padding=3, **layer_options)
        self.norm = FrozenBatchNorm(channels)
        self.blocks, self.norms, self.transitions = nnx.List(), nnx.List(), nnx.List()
        for i, depth in enumerate(depths):
            if i > 0:
                self.transitions.append(Conv(channels, channels // 2, (1, 1), **layer_options))
                channels //= 2
            block = nnx.List()
            for _ in range(depth):
                block.append(DenseLayer(channels, growth, **layer_options))
                channels += growth
            self.blocks.append(block)
            self.norms.append(FrozenBatchNorm(channels))
        self.head = nnx.Linear(channels, self.num_classes, dtype=jnp.float32, rngs=rngs)

    @property
    def class_weights(self):
        return self.head.kernel[...]

    def named_layers(self):
        layers: list[tuple[str, Callable]] = [("stem", self._stem)]
        for i, (block, norm) in enumerate(zip(self.blocks, self.norms)):
            layers += [(f"blocks.{i}.{j}", layer) for j, layer in enumerate(block)]
            layers.append((f"norms.{i}", lambda x, norm=norm: nnx.relu(norm(x))))
            if i < len(self.transitions):
                layers.append((f"transitions.{i}", partial(_shrink, self.transitions[i])))
        return chain([*layers, ("head", self._classify)])

    def _stem(self, x):
        return max_pool(nnx.relu(self.norm(self.conv(x))), 3, 2, (1, 1))

    def _classify(self, x, classes=None):
        return classify(self.head, x.astype(jnp.float32).mean(axis=(1, 2)), classes)


def _shrink(conv: Conv, x: jax.Array) -> jax.Array:
    """Averages of 2x2 positions and a 1x1 convolution: [B, H, W, C] -> [B, H/2, W/2, C/2]."""
    # PyTorch convolves before it averages. The result is the same, at four times the cost.
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return conv(x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4)))


def _tensors(backbone: DenseNet) -> Table:
    """Both libraries have the same keys."""
    table = weights("features.conv0", "conv", CONV, bias=False) + batch_norm(
        "features.norm0", "norm"
    )
    for i, block in enumerate(backbone.blocks):
        for j in range(len(block)):
            torch, flax = f"features.denseblock{i + 1}.denselayer{j + 1}", f"blocks.{i}.{j}"
            for k in (1, 2):
                table += batch_norm(f"{torch}.norm{k}", f"{flax}.norm{k}")
                table += weights(f"{torch}.conv{k}", f"{flax}.conv{k}", CONV, bias=False)
    for i in range(3):
        torch = f"features.transition{i + 1}"
        table += batch_norm(f"{torch}.norm", f"norms.{i}")
        table += weights(f"{torch}.conv", f"transitions.{i}", CONV, bias=False)
    table += batch_norm("features.norm5", "norms.3")
    return table + weights("classifier", "head", LINEAR)


def _renamed(key: str) -> str:
    """Published files have the names of torchvision's first release: norm.1, conv.2."""
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key)


def _read(module) -> dict[str, Any]:
    blocks = [layer for name, layer in module.features.named_children() if "block" in name]
    return {
        "depths": tuple(len(block) for block in blocks),
        "growth": blocks[0].denselayer1.conv2.out_channels,
    }


PUBLISHED = {
    "densenet121": Architecture(depths=(6, 12, 24, 16)),
    "densenet161": Architecture(depths=(6, 12, 36, 24), growth=48),
    "densenet169": Architecture(depths=(6, 12, 32, 32)),
    "densenet201": Architecture(depths=(6, 12, 48, 32)),
}

FAMILY = Family(
    backbone=DenseNet,
    architecture=Architecture,
    architectures=PUBLISHED,
    torchvision=Torchvision(
        models={name: name for name in PUBLISHED},
        tensors=_tensors,
        feature_nodes=lambda backbone: [
            "features.transition2.relu",
            "features.transition3.relu",
            "features.norm5",  # to which torchvision applies ReLU in place
        ],
        target_node=lambda backbone: "features.norm5",
        renamed=_renamed,
    ),
    timm=Timm(
        models={
            "densenet121": "densenet121.ra_in1k",
            "densenet161": "densenet161.tv_in1k",
            "densenet169": "densenet169.tv_in1k",
            "densenet201": "densenet201.tv_in1k",
        },
        tensors=_tensors,
        feature_nodes=lambda backbone: [
            "features.transition2.norm",
            "features.transition3.norm",
            "features.norm5",
        ],
        module="DenseNet",
        files=("densenet",),
        layers=frozenset(
            [
                "DenseBlock",
                "DenseLayer",
                "DenseTransition",
                "BatchNormAct2d",
                "MaxPool2d",
                "AvgPool2d",
                "Dropout",
            ]
        ),
        read=_read,
    ),
)

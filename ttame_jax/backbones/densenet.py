"""DenseNet (Huang et al., 2017, arXiv:1608.06993)."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ttame_jax.compilers import max_pool

from . import base
from .base import Backbone, chain
from .family import AuthorsCode, Family, Timm, Torchvision
from .layers import Conv, ConvNorm, FrozenBatchNorm, classify
from .tensors import CONV, LINEAR, Table, batch_norm, conv_norm, weights


@dataclass(frozen=True, kw_only=True)
class Architecture(base.Architecture):
    """Number of layers in each of the four dense blocks, and the channels that each layer adds."""

    depths: tuple[int, int, int, int]
    growth: int = 32
    bottleneck: int = 4  # width inside a layer, relative to the growth
    stem: tuple[int, ...] = (64,)  # widths of one 7x7 convolution, or of three 3x3 ones


class DenseLayer(nnx.Module):
    """A bottleneck beside its own input: [B, H, W, in] -> [B, H, W, in + growth]."""

    def __init__(self, in_features: int, inner: int, growth: int, **options):
        self.norm1 = FrozenBatchNorm(in_features)
        self.conv1 = Conv(in_features, inner, (1, 1), **options)
        self.norm2 = FrozenBatchNorm(inner)
        self.conv2 = Conv(inner, growth, (3, 3), padding=1, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv1(nnx.relu(self.norm1(x)))
        return jnp.concatenate([x, self.conv2(nnx.relu(self.norm2(y)))], axis=-1)


class Transition(nnx.Module):
    """Halves resolution and channels: [B, H, W, in] -> [B, H // 2, W // 2, in // 2]."""

    def __init__(self, in_features: int, **options):
        self.norm = FrozenBatchNorm(in_features)
        self.conv = Conv(in_features, in_features // 2, (1, 1), **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        # PyTorch convolves first. The order does not matter, and this one has a quarter of the work.
        return self.conv(nnx.avg_pool(nnx.relu(self.norm(x)), (2, 2), strides=(2, 2)))


class DenseNet(Backbone):
    """Feature maps: the second and third dense block, and the last BatchNorm with its ReLU."""

    architecture: Architecture
    min_size = 29  # below it, the last transition has nothing left to pool

    def __init__(self, name: str, architecture: Architecture, *, rngs: nnx.Rngs, **options: Any):
        super().__init__(name, architecture, **options)
        ends = [f"blocks.{i}.{depth - 1}" for i, depth in enumerate(architecture.depths)]
        self.feature_layers, self.target_layer = (*ends[1:3], "norm"), "norm"
        layer_options: dict[str, Any] = {"use_bias": False, "dtype": self.dtype, "rngs": rngs}
        growth, inner = architecture.growth, architecture.bottleneck * architecture.growth
        channels, self.stem = 3, nnx.List()
        kernel = 7 if len(architecture.stem) == 1 else 3
        for width in architecture.stem:
            stride = 1 if self.stem else 2
            self.stem.append(ConvNorm(channels, width, kernel, stride, **layer_options))
            channels = width
        self.blocks, self.transitions = nnx.List(), nnx.List()
        for depth in architecture.depths:
            if self.blocks:
                self.transitions.append(Transition(channels, **layer_options))
                channels //= 2
            block = nnx.List()
            for _ in range(depth):
                block.append(DenseLayer(channels, inner, growth, **layer_options))
                channels += growth
            self.blocks.append(block)
        self.norm = FrozenBatchNorm(channels)
        self.head = nnx.Linear(channels, self.num_classes, dtype=jnp.float32, rngs=rngs)

    @property
    def class_weights(self):
        return self.head.kernel[...]

    def named_layers(self):
        layers = [("stem", self._stem)]
        for i, block in enumerate(self.blocks):
            if i:
                layers.append((f"transitions.{i - 1}", self.transitions[i - 1]))
            layers += [(f"blocks.{i}.{j}", layer) for j, layer in enumerate(block)]
        norm = ("norm", lambda x: nnx.relu(self.norm(x)))
        return chain([*layers, norm, ("head", self._classify)])

    def _stem(self, x):
        for convolution in self.stem:
            x = nnx.relu(convolution(x))
        return max_pool(x, 3, 2, (1, 1))

    def _classify(self, x, classes=None):
        return classify(self.head, x.astype(jnp.float32).mean(axis=(1, 2)), classes)


def _tensors(backbone: DenseNet) -> Table:
    table = []
    for i in range(len(backbone.stem)):
        table += conv_norm(f"features.conv{i}", f"features.norm{i}", f"stem.{i}")
    for i, block in enumerate(backbone.blocks):
        for j in range(len(block)):
            torch, flax = f"features.denseblock{i + 1}.denselayer{j + 1}", f"blocks.{i}.{j}"
            for k in (1, 2):
                table += batch_norm(f"{torch}.norm{k}", f"{flax}.norm{k}")
                table += weights(f"{torch}.conv{k}", f"{flax}.conv{k}", CONV, bias=False)
    for i in range(len(backbone.transitions)):
        torch, flax = f"features.transition{i + 1}", f"transitions.{i}"
        table += batch_norm(f"{torch}.norm", f"{flax}.norm")
        table += weights(f"{torch}.conv", f"{flax}.conv", CONV, bias=False)
    return table + batch_norm("features.norm5", "norm") + weights("classifier", "head", LINEAR)


def _renamed(key: str) -> str:
    """Published files have the names of torchvision's first release: norm.1, conv.2."""
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key)


def _feature_nodes(backbone: DenseNet) -> list[str]:
    # torchvision's last ReLU works in place, on the output of norm5. timm's is a part of norm5.
    return [f"features.{name}" for name in ("denseblock2", "denseblock3", "norm5")]


def _refusals(module) -> Iterator[str]:
    pool = type(module.features.pool0).__name__
    if pool != "MaxPool2d":
        yield f"pools its stem by {pool}"


def _read(module) -> dict[str, Any]:
    features = module.features
    layer = features.denseblock1.denselayer1
    growth = layer.conv2.out_channels
    stem = [getattr(features, f"conv{i}", None) for i in range(3)]
    return {
        "depths": tuple(len(getattr(features, f"denseblock{k}")) for k in (1, 2, 3, 4)),
        "growth": growth,
        "bottleneck": layer.conv1.out_channels // growth,
        "stem": tuple(conv.out_channels for conv in stem if conv is not None),
    }


ARCHITECTURES = {
    "densenet121": Architecture(depths=(6, 12, 24, 16)),
    "densenet161": Architecture(depths=(6, 12, 36, 24), growth=48, stem=(96,)),
    "densenet169": Architecture(depths=(6, 12, 32, 32)),
    "densenet201": Architecture(depths=(6, 12, 48, 32)),
}

FAMILY = Family(
    backbone=DenseNet,
    architecture=Architecture,
    architectures=ARCHITECTURES,
    torchvision=Torchvision(
        models={name: name for name in ARCHITECTURES},
        tensors=_tensors,
        feature_nodes=_feature_nodes,
        target_node=lambda backbone: _feature_nodes(backbone)[-1],
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
        feature_nodes=_feature_nodes,
        module="DenseNet",
        files=("densenet",),
        layers=frozenset(
            ["DenseBlock", "DenseLayer", "DenseTransition", "BatchNormAct2d", "MaxPool2d"]
            + ["AvgPool2d", "Dropout"]
        ),
        read=_read,
        refusals=_refusals,
    ),
    authors=AuthorsCode(nodes=_feature_nodes),
)

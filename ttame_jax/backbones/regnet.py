"""RegNet X and Y (Radosavovic et al., 2020, arXiv:2003.13678)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from . import base
from .base import Backbone, chain
from .family import AuthorsCode, Family, Timm, Torchvision
from .layers import ConvNorm, SqueezeExcite, classify
from .tensors import LINEAR, Table, conv_norm, squeeze_excite, weights


@dataclass(frozen=True, kw_only=True)
class Architecture(base.Architecture):
    """Number and width of the blocks in each of the four stages."""

    depths: tuple[int, int, int, int]
    widths: tuple[int, int, int, int]
    group_width: int  # channels per group of a block's 3x3 convolution
    squeeze: bool = False  # squeeze-and-excitation (RegNetY)
    stem: int = 32


class Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut: [B, H, W, in] ->
    [B, H/stride, W/stride, width].

    Squeeze-and-excitation has a quarter of the block's input channels.
    """

    def __init__(
        self, in_features: int, width: int, stride: int, architecture: Architecture, **options
    ):
        groups = width // min(architecture.group_width, width)
        self.conv1 = ConvNorm(in_features, width, 1, **options)
        self.conv2 = ConvNorm(width, width, 3, stride, feature_group_count=groups, **options)
        self.squeeze_excite = (
            SqueezeExcite(width, round(in_features / 4), **options)
            if architecture.squeeze
            else None
        )
        self.conv3 = ConvNorm(width, width, 1, **options)
        self.downsample = (
            ConvNorm(in_features, width, 1, stride, **options)
            if stride > 1 or in_features != width
            else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = nnx.relu(self.conv2(nnx.relu(self.conv1(x))))
        if self.squeeze_excite is not None:
            x = self.squeeze_excite(x)
        return nnx.relu(self.conv3(x) + shortcut)


class RegNet(Backbone):
    """Feature maps: the last three of the four stages."""

    architecture: Architecture

    def __init__(self, name: str, architecture: Architecture, *, rngs: nnx.Rngs, **options: Any):
        super().__init__(name, architecture, **options)
        ends = tuple(f"stages.{i}.{depth - 1}" for i, depth in enumerate(architecture.depths))
        self.feature_layers, self.target_layer = ends[-3:], ends[-1]
        layer_options: dict[str, Any] = {"dtype": self.dtype, "rngs": rngs}
        channels = architecture.stem
        self.stem = ConvNorm(3, channels, 3, 2, **layer_options)
        self.stages = nnx.List()
        for depth, width in zip(architecture.depths, architecture.widths):
            stage = nnx.List()
            for i in range(depth):
                stride = 2 if i == 0 else 1
                stage.append(Bottleneck(channels, width, stride, architecture, **layer_options))
                channels = width
            self.stages.append(stage)
        self.head = nnx.Linear(channels, self.num_classes, dtype=jnp.float32, rngs=rngs)

    @property
    def class_weights(self):
        return self.head.kernel[...]

    def named_layers(self):
        blocks = [
            (f"stages.{i}.{j}", block)
            for i, stage in enumerate(self.stages)
            for j, block in enumerate(stage)
        ]
        stem = ("stem", lambda x: nnx.relu(self.stem(x)))
        return chain([stem, *blocks, ("head", self._classify)])

    def _classify(self, x, classes=None):
        return classify(self.head, x.astype(jnp.float32).mean(axis=(1, 2)), classes)


def _timm_tensors(backbone: RegNet) -> Table:
    parts = {f"conv{k}": f"conv{k}" for k in (1, 2, 3)}
    parts |= {"squeeze_excite": "se", "downsample": "downsample"}
    return _tensors(backbone, _timm_block, parts, "conv", "bn") + weights("head.fc", "head", LINEAR)


def _timm_block(stage: int, block: int) -> str:
    return f"s{stage + 1}.b{block + 1}"


def _torchvision_tensors(backbone: RegNet) -> Table:
    parts = {"conv1": "f.a", "conv2": "f.b", "squeeze_excite": "f.se", "conv3": "f.c"}
    parts |= {"downsample": "proj"}
    return _tensors(backbone, _torchvision_block, parts, "0", "1") + weights("fc", "head", LINEAR)


def _torchvision_block(stage: int, block: int) -> str:
    return f"trunk_output.block{stage + 1}.block{stage + 1}-{block}"


def _tensors(
    backbone: RegNet,
    name: Callable[[int, int], str],
    parts: dict[str, str],
    conv: str,
    norm: str,
) -> Table:
    """The tensors of stem and blocks. `name` is PyTorch's of a block, `parts` those of its parts."""
    table = conv_norm(f"stem.{conv}", f"stem.{norm}", "stem")
    for i, stage in enumerate(backbone.stages):
        for j, block in enumerate(stage):
            for part, torch in parts.items():
                torch, flax = f"{name(i, j)}.{torch}", f"stages.{i}.{j}.{part}"
                if getattr(block, part) is None:
                    continue
                if part == "squeeze_excite":
                    table += squeeze_excite(f"{torch}.fc1", f"{torch}.fc2", flax)
                else:
                    table += conv_norm(f"{torch}.{conv}", f"{torch}.{norm}", flax)
    return table


def _torchvision_nodes(backbone: RegNet) -> list[str]:
    return [f"trunk_output.block{k}" for k in (2, 3, 4)]


def _read(module) -> dict[str, Any]:
    stages = [list(stage.children()) for stage in (module.s1, module.s2, module.s3, module.s4)]
    convolution = stages[-1][0].conv2.conv
    return {
        "depths": tuple(map(len, stages)),
        "widths": tuple(stage[0].conv3.conv.out_channels for stage in stages),
        "group_width": convolution.in_channels // convolution.groups,
        "squeeze": type(stages[0][0].se).__name__ == "SEModule",
        "stem": module.stem.conv.out_channels,
    }


# Depths, widths and group width of torchvision's models.
SIZES = {
    "x_400mf": ((1, 2, 7, 12), (32, 64, 160, 400), 16),
    "x_800mf": ((1, 3, 7, 5), (64, 128, 288, 672), 16),
    "x_1_6gf": ((2, 4, 10, 2), (72, 168, 408, 912), 24),
    "x_3_2gf": ((2, 6, 15, 2), (96, 192, 432, 1008), 48),
    "x_8gf": ((2, 5, 15, 1), (80, 240, 720, 1920), 120),
    "x_16gf": ((2, 6, 13, 1), (256, 512, 896, 2048), 128),
    "x_32gf": ((2, 7, 13, 1), (336, 672, 1344, 2520), 168),
    "y_400mf": ((1, 3, 6, 6), (48, 104, 208, 440), 8),
    "y_800mf": ((1, 3, 8, 2), (64, 144, 320, 784), 16),
    "y_1_6gf": ((2, 6, 17, 2), (48, 120, 336, 888), 24),
    "y_3_2gf": ((2, 5, 13, 1), (72, 216, 576, 1512), 24),
    "y_8gf": ((2, 4, 10, 1), (224, 448, 896, 2016), 56),
    "y_16gf": ((2, 4, 11, 1), (224, 448, 1232, 3024), 112),
    "y_32gf": ((2, 5, 12, 1), (232, 696, 1392, 3712), 232),
}
ARCHITECTURES = {
    f"regnet_{name}": Architecture(
        depths=depths, widths=widths, group_width=group_width, squeeze=name.startswith("y")
    )
    for name, (depths, widths, group_width) in SIZES.items()
}

FAMILY = Family(
    backbone=RegNet,
    architecture=Architecture,
    architectures=ARCHITECTURES,
    torchvision=Torchvision(
        models={name: name for name in ARCHITECTURES},
        tensors=_torchvision_tensors,
        feature_nodes=_torchvision_nodes,
        target_node=lambda backbone: _torchvision_block(3, backbone.architecture.depths[-1] - 1),
    ),
    timm=Timm(
        models={
            "regnet_x_400mf": "regnetx_004_tv.tv2_in1k",
            "regnet_x_800mf": "regnetx_008.tv2_in1k",
            "regnet_x_1_6gf": "regnetx_016.tv2_in1k",
            "regnet_x_3_2gf": "regnetx_032.tv2_in1k",
            "regnet_x_8gf": "regnetx_080.tv2_in1k",
            "regnet_x_16gf": "regnetx_160.tv2_in1k",
            "regnet_x_32gf": "regnetx_320.tv2_in1k",
            "regnet_y_400mf": "regnety_004.tv2_in1k",
            "regnet_y_800mf": "regnety_008_tv.tv2_in1k",
            "regnet_y_1_6gf": "regnety_016.tv2_in1k",
            "regnet_y_3_2gf": "regnety_032.ra_in1k",
            "regnet_y_8gf": "regnety_080_tv.tv2_in1k",
            "regnet_y_16gf": "regnety_160.sw_in12k_ft_in1k",
            "regnet_y_32gf": "regnety_320.tv2_in1k",
        },
        tensors=_timm_tensors,
        feature_nodes=lambda backbone: ["s2", "s3", "s4"],
        module="RegNet",
        files=("regnet",),
        layers=frozenset(
            ["RegStage", "Bottleneck", "ConvNormAct", "BatchNormAct2d", "SEModule", "Sigmoid"]
            + ["ClassifierHead", "Dropout"]
        ),
        read=_read,
    ),
    authors=AuthorsCode(nodes=_torchvision_nodes),
)

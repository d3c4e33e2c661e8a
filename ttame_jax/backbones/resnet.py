"""ResNet (He et al., 2016, arXiv:1512.03385) and ResNeXt. Bottlenecks have their stride in the 3x3
convolution, as in torchvision and timm (ResNet v1.5)."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from ttame_jax.compilers import max_pool
from ttame_jax.files import Tensors
from ttame_jax.preprocessing import DIGITS

from . import base
from .base import Backbone, chain
from .family import AuthorsCode, Family, HuggingFace, Timm, Torchvision
from .layers import Conv, ConvNorm, FrozenBatchNorm, SqueezeExcite, classify
from .tensors import CONV, LINEAR, Table, batch_norm, conv_norm, renamed, squeeze_excite, weights


@dataclass(frozen=True, kw_only=True)
class Architecture(base.Architecture):
    """Kind and number of blocks in each of the four layers, and timm's refinements."""

    block: Literal["basic", "bottleneck"]
    depths: tuple[int, int, int, int]
    widths: tuple[int, int, int, int] = (64, 128, 256, 512)
    stem: tuple[int, ...] = (64,)  # widths of one 7x7 convolution, or of three 3x3 ones
    groups: int = 1  # of a bottleneck's 3x3 convolution (ResNeXt)
    base_width: int = 64  # its channels per group where the layer is 64 wide (Wide ResNet)
    average_down: bool = False  # shortcuts average, then convolve without stride (ResNet-D)
    squeeze: bool = False  # squeeze-and-excitation after a block's last BatchNorm (SE-ResNet)


class Downsample(nnx.Module):
    """The shortcut where a block changes shape: strided 1x1 convolution and BatchNorm."""

    def __init__(self, in_features: int, out_features: int, stride: int, average: bool, **options):
        self.pool = stride if average else 1
        stride //= self.pool
        self.conv = Conv(in_features, out_features, (1, 1), strides=stride, **options)
        self.bn = FrozenBatchNorm(out_features)

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.pool > 1:
            # An odd side's last row is averaged alone, as PyTorch's ceil_mode does.
            x = nnx.avg_pool(x, (2, 2), strides=(2, 2), padding="SAME", count_include_pad=False)
        return self.bn(self.conv(x))


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions beside a shortcut: [B, H, W, in] -> [B, H/stride, W/stride, width]."""

    expansion = 1
    num_convs = 2

    def __init__(
        self, in_features: int, width: int, stride: int, architecture: Architecture, **options
    ):
        self.conv1 = Conv(in_features, width, (3, 3), strides=stride, padding=1, **options)
        self.bn1 = FrozenBatchNorm(width)
        self.conv2 = Conv(width, width, (3, 3), padding=1, **options)
        self.bn2 = FrozenBatchNorm(width)
        self.squeeze_excite = _squeeze_excite(width, architecture, options)
        self.downsample = _shortcut(in_features, width, stride, architecture, options)

    def __call__(self, x: jax.Array) -> jax.Array:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = nnx.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        x = x if self.squeeze_excite is None else self.squeeze_excite(x)
        return nnx.relu(x + shortcut)


class Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut: [B, H, W, in] ->
    [B, H/stride, W/stride, 4 * width]."""

    expansion = 4
    num_convs = 3

    def __init__(
        self, in_features: int, width: int, stride: int, architecture: Architecture, **options
    ):
        out_features = self.expansion * width
        groups = architecture.groups
        inner = width * architecture.base_width // 64 * groups
        self.conv1 = Conv(in_features, inner, (1, 1), **options)
        self.bn1 = FrozenBatchNorm(inner)
        self.conv2 = Conv(
            inner,
            inner,
            (3, 3),
            strides=stride,
            padding=1,
            feature_group_count=groups,
            **options,
        )
        self.bn2 = FrozenBatchNorm(inner)
        self.conv3 = Conv(inner, out_features, (1, 1), **options)
        self.bn3 = FrozenBatchNorm(out_features)
        self.squeeze_excite = _squeeze_excite(out_features, architecture, options)
        self.downsample = _shortcut(in_features, out_features, stride, architecture, options)

    def __call__(self, x: jax.Array) -> jax.Array:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = nnx.relu(self.bn1(self.conv1(x)))
        x = nnx.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        x = x if self.squeeze_excite is None else self.squeeze_excite(x)
        return nnx.relu(x + shortcut)


def _shortcut(in_features, out_features, stride, architecture, options) -> Downsample | None:
    if stride == 1 and in_features == out_features:
        return None
    return Downsample(in_features, out_features, stride, architecture.average_down, **options)


def _squeeze_excite(width, architecture, options) -> SqueezeExcite | None:
    if not architecture.squeeze:
        return None
    # A sixteenth, to the nearest multiple of 8.
    squeezed = max((width + 64) // 128 * 8, 8)
    return SqueezeExcite(width, squeezed, dtype=options["dtype"], rngs=options["rngs"])


BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}


class ResNet(Backbone):
    """Feature maps: the last three of the four layers."""

    architecture: Architecture

    def __init__(self, name: str, architecture: Architecture, *, rngs: nnx.Rngs, **options: Any):
        super().__init__(name, architecture, **options)
        ends = tuple(f"layers.{i}.{depth - 1}" for i, depth in enumerate(architecture.depths))
        self.feature_layers, self.target_layer = ends[-3:], ends[-1]
        layer_options: dict[str, Any] = {"use_bias": False, "dtype": self.dtype, "rngs": rngs}
        channels, self.stem = 3, nnx.List()
        for width in architecture.stem[:-1]:
            self.stem.append(ConvNorm(channels, width, 3, 1 if self.stem else 2, **layer_options))
            channels = width
        kernel, stride = (3, 1) if self.stem else (7, 2)
        self.conv1 = Conv(
            channels,
            architecture.stem[-1],
            (kernel, kernel),
            strides=stride,
            padding=kernel // 2,
            **layer_options,
        )
        channels = architecture.stem[-1]
        self.bn1 = FrozenBatchNorm(channels)
        self.layers = nnx.List()
        block = BLOCKS[architecture.block]
        for i, (depth, width) in enumerate(zip(architecture.depths, architecture.widths)):
            layer: nnx.List[BasicBlock | Bottleneck] = nnx.List()
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                layer.append(block(channels, width, stride, architecture, **layer_options))
                channels = width * block.expansion
            self.layers.append(layer)
        self.fc = nnx.Linear(channels, self.num_classes, dtype=jnp.float32, rngs=rngs)

    @property
    def class_weights(self):
        return self.fc.kernel[...]

    def named_layers(self):
        blocks = [
            (f"layers.{i}.{j}", block)
            for i, layer in enumerate(self.layers)
            for j, block in enumerate(layer)
        ]
        return chain([("stem", self._stem), *blocks, ("head", self._classify)])

    def _stem(self, x):
        for convolution in self.stem:
            x = nnx.relu(convolution(x))
        return max_pool(nnx.relu(self.bn1(self.conv1(x))), 3, 2, (1, 1))

    def _classify(self, x, classes=None):
        return classify(self.fc, x.astype(jnp.float32).mean(axis=(1, 2)), classes)


def _torchvision_tensors(backbone: ResNet) -> Table:
    return _tensors(backbone, "conv1", "downsample.0", "downsample.1")


def _timm_tensors(backbone: ResNet) -> Table:
    # A stem of several convolutions is one flat list: convolution, norm, ReLU, convolution, ...
    table = []
    for i in range(len(backbone.stem)):
        table += conv_norm(f"conv1.{3 * i}", f"conv1.{3 * i + 1}", f"stem.{i}")
    for i, layer in enumerate(backbone.layers):
        for j, block in enumerate(layer):
            if block.squeeze_excite is not None:
                torch = f"layer{i + 1}.{j}.se"
                flax = f"layers.{i}.{j}.squeeze_excite"
                table += squeeze_excite(f"{torch}.fc1", f"{torch}.fc2", flax)
    last = f"conv1.{3 * len(backbone.stem)}" if backbone.stem else "conv1"
    first = int(backbone.architecture.average_down)  # pooling comes first in the shortcut's list
    return table + _tensors(backbone, last, f"downsample.{first}", f"downsample.{first + 1}")


def _tensors(backbone: ResNet, conv1: str, down_conv: str, down_norm: str) -> Table:
    table = weights(conv1, "conv1", CONV, bias=False) + batch_norm("bn1", "bn1")
    for i, layer in enumerate(backbone.layers, 1):
        for j, block in enumerate(layer):
            torch, flax = f"layer{i}.{j}", f"layers.{i - 1}.{j}"
            for k in range(1, 1 + block.num_convs):
                table += weights(f"{torch}.conv{k}", f"{flax}.conv{k}", CONV, bias=False)
                table += batch_norm(f"{torch}.bn{k}", f"{flax}.bn{k}")
            if block.downsample is not None:
                names = (f"{torch}.{down_conv}", f"{torch}.{down_norm}")
                table += conv_norm(*names, f"{flax}.downsample")
    return table + weights("fc", "fc", LINEAR)


def _feature_nodes(backbone: ResNet) -> list[str]:
    return ["layer2", "layer3", "layer4"]


def _refusals(module):
    pool = type(module.maxpool).__name__
    if pool != "MaxPool2d":
        yield f"pools its stem by {pool}"


def _read(module) -> dict[str, Any]:
    layers = (module.layer1, module.layer2, module.layer3, module.layer4)
    block = layers[0][0]
    stem = [module.conv1] if hasattr(module.conv1, "weight") else module.conv1
    fields = {
        "block": type(block).__name__.lower().removesuffix("block"),
        "depths": tuple(len(layer) for layer in layers),
        "widths": tuple(layer[0].bn2.num_features for layer in layers),
        "stem": tuple(layer.out_channels for layer in stem if hasattr(layer, "out_channels")),
        "average_down": len(layers[1][0].downsample) == 3,
        "squeeze": type(block.se).__name__ == "SEModule",
    }
    if hasattr(block, "conv3"):
        groups, expansion = block.conv2.groups, block.expansion
        widths = tuple(layer[0].conv3.out_channels // expansion for layer in layers)
        base_width = 64 * block.conv2.out_channels // groups // widths[0]
        fields |= {"widths": widths, "groups": groups, "base_width": base_width}
    return fields


PUBLISHED = {
    "resnet18": Architecture(block="basic", depths=(2, 2, 2, 2)),
    "resnet34": Architecture(block="basic", depths=(3, 4, 6, 3)),
    "resnet50": Architecture(block="bottleneck", depths=(3, 4, 6, 3)),
    "resnet101": Architecture(block="bottleneck", depths=(3, 4, 23, 3)),
    "resnet152": Architecture(block="bottleneck", depths=(3, 8, 36, 3)),
}
DIGITS_CNN = Architecture(
    block="basic",
    depths=(1, 1, 1, 1),
    widths=(16, 32, 64, 128),
    stem=(16,),
    num_classes=10,
    preprocessing=DIGITS,
)


def _huggingface_read(config: Mapping[str, Any]) -> dict[str, Any]:
    expansion = 4 if config["layer_type"] == "bottleneck" else 1
    return {
        "block": config["layer_type"],
        "depths": tuple(config["depths"]),
        "widths": tuple(size // expansion for size in config["hidden_sizes"]),
        "stem": (config["embedding_size"],),
    }


def _huggingface_refusals(config: Mapping[str, Any]) -> Iterator[str]:
    for option in ("downsample_in_bottleneck", "downsample_in_first_stage"):
        if config.get(option):
            yield f"has {option}"
    if config["hidden_act"] != "relu":
        yield f"has the activation {config['hidden_act']}"


def _huggingface_renamed(tensors: Tensors) -> Tensors:
    def layer(match: re.Match) -> str:
        stage, block, i = (int(match[name]) for name in ("stage", "block", "i"))
        kind = "conv" if match["kind"] == "convolution" else "bn"
        return f"layer{stage + 1}.{block}.{kind}{i + 1}."

    def shortcut(match: re.Match) -> str:
        which = 0 if match["kind"] == "convolution" else 1
        return f"layer{int(match['stage']) + 1}.{match['block']}.downsample.{which}."

    block = r"^resnet\.encoder\.stages\.(?P<stage>\d+)\.layers\.(?P<block>\d+)\."
    kind = r"\.(?P<kind>convolution|normalization)\."
    names = {
        r"^resnet\.embedder\.embedder\.convolution\.": "conv1.",
        r"^resnet\.embedder\.embedder\.normalization\.": "bn1.",
        block + r"layer\.(?P<i>\d+)" + kind: layer,
        block + "shortcut" + kind: shortcut,
        r"^classifier\.1\.": "fc.",
    }
    is_theirs = any(key.startswith("resnet.") for key in tensors)
    return renamed(tensors, names) if is_theirs else tensors


FAMILY = Family(
    backbone=ResNet,
    architecture=Architecture,
    architectures={**PUBLISHED, "digits_cnn": DIGITS_CNN},
    torchvision=Torchvision(
        models={name: name for name in PUBLISHED},
        tensors=_torchvision_tensors,
        feature_nodes=_feature_nodes,
        target_node=lambda backbone: f"layer4.{backbone.architecture.depths[-1] - 1}",
    ),
    timm=Timm(
        models={
            "resnet18": "resnet18.a1_in1k",
            "resnet34": "resnet34.a1_in1k",
            "resnet50": "resnet50.a1_in1k",
            "resnet101": "resnet101.a1h_in1k",
            "resnet152": "resnet152.a1h_in1k",
        },
        tensors=_timm_tensors,
        feature_nodes=_feature_nodes,
        module="ResNet",
        files=("resnet",),
        layers=frozenset(
            ["BasicBlock", "Bottleneck", "SEModule", "Sigmoid", "MaxPool2d", "AvgPool2d"]
        ),
        read=_read,
        refusals=_refusals,
    ),
    huggingface=HuggingFace(
        model_types=("resnet",),
        read=_huggingface_read,
        refusals=_huggingface_refusals,
        renamed=_huggingface_renamed,
    ),
    authors=AuthorsCode(nodes=_feature_nodes),
)

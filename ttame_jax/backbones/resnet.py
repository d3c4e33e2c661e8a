"""ResNet (He et al., 2016, arXiv:1512.03385); bottlenecks stride in their 3x3 convolution, as
torchvision's and timm's do (ResNet v1.5)."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from .base import DIGITS, IMAGENET, Backbone, Preprocessing, chain
from .layers import Conv, FrozenBatchNorm, classify, max_pool


@dataclass(frozen=True)
class Variant:
    """Kind and number of blocks in each of the four layers, and timm's refinements."""

    block: Literal["basic", "bottleneck"]
    depths: tuple[int, int, int, int]
    widths: tuple[int, int, int, int] = (64, 128, 256, 512)
    stem: tuple[int, ...] = (64,)  # one 7x7 convolution, or three of 3x3, of these widths
    groups: int = 1  # of a bottleneck's 3x3 convolution (ResNeXt)
    base_width: int = 64  # its channels a group, where the layer is 64 wide (Wide ResNet)
    average_down: bool = False  # shortcuts average, then convolve without stride (ResNet-D)
    num_classes: int = 1000
    preprocessing: Preprocessing = IMAGENET


class ConvNorm(nnx.Module):
    """Convolution and BatchNorm."""

    def __init__(self, in_features: int, out_features: int, kernel: int, stride: int, **options):
        self.conv = Conv(
            in_features,
            out_features,
            (kernel, kernel),
            strides=stride,
            padding=kernel // 2,
            **options,
        )
        self.bn = FrozenBatchNorm(out_features)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.bn(self.conv(x))


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

    def __init__(self, in_features: int, width: int, stride: int, variant: Variant, **options):
        self.conv1 = Conv(in_features, width, (3, 3), strides=stride, padding=1, **options)
        self.bn1 = FrozenBatchNorm(width)
        self.conv2 = Conv(width, width, (3, 3), padding=1, **options)
        self.bn2 = FrozenBatchNorm(width)
        self.downsample = _shortcut(in_features, width, stride, variant, options)

    def __call__(self, x: jax.Array) -> jax.Array:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = nnx.relu(self.bn1(self.conv1(x)))
        return nnx.relu(self.bn2(self.conv2(x)) + shortcut)


class Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut: [B, H, W, in] ->
    [B, H/stride, W/stride, 4 * width]."""

    expansion = 4
    num_convs = 3

    def __init__(self, in_features: int, width: int, stride: int, variant: Variant, **options):
        out_features = self.expansion * width
        groups = variant.groups
        inner = width * variant.base_width // 64 * groups
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
        self.downsample = _shortcut(in_features, out_features, stride, variant, options)

    def __call__(self, x: jax.Array) -> jax.Array:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = nnx.relu(self.bn1(self.conv1(x)))
        x = nnx.relu(self.bn2(self.conv2(x)))
        return nnx.relu(self.bn3(self.conv3(x)) + shortcut)


def _shortcut(in_features, out_features, stride, variant, options) -> Downsample | None:
    if stride == 1 and in_features == out_features:
        return None
    return Downsample(in_features, out_features, stride, variant.average_down, **options)


BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}

VARIANTS = {
    "resnet18": Variant("basic", (2, 2, 2, 2)),
    "resnet34": Variant("basic", (3, 4, 6, 3)),
    "resnet50": Variant("bottleneck", (3, 4, 6, 3)),
    "resnet101": Variant("bottleneck", (3, 4, 23, 3)),
    "resnet152": Variant("bottleneck", (3, 8, 36, 3)),
    "digits_cnn": Variant(
        "basic",
        (1, 1, 1, 1),
        widths=(16, 32, 64, 128),
        stem=(16,),
        num_classes=10,
        preprocessing=DIGITS,
    ),
}


class ResNet(Backbone):
    """Feature maps: the last three of the four layers."""

    def __init__(
        self,
        name: str,
        *,
        num_classes: int | None = None,
        preprocessing: Preprocessing | None = None,
        image_size: int | None = None,
        architecture: Variant | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        variant = architecture or VARIANTS[name]
        super().__init__(
            name,
            num_classes or variant.num_classes,
            preprocessing or variant.preprocessing,
            image_size,
            dtype,
            architecture,
        )
        self.variant = variant
        ends = tuple(f"layers.{i}.{depth - 1}" for i, depth in enumerate(variant.depths))
        self.feature_layers, self.target_layer = ends[-3:], ends[-1]
        options = {"use_bias": False, "dtype": self.dtype, "rngs": rngs}
        features, self.stem = 3, nnx.List()
        for width in variant.stem[:-1]:
            self.stem.append(ConvNorm(features, width, 3, 1 if self.stem else 2, **options))
            features = width
        kernel, stride = (3, 1) if self.stem else (7, 2)
        self.conv1 = Conv(
            features,
            variant.stem[-1],
            (kernel, kernel),
            strides=stride,
            padding=kernel // 2,
            **options,
        )
        features = variant.stem[-1]
        self.bn1 = FrozenBatchNorm(features)
        self.layers = nnx.List()
        block = BLOCKS[variant.block]
        for i, (depth, width) in enumerate(zip(variant.depths, variant.widths)):
            layer = nnx.List()
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                layer.append(block(features, width, stride, variant, **options))
                features = width * block.expansion
            self.layers.append(layer)
        self.fc = nnx.Linear(features, self.num_classes, dtype=jnp.float32, rngs=rngs)

    @property
    def class_weights(self):
        return self.fc.kernel[...]

    def named_layers(self):
        blocks = [
            (f"layers.{i}.{j}", block)
            for i, layer in enumerate(self.layers)
            for j, block in enumerate(layer)
        ]
        return chain([("stem", self._begin), *blocks, ("head", self._classify)])

    def _begin(self, x):
        for convolution in self.stem:
            x = nnx.relu(convolution(x))
        return max_pool(nnx.relu(self.bn1(self.conv1(x))), 3, 2, (1, 1))

    def _classify(self, x, classes=None):
        return classify(self.fc, x.astype(jnp.float32).mean(axis=(1, 2)), classes)

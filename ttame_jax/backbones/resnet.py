"""ResNet (He et al., 2016, arXiv:1512.03385); bottlenecks stride in their 3x3 convolution, as
torchvision's and timm's do (ResNet v1.5)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from .base import IMAGENET, Backbone, Preprocessing
from .layers import Conv, FrozenBatchNorm


class Downsample(nnx.Module):
    """The shortcut where a block changes shape: strided 1x1 convolution and BatchNorm."""

    def __init__(self, in_features: int, out_features: int, stride: int, **options):
        self.conv = Conv(in_features, out_features, (1, 1), strides=stride, **options)
        self.bn = FrozenBatchNorm(out_features)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.bn(self.conv(x))


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions beside a shortcut: [B, H, W, in] -> [B, H/stride, W/stride, width]."""

    expansion = 1
    num_convs = 2

    def __init__(self, in_features: int, width: int, stride: int, **options):
        self.conv1 = Conv(in_features, width, (3, 3), strides=stride, padding=1, **options)
        self.bn1 = FrozenBatchNorm(width)
        self.conv2 = Conv(width, width, (3, 3), padding=1, **options)
        self.bn2 = FrozenBatchNorm(width)
        same = stride == 1 and in_features == width
        self.downsample = None if same else Downsample(in_features, width, stride, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = nnx.relu(self.bn1(self.conv1(x)))
        return nnx.relu(self.bn2(self.conv2(x)) + shortcut)


class Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut: [B, H, W, in] ->
    [B, H/stride, W/stride, 4 * width]."""

    expansion = 4
    num_convs = 3

    def __init__(self, in_features: int, width: int, stride: int, **options):
        out_features = self.expansion * width
        self.conv1 = Conv(in_features, width, (1, 1), **options)
        self.bn1 = FrozenBatchNorm(width)
        self.conv2 = Conv(width, width, (3, 3), strides=stride, padding=1, **options)
        self.bn2 = FrozenBatchNorm(width)
        self.conv3 = Conv(width, out_features, (1, 1), **options)
        self.bn3 = FrozenBatchNorm(out_features)
        same = stride == 1 and in_features == out_features
        self.downsample = None if same else Downsample(in_features, out_features, stride, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = nnx.relu(self.bn1(self.conv1(x)))
        x = nnx.relu(self.bn2(self.conv2(x)))
        return nnx.relu(self.bn3(self.conv3(x)) + shortcut)


@dataclass(frozen=True)
class Variant:
    """Kind and number of blocks in each of the four layers; the width doubles with the layer."""

    block: type[BasicBlock] | type[Bottleneck]
    depths: tuple[int, int, int, int]
    width: int = 64
    num_classes: int = 1000
    preprocessing: Preprocessing = IMAGENET


VARIANTS = {
    "resnet18": Variant(BasicBlock, (2, 2, 2, 2)),
    "resnet34": Variant(BasicBlock, (3, 4, 6, 3)),
    "resnet50": Variant(Bottleneck, (3, 4, 6, 3)),
    "resnet101": Variant(Bottleneck, (3, 4, 23, 3)),
    "resnet152": Variant(Bottleneck, (3, 8, 36, 3)),
    "digits_cnn": Variant(
        BasicBlock,
        (1, 1, 1, 1),
        width=16,
        num_classes=10,
        preprocessing=Preprocessing(image_size=64, resize_size=64),
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
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        variant = VARIANTS[name]
        super().__init__(
            name,
            num_classes or variant.num_classes,
            preprocessing or variant.preprocessing,
            image_size,
            dtype,
        )
        options = {"use_bias": False, "dtype": self.dtype, "rngs": rngs}
        features = variant.width
        self.conv1 = Conv(3, features, (7, 7), strides=2, padding=3, **options)
        self.bn1 = FrozenBatchNorm(features)
        self.layers = nnx.List()
        for i, depth in enumerate(variant.depths):
            layer = nnx.List()
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                block = variant.block(features, variant.width * 2**i, stride, **options)
                layer.append(block)
                features = variant.width * 2**i * block.expansion
            self.layers.append(layer)
        self.fc = nnx.Linear(features, self.num_classes, dtype=jnp.float32, rngs=rngs)

    def forward(self, x):
        x = nnx.relu(self.bn1(self.conv1(x)))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        features = []
        for layer in self.layers:
            for block in layer:
                x = block(x)
            features.append(x)
        return self.fc(x.astype(jnp.float32).mean(axis=(1, 2))), tuple(features[1:])

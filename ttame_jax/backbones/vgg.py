"""VGG (Simonyan and Zisserman, 2015, arXiv:1409.1556), with and without BatchNorm."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from .base import IMAGENET, Backbone, Preprocessing, chain
from .layers import Conv, FrozenBatchNorm, adaptive_average_pool, classify, max_pool


@dataclass(frozen=True)
class Variant:
    """Convolutions in each stage (a max-pool ends it), with or without BatchNorm."""

    depths: tuple[int, int, int, int, int]
    batch_norm: bool = False


DEPTHS = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
VARIANTS = {
    name + suffix: Variant(depths, batch_norm)
    for name, depths in DEPTHS.items()
    for suffix, batch_norm in (("", False), ("_bn", True))
}

WIDTHS = (64, 128, 256, 512, 512)
GRID = 7  # the classifier reads a grid of 7x7 whatever the input size


class ConvBlock(nnx.Module):
    """3x3 convolution, BatchNorm if wanted, ReLU: [B, H, W, in] -> [B, H, W, out]."""

    def __init__(self, in_features: int, out_features: int, batch_norm: bool, **options):
        self.conv = Conv(in_features, out_features, (3, 3), padding=1, **options)
        self.norm = FrozenBatchNorm(out_features) if batch_norm else None

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv(x)
        return nnx.relu(x if self.norm is None else self.norm(x))


class VGG(Backbone):
    """Feature maps: the last three stages, after (`features="pool"`, the paper's choice) or before
    (`"conv"`, its ablation) the max-pool that ends each."""

    min_size = 32

    def __init__(
        self,
        name: str,
        *,
        num_classes: int = 1000,
        preprocessing: Preprocessing = IMAGENET,
        image_size: int | None = None,
        features: Literal["pool", "conv"] = "pool",
        architecture: Variant | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if features not in ("pool", "conv"):
            raise ValueError(f"features of {name} are 'pool' or 'conv', not {features!r}")
        super().__init__(name, num_classes, preprocessing, image_size, dtype, architecture)
        self.variant = variant = architecture or VARIANTS[name]
        self.features = features
        convolutions = [f"stages.{i}.{depth - 1}" for i, depth in enumerate(variant.depths)]
        pools = [f"stages.{i}.pool" for i in range(len(variant.depths))]
        self.feature_layers = tuple({"pool": pools, "conv": convolutions}[features][-3:])
        self.target_layer = convolutions[-1]
        options = {"dtype": self.dtype, "rngs": rngs}
        in_features = 3
        self.stages = nnx.List()
        for depth, width in zip(variant.depths, WIDTHS):
            stage = nnx.List()
            for _ in range(depth):
                stage.append(ConvBlock(in_features, width, variant.batch_norm, **options))
                in_features = width
            self.stages.append(stage)
        self.fc1 = nnx.Linear(in_features * GRID**2, 4096, **options)
        self.fc2 = nnx.Linear(4096, 4096, **options)
        self.head = nnx.Linear(4096, num_classes, dtype=jnp.float32, rngs=rngs)

    def named_layers(self):
        layers = []
        for i, stage in enumerate(self.stages):
            layers += [(f"stages.{i}.{j}", block) for j, block in enumerate(stage)]
            layers.append((f"stages.{i}.pool", lambda x: max_pool(x, 2, 2, (0, 0))))
        return chain([*layers, ("head", self._classify)])

    def _classify(self, x, classes=None):
        x = adaptive_average_pool(x, GRID).reshape(len(x), -1)
        return classify(self.head, _relu(self.fc2(_relu(self.fc1(x)))), classes)


def _relu(x: jax.Array) -> jax.Array:
    """ReLU as a choice, not a maximum, which XLA on CPU would fuse with the layers around it so
    that all convolutions before them run twice (jaxlib 0.10)."""
    return jnp.where(x > 0, x, 0)

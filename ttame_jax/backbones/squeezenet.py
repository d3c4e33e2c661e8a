"""SqueezeNet 1.0 and 1.1 (Iandola et al., 2016, arXiv:1602.07360)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from .base import IMAGENET, Backbone, Preprocessing, chain
from .layers import Conv, classify, max_pool


@dataclass(frozen=True)
class Variant:
    """Stem convolution, then per stage the (squeeze, expand) channels of its Fire modules."""

    stem_width: int
    stem_kernel: int
    stages: tuple[tuple[tuple[int, int], ...], ...]
    min_size: int  # below it, the last max-pool has nothing left to pool


VARIANTS = {
    "squeezenet1_0": Variant(
        stem_width=96,
        stem_kernel=7,
        stages=(
            ((16, 64), (16, 64), (32, 128)),
            ((32, 128), (48, 192), (48, 192), (64, 256)),
            ((64, 256),),
        ),
        min_size=21,
    ),
    "squeezenet1_1": Variant(
        stem_width=64,
        stem_kernel=3,
        stages=(
            ((16, 64), (16, 64)),
            ((32, 128), (32, 128)),
            ((48, 192), (48, 192), (64, 256), (64, 256)),
        ),
        min_size=17,
    ),
}


class Fire(nnx.Module):
    """[B, H, W, in] -> [B, H, W, 2 * expand]: a narrow 1x1, then 1x1 and 3x3 side by side."""

    def __init__(self, in_features: int, squeeze: int, expand: int, **options):
        self.squeeze = Conv(in_features, squeeze, (1, 1), **options)
        self.expand1x1 = Conv(squeeze, expand, (1, 1), **options)
        self.expand3x3 = Conv(squeeze, expand, (3, 3), padding=1, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.squeeze(x))
        return nnx.relu(jnp.concatenate([self.expand1x1(x), self.expand3x3(x)], axis=-1))


class SqueezeNet(Backbone):
    """Feature maps: the last two max-pools and the last Fire module."""

    def __init__(
        self,
        name: str,
        *,
        num_classes: int = 1000,
        preprocessing: Preprocessing = IMAGENET,
        image_size: int | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(name, num_classes, preprocessing, image_size, dtype)
        variant = VARIANTS[name]
        self.min_size = variant.min_size
        self.target_layer = f"stages.2.{len(variant.stages[2]) - 1}"
        self.feature_layers = ("stages.1.pool", "stages.2.pool", self.target_layer)
        options = {"dtype": self.dtype, "rngs": rngs}
        width, kernel = variant.stem_width, variant.stem_kernel
        self.stem = Conv(3, width, (kernel, kernel), strides=2, **options)
        self.stages = nnx.List()
        for plan in variant.stages:
            stage = nnx.List()
            for squeeze, expand in plan:
                stage.append(Fire(width, squeeze, expand, **options))
                width = 2 * expand
            self.stages.append(stage)
        self.head = Conv(width, num_classes, (1, 1), dtype=jnp.float32, rngs=rngs)

    @property
    def class_weights(self):
        return self.head.kernel[0, 0]

    def named_layers(self):
        layers = [("stem", lambda x: nnx.relu(self.stem(x)))]
        for i, stage in enumerate(self.stages):
            # One row and column of -inf at the end is PyTorch's ceil_mode for this window.
            layers.append((f"stages.{i}.pool", lambda x: max_pool(x, 3, 2, (0, 1))))
            layers += [(f"stages.{i}.{j}", fire) for j, fire in enumerate(stage)]
        return chain([*layers, ("head", self._classify)])

    def _classify(self, x, classes=None):
        return nnx.relu(classify(self.head, x, classes)).mean(axis=(1, 2))

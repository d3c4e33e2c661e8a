"""SqueezeNet 1.0 and 1.1 (Iandola et al., 2016, arXiv:1602.07360)."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ttame_jax.compilers import max_pool

from . import base
from .base import Backbone, chain
from .family import AuthorsCode, Family, Torchvision
from .layers import Conv, classify
from .tensors import CONV, Table, weights


@dataclass(frozen=True, kw_only=True)
class Architecture(base.Architecture):
    """Stem convolution, then per stage the (squeeze, expand) channels of its Fire modules."""

    stem_width: int
    stem_kernel: int
    stages: tuple[tuple[tuple[int, int], ...], ...]
    min_size: int  # below it, the last max-pool has nothing left to pool


class Fire(nnx.Module):
    """[B, H, W, in] -> [B, H, W, 2 * expand]: a narrow 1x1, then parallel 1x1 and 3x3."""

    def __init__(self, in_features: int, squeeze: int, expand: int, **options):
        self.squeeze = Conv(in_features, squeeze, (1, 1), **options)
        self.expand1x1 = Conv(squeeze, expand, (1, 1), **options)
        self.expand3x3 = Conv(squeeze, expand, (3, 3), padding=1, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.squeeze(x))
        return nnx.relu(jnp.concatenate([self.expand1x1(x), self.expand3x3(x)], axis=-1))


class SqueezeNet(Backbone):
    """Feature maps: the last two max-pools and the last Fire module."""

    rise_masks = 4000
    architecture: Architecture

    def __init__(self, name: str, architecture: Architecture, *, rngs: nnx.Rngs, **options: Any):
        super().__init__(name, architecture, **options)
        self.min_size = architecture.min_size
        self.target_layer = f"stages.2.{len(architecture.stages[2]) - 1}"
        self.feature_layers = ("stages.1.pool", "stages.2.pool", self.target_layer)
        layer_options: dict[str, Any] = {"dtype": self.dtype, "rngs": rngs}
        width, kernel = architecture.stem_width, architecture.stem_kernel
        self.stem = Conv(3, width, (kernel, kernel), strides=2, **layer_options)
        self.stages = nnx.List()
        for plan in architecture.stages:
            stage = nnx.List()
            for squeeze, expand in plan:
                stage.append(Fire(width, squeeze, expand, **layer_options))
                width = 2 * expand
            self.stages.append(stage)
        self.head = Conv(width, self.num_classes, (1, 1), dtype=jnp.float32, rngs=rngs)

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


def _torchvision_tensors(backbone: SqueezeNet) -> Table:
    table, index = weights("features.0", "stem", CONV), 2  # 1 is a ReLU
    for i, stage in enumerate(backbone.stages):
        index += 1  # a max-pool
        for j in range(len(stage)):
            for part in ("squeeze", "expand1x1", "expand3x3"):
                table += weights(f"features.{index}.{part}", f"stages.{i}.{j}.{part}", CONV)
            index += 1
    return table + weights("classifier.1", "head", CONV)


def _feature_nodes(backbone: SqueezeNet) -> list[str]:
    pools, index = [], 2  # a max-pool begins each stage
    for stage in backbone.architecture.stages:
        pools.append(index)
        index += 1 + len(stage)
    return [f"features.{i}" for i in (*pools[1:], index - 1)]


ARCHITECTURES = {
    "squeezenet1_0": Architecture(
        stem_width=96,
        stem_kernel=7,
        stages=(
            ((16, 64), (16, 64), (32, 128)),
            ((32, 128), (48, 192), (48, 192), (64, 256)),
            ((64, 256),),
        ),
        min_size=21,
    ),
    "squeezenet1_1": Architecture(
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

FAMILY = Family(
    backbone=SqueezeNet,
    architecture=Architecture,
    architectures=ARCHITECTURES,
    torchvision=Torchvision(
        models={name: name for name in ARCHITECTURES},
        tensors=_torchvision_tensors,
        feature_nodes=_feature_nodes,
        target_node=lambda backbone: _feature_nodes(backbone)[-1],
    ),
    authors=AuthorsCode(nodes=_feature_nodes),
)

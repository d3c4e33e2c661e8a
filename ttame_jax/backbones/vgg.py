"""VGG (Simonyan and Zisserman, 2015, arXiv:1409.1556), with and without BatchNorm."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ttame_jax.compilers import max_pool, unfused_relu

from . import base
from .base import Backbone, chain
from .family import AuthorsCode, Family, Timm, Torchvision
from .layers import Conv, FrozenBatchNorm, adaptive_average_pool, classify
from .tensors import CONV, LINEAR, LINEAR_AS_CONV, Table, Transform, batch_norm, weights


@dataclass(frozen=True, kw_only=True)
class Architecture(base.Architecture):
    """Number of convolutions in each stage (a max-pool ends it), with or without BatchNorm."""

    depths: tuple[int, int, int, int, int]
    batch_norm: bool = False


WIDTHS = (64, 128, 256, 512, 512)
GRID = 7  # the classifier reads a grid of 7x7 whatever the input size


class ConvBlock(nnx.Module):
    """3x3 convolution, optional BatchNorm, ReLU: [B, H, W, in] -> [B, H, W, out]."""

    def __init__(self, in_features: int, out_features: int, batch_norm: bool, **options):
        self.conv = Conv(in_features, out_features, (3, 3), padding=1, **options)
        self.norm = FrozenBatchNorm(out_features) if batch_norm else None

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv(x)
        return nnx.relu(x if self.norm is None else self.norm(x))


class VGG(Backbone):
    """Feature maps: the last three stages, after (`features="pool"`, as in the paper) or before
    (`"conv"`, its ablation) the max-pool that ends each stage."""

    feature_kinds = compared_features = ("pool", "conv")
    rise_masks = 4000
    min_size = 32
    architecture: Architecture

    def __init__(self, name: str, architecture: Architecture, *, rngs: nnx.Rngs, **options: Any):
        super().__init__(name, architecture, **options)
        depths = architecture.depths
        convolutions = [f"stages.{i}.{depth - 1}" for i, depth in enumerate(depths)]
        pools = [f"stages.{i}.pool" for i in range(len(depths))]
        layers = pools if self.features == "pool" else convolutions
        self.feature_layers, self.target_layer = tuple(layers[-3:]), convolutions[-1]
        layer_options: dict[str, Any] = {"dtype": self.dtype, "rngs": rngs}
        in_features = 3
        self.stages = nnx.List()
        for depth, width in zip(depths, WIDTHS):
            stage = nnx.List()
            for _ in range(depth):
                stage.append(
                    ConvBlock(in_features, width, architecture.batch_norm, **layer_options)
                )
                in_features = width
            self.stages.append(stage)
        self.fc1 = nnx.Linear(in_features * GRID**2, 4096, **layer_options)
        self.fc2 = nnx.Linear(4096, 4096, **layer_options)
        self.head = nnx.Linear(4096, self.num_classes, dtype=jnp.float32, rngs=rngs)

    def named_layers(self):
        layers = []
        for i, stage in enumerate(self.stages):
            layers += [(f"stages.{i}.{j}", block) for j, block in enumerate(stage)]
            layers.append((f"stages.{i}.pool", lambda x: max_pool(x, 2, 2, (0, 0))))
        return chain([*layers, ("head", self._classify)])

    def _classify(self, x, classes=None):
        x = adaptive_average_pool(x, GRID).reshape(x.shape[0], -1)
        x = unfused_relu(self.fc2(unfused_relu(self.fc1(x))))
        return classify(self.head, x, classes)


# A linear layer on a flattened grid of 7x7: channels are outermost in PyTorch, innermost here.
GRID_AS_CONV = Transform(
    lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
    lambda x: x.reshape(GRID, GRID, -1, x.shape[-1]).transpose(3, 2, 0, 1),
)
GRID_LINEAR = Transform(
    lambda x: GRID_AS_CONV.to_flax(x.reshape(x.shape[0], -1, GRID, GRID)),
    lambda x: GRID_AS_CONV.to_torch(x).reshape(x.shape[-1], -1),
)


def _feature_tensors(backbone: VGG) -> Table:
    table, index = [], 0  # index in PyTorch's flat list of convolutions, norms, ReLUs and pools
    for i, stage in enumerate(backbone.stages):
        for j, block in enumerate(stage):
            table += weights(f"features.{index}", f"stages.{i}.{j}.conv", CONV)
            index += 1
            if block.norm is not None:
                table += batch_norm(f"features.{index}", f"stages.{i}.{j}.norm")
                index += 1
            index += 1
        index += 1
    return table


def _torchvision_tensors(backbone: VGG) -> Table:
    return (
        _feature_tensors(backbone)
        + weights("classifier.0", "fc1", GRID_LINEAR)
        + weights("classifier.3", "fc2", LINEAR)
        + weights("classifier.6", "head", LINEAR)
    )


def _timm_tensors(backbone: VGG) -> Table:
    return (
        _feature_tensors(backbone)
        + weights("pre_logits.fc1", "fc1", GRID_AS_CONV)
        + weights("pre_logits.fc2", "fc2", LINEAR_AS_CONV)
        + weights("head.fc", "head", LINEAR)
    )


def _pools(backbone: VGG) -> list[int]:
    """Indices of the max-pools in PyTorch's list."""
    pools, index = [], -1
    layers = 3 if backbone.architecture.batch_norm else 2  # in a block
    for depth in backbone.architecture.depths:
        index += layers * depth + 1
        pools.append(index)
    return pools


def _feature_nodes(backbone: VGG) -> list[str]:
    before = int(backbone.features == "conv")
    return [f"features.{index - before}" for index in _pools(backbone)[-3:]]


def _read(module) -> dict[str, Any]:
    depths = [0]
    for layer in module.features:
        if type(layer).__name__ == "Conv2d":
            depths[-1] += 1
        elif type(layer).__name__ == "MaxPool2d":
            depths.append(0)
    return {"depths": tuple(depths[:-1]), "batch_norm": module.use_norm}


DEPTHS = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
ARCHITECTURES = {
    name + suffix: Architecture(depths=depths, batch_norm=norm)
    for name, depths in DEPTHS.items()
    for suffix, norm in (("", False), ("_bn", True))
}

FAMILY = Family(
    backbone=VGG,
    architecture=Architecture,
    architectures=ARCHITECTURES,
    torchvision=Torchvision(
        models={name: name for name in ARCHITECTURES},
        tensors=_torchvision_tensors,
        feature_nodes=_feature_nodes,
        target_node=lambda backbone: f"features.{_pools(backbone)[-1] - 1}",
    ),
    timm=Timm(
        models={name: f"{name}.tv_in1k" for name in ARCHITECTURES},
        tensors=_timm_tensors,
        feature_nodes=_feature_nodes,
        module="VGG",
        files=("vgg",),
        layers=frozenset(["ConvMlp", "ClassifierHead", "MaxPool2d", "Dropout"]),
        read=_read,
    ),
    authors=AuthorsCode(nodes=_feature_nodes),
)

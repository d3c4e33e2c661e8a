"""Swin Transformer (Liu et al., 2021, arXiv:2103.14030) and the searched S3 variants in timm (Chen et
al., 2021, arXiv:2111.14725)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isqrt, lcm
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ttame_jax.compilers import gelu, self_attention
from ttame_jax.preprocessing import Preprocessing

from . import base
from .base import Backbone, chain
from .family import Family, Timm, Torchvision
from .layers import Conv, classify
from .tensors import CONV, LINEAR, SAME, Entry, Table, constant, layer_norm, weights

PATCH = 4
"""Side of a patch, in pixels."""


@dataclass(frozen=True, kw_only=True)
class Architecture(base.Architecture):
    """Sizes of the four stages. The defaults are Swin-T's."""

    width: int = 96  # of the first stage; each stage is twice as wide as the one before
    depths: tuple[int, int, int, int] = (2, 2, 6, 2)
    num_heads: tuple[int, int, int, int] = (3, 6, 12, 24)
    windows: tuple[int, int, int, int] = (7, 7, 7, 7)  # sides of the windows, in tokens
    epsilon: float = 1e-5  # of every LayerNorm

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.width * 2**i for i in range(len(self.depths)))


class Attention(nnx.Module):
    """Multi-head self-attention with relative positions, in windows [B, n, N, D]."""

    def __init__(self, width: int, num_heads: int, window: int, **options):
        self.qkv = nnx.Linear(width, 3 * width, **options)
        self.proj = nnx.Linear(width, width, **options)
        self.position_bias = nnx.Param(jnp.zeros(((2 * window - 1) ** 2, num_heads)))
        self.num_heads, self.window = num_heads, window

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """`mask`: added to the scores of each window, [n, 1, N, N]."""
        bias = self.position_bias[...][relative_positions(self.window)].transpose(2, 0, 1)
        bias = bias if mask is None else bias + mask
        return self_attention(x, self.qkv, self.proj, self.num_heads, bias)


def relative_positions(window: int) -> np.ndarray:
    """[N, N]: for tokens i and j of a window, the row of i - j in a table of position biases."""
    rows, columns = (axis.reshape(-1) for axis in np.indices((window, window)))
    row, column = (axis[:, None] - axis + window - 1 for axis in (rows, columns))
    return row * (2 * window - 1) + column


class Block(nnx.Module):
    """Attention in windows, which are shifted in every second block, and MLP: [B, H, W, D]."""

    def __init__(
        self, width: int, num_heads: int, window: int, shift: int, epsilon: float, **options
    ):
        self.norm1 = nnx.LayerNorm(width, epsilon=epsilon, **options)
        self.attn = Attention(width, num_heads, window, **options)
        self.norm2 = nnx.LayerNorm(width, epsilon=epsilon, **options)
        self.fc1 = nnx.Linear(width, 4 * width, **options)
        self.fc2 = nnx.Linear(4 * width, width, **options)
        self.window, self.shift = window, shift

    def __call__(self, x: jax.Array) -> jax.Array:
        window, shift = self.window, self.shift
        # The shift is cyclic. The mask separates tokens from opposite borders of the image.
        y = jnp.roll(self.norm1(x), (-shift, -shift), (1, 2))
        mask = shift_mask(x.shape[1:3], window, shift) if shift else None
        y = join_windows(self.attn(split_windows(y, window), mask), x.shape)
        x = x + jnp.roll(y, (shift, shift), (1, 2))
        return x + self.fc2(gelu(self.fc1(self.norm2(x))))


def split_windows(x: jax.Array, window: int) -> jax.Array:
    """[B, H, W, C] -> [B, n, window^2, C], window by window."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // window, window, width // window, window, channels)
    return x.swapaxes(2, 3).reshape(batch, -1, window**2, channels)


def join_windows(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `split_windows`, for images of that shape."""
    batch, height, width, channels = shape
    window = isqrt(x.shape[2])
    x = x.reshape(batch, height // window, width // window, window, window, channels)
    return x.swapaxes(2, 3).reshape(shape)


def shift_mask(size: Sequence[int], window: int, shift: int) -> jax.Array:
    """[n, 1, N, N]: 0 for tokens of a window that were neighbours before the shift, else -inf."""
    rows, columns = (np.digitize(np.arange(n), [n - window, n - shift]) for n in size)
    regions = jnp.asarray(3 * rows[:, None] + columns)[None, :, :, None]
    regions = split_windows(regions, window)[0, ..., 0]  # [n, N]
    return jnp.where(regions[:, None, :, None] == regions[:, None, None], 0.0, -jnp.inf)


class PatchMerging(nnx.Module):
    """2x2 tokens become one: [B, H, W, D] -> [B, H/2, W/2, 2 D]."""

    def __init__(self, width: int, epsilon: float, **options):
        self.norm = nnx.LayerNorm(4 * width, epsilon=epsilon, **options)
        self.reduction = nnx.Linear(4 * width, 2 * width, use_bias=False, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(x.reshape(batch, height // 2, width // 2, 4 * channels)))


class Stage(nnx.Module):
    """Blocks of one width, and in all stages but the first a reduction of the resolution before."""

    def __init__(self, number: int, side: int, architecture: Architecture, **options):
        width, window = architecture.widths[number], architecture.windows[number]
        options["epsilon"] = architecture.epsilon
        self.downsample = PatchMerging(width // 2, **options) if number else None
        shifts = (0, window // 2 if window < side else 0)  # a single window has nowhere to go
        heads = architecture.num_heads[number]
        self.blocks = nnx.List(
            [
                Block(width, heads, window, shifts[j % 2], **options)
                for j in range(architecture.depths[number])
            ]
        )


class Swin(Backbone):
    """Feature maps: the last three of the four stages (strides 8, 16 and 32).

    `target_layer` is the LayerNorm after the last stage, whose output the classifier averages. It
    is not one of the feature maps, so there are no `class_weights`.

    Raises:
      ValueError: the windows do not fit into the image size.
    """

    masking = "standardised"
    any_size = False
    architecture: Architecture

    def __init__(self, name: str, architecture: Architecture, *, rngs: nnx.Rngs, **options: Any):
        super().__init__(name, architecture, **options)
        size = self.preprocessing.image_size
        sides = [size // PATCH // 2**i for i in range(len(architecture.depths))]
        unit = lcm(*(PATCH * 2**i * window for i, window in enumerate(architecture.windows)))
        if size % unit:
            raise ValueError(f"{name} needs an image_size that is a multiple of {unit}, got {size}")
        ends = [f"stages.{i}.blocks.{depth - 1}" for i, depth in enumerate(architecture.depths)]
        self.feature_layers, self.target_layer = tuple(ends[-3:]), "norm"
        layer_options: dict[str, Any] = {"dtype": self.dtype, "rngs": rngs}
        norm_options: dict[str, Any] = {**layer_options, "epsilon": architecture.epsilon}
        width = architecture.width
        self.patch_embed = Conv(3, width, (PATCH, PATCH), strides=PATCH, **layer_options)
        self.patch_norm = nnx.LayerNorm(width, **norm_options)
        self.stages = nnx.List(
            [Stage(i, side, architecture, **layer_options) for i, side in enumerate(sides)]
        )
        width = architecture.widths[-1]
        self.norm = nnx.LayerNorm(width, **norm_options)
        self.head = nnx.Linear(width, self.num_classes, dtype=jnp.float32, rngs=rngs)

    def named_layers(self):
        embed = lambda x: self.patch_norm(self.patch_embed(x))
        layers: list[tuple[str, Callable]] = [("embed", embed)]
        for i, stage in enumerate(self.stages):
            if stage.downsample is not None:
                layers.append((f"stages.{i}.downsample", stage.downsample))
            layers += [(f"stages.{i}.blocks.{j}", block) for j, block in enumerate(stage.blocks)]
        return chain([*layers, ("norm", self.norm), ("head", self._classify)])

    def _classify(self, x, classes=None):
        return classify(self.head, x.astype(jnp.float32).mean(axis=(1, 2)), classes)


def _torchvision_tensors(backbone: Swin) -> Table:
    if len(set(backbone.architecture.windows)) > 1:
        return []
    table = weights("features.0.0", "patch_embed", CONV) + layer_norm("features.0.2", "patch_norm")
    for i, stage in enumerate(backbone.stages):
        table += _stage_tensors(i, stage, f"features.{2 * i}", f"features.{2 * i + 1}", "0", "3")
        index = constant(relative_positions(backbone.architecture.windows[i]).reshape(-1))
        table += [
            Entry(f"features.{2 * i + 1}.{j}.attn.relative_position_index", None, index)
            for j in range(len(stage.blocks))
        ]
    return table + layer_norm("norm", "norm") + weights("head", "head", LINEAR)


def _timm_tensors(backbone: Swin) -> Table:
    table = weights("patch_embed.proj", "patch_embed", CONV)
    table += layer_norm("patch_embed.norm", "patch_norm")
    for i, stage in enumerate(backbone.stages):
        torch = f"layers.{i}"
        table += _stage_tensors(i, stage, f"{torch}.downsample", f"{torch}.blocks", "fc1", "fc2")
    return table + layer_norm("norm", "norm") + weights("head.fc", "head", LINEAR)


def _stage_tensors(i: int, stage: Stage, down: str, blocks: str, fc1: str, fc2: str) -> Table:
    """A stage, by the library's names of its reduction, its blocks and the layers of their MLPs."""
    table = []
    if stage.downsample is not None:
        flax = f"stages.{i}.downsample"
        table += layer_norm(f"{down}.norm", f"{flax}.norm")
        table += weights(f"{down}.reduction", f"{flax}.reduction", LINEAR, bias=False)
    for j in range(len(stage.blocks)):
        torch, flax = f"{blocks}.{j}", f"stages.{i}.blocks.{j}"
        bias = "attn.relative_position_bias_table"
        table += [
            *layer_norm(f"{torch}.norm1", f"{flax}.norm1"),
            *weights(f"{torch}.attn.qkv", f"{flax}.attn.qkv", LINEAR),
            *weights(f"{torch}.attn.proj", f"{flax}.attn.proj", LINEAR),
            Entry(f"{torch}.{bias}", f"{flax}.attn.position_bias", SAME),
            *layer_norm(f"{torch}.norm2", f"{flax}.norm2"),
            *weights(f"{torch}.mlp.{fc1}", f"{flax}.fc1", LINEAR),
            *weights(f"{torch}.mlp.{fc2}", f"{flax}.fc2", LINEAR),
        ]
    return table


def _read(module) -> dict[str, Any]:
    blocks = [stage.blocks[0] for stage in module.layers]
    return {
        "width": module.embed_dim,
        "depths": tuple(len(stage.blocks) for stage in module.layers),
        "num_heads": tuple(block.attn.num_heads for block in blocks),
        "windows": tuple(block.window_size[0] for block in blocks),
        "epsilon": module.norm.eps,
    }


PUBLISHED = {
    "swin_t": Architecture(preprocessing=Preprocessing(224, 232, "bicubic")),
    "swin_s": Architecture(depths=(2, 2, 18, 2), preprocessing=Preprocessing(224, 246, "bicubic")),
    "swin_b": Architecture(
        width=128,
        depths=(2, 2, 18, 2),
        num_heads=(4, 8, 16, 32),
        preprocessing=Preprocessing(224, 238, "bicubic"),
    ),
}

FAMILY = Family(
    backbone=Swin,
    architecture=Architecture,
    architectures=PUBLISHED,
    torchvision=Torchvision(
        models={name: name for name in PUBLISHED},
        tensors=_torchvision_tensors,
        feature_nodes=lambda backbone: ["features.3", "features.5", "features.7"],
        channels_last=True,
        target_node=lambda backbone: "norm",
    ),
    timm=Timm(
        models={
            "swin_t": "swin_tiny_patch4_window7_224.ms_in1k",
            "swin_s": "swin_small_patch4_window7_224.ms_in22k_ft_in1k",
            "swin_b": "swin_base_patch4_window7_224.ms_in22k_ft_in1k",
        },
        tensors=_timm_tensors,
        feature_nodes=lambda backbone: ["layers.1", "layers.2", "layers.3"],
        channels_last=True,
        options=lambda backbone: {"img_size": backbone.preprocessing.image_size},
        derived=(".relative_position_index", ".attn_mask"),
        module="SwinTransformer",
        files=("swin_transformer",),
        layers=frozenset(
            [
                "PatchEmbed",
                "SwinTransformerStage",
                "SwinTransformerBlock",
                "PatchMerging",
                "WindowAttention",
                "Softmax",
                "Mlp",
                "LayerNorm",
                "GELU",
                "Dropout",
                "DropPath",
                "ClassifierHead",
                "FastAdaptiveAvgPool",
            ]
        ),
        read=_read,
        image_size=lambda module: module.patch_embed.img_size[0],
    ),
)

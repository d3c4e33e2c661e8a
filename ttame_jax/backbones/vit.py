"""Vision Transformer (Dosovitskiy et al., 2021, arXiv:2010.11929), class-token classifier."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from .base import IMAGENET, Backbone, Preprocessing


@dataclass(frozen=True)
class Variant:
    patch_size: int = 16
    width: int = 384
    depth: int = 12
    num_heads: int = 6
    num_classes: int = 1000
    preprocessing: Preprocessing = IMAGENET


VARIANTS = {
    "vit_ti16": Variant(width=192, num_heads=3),
    "vit_s16": Variant(),
    "vit_b16": Variant(width=768, num_heads=12),
    "vit_b32": Variant(patch_size=32, width=768, num_heads=12),
    "vit_l16": Variant(
        width=1024, depth=24, num_heads=16, preprocessing=Preprocessing(resize_size=242)
    ),
    "vit": Variant(preprocessing=Preprocessing(resize_size=224)),
    "digits_vit": Variant(
        patch_size=8,
        width=96,
        depth=4,
        num_heads=3,
        num_classes=10,
        preprocessing=Preprocessing(image_size=64, resize_size=64),
    ),
}

ARCHITECTURE = ("patch_size", "width", "depth", "num_heads")  # what only the free ViT takes


class Attention(nnx.Module):
    """Multi-head self-attention, [B, N, D] -> [B, N, D]."""

    def __init__(self, width: int, num_heads: int, **options):
        self.qkv = nnx.Linear(width, 3 * width, **options)
        self.proj = nnx.Linear(width, width, **options)
        self.num_heads = num_heads

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
        x = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        return self.proj(x.reshape(batch, tokens, width))


class MLP(nnx.Module):
    """[B, N, D] -> [B, N, D], four times as wide inside, exact GELU."""

    def __init__(self, width: int, **options):
        self.fc1 = nnx.Linear(width, 4 * width, **options)
        self.fc2 = nnx.Linear(4 * width, width, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(nnx.gelu(self.fc1(x), approximate=False))


class Block(nnx.Module):
    """Encoder block, [B, N, D] -> (output, first LayerNorm's output), both [B, N, D]."""

    def __init__(self, width: int, num_heads: int, **options):
        self.norm1 = nnx.LayerNorm(width, **options)
        self.attn = Attention(width, num_heads, **options)
        self.norm2 = nnx.LayerNorm(width, **options)
        self.mlp = MLP(width, **options)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        normed = self.norm1(x)
        x = x + self.attn(normed)
        return x + self.mlp(self.norm2(x)), normed


class ViT(Backbone):
    """Feature maps: the patch tokens of the last three blocks, [B, side, side, width].

    `features="block"` reads the blocks' outputs, as the paper says; `"norm"` the output of
    their first LayerNorm, which the authors' published checkpoints were trained on.
    Only the free ViT, "vit", takes patch_size, width, depth and num_heads.
    """

    masking = "standardised"

    def __init__(
        self,
        name: str = "vit",
        *,
        num_classes: int | None = None,
        preprocessing: Preprocessing | None = None,
        image_size: int | None = None,
        features: Literal["block", "norm"] = "block",
        patch_size: int | None = None,
        width: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if features not in ("block", "norm"):
            raise ValueError(f"features of {name} are 'block' or 'norm', not {features!r}")
        sizes = (patch_size, width, depth, num_heads)
        architecture = {k: size for k, size in zip(ARCHITECTURE, sizes) if size is not None}
        if architecture and name != "vit":
            raise ValueError(f"{name} has a fixed {', '.join(architecture)}; use the free 'vit'")
        variant = replace(VARIANTS[name], **architecture)
        super().__init__(
            name,
            num_classes or variant.num_classes,
            preprocessing or variant.preprocessing,
            image_size,
            dtype,
        )
        width, patch = variant.width, variant.patch_size
        size = self.preprocessing.image_size
        if size % patch or width % variant.num_heads:
            raise ValueError(
                f"{name} needs an image_size that patch_size divides and a width that num_heads "
                f"divides, got {size} / {patch} and {width} / {variant.num_heads}"
            )
        self.variant = variant
        self.features = features
        self.side = size // patch
        options = {"dtype": self.dtype, "rngs": rngs}
        normal = nnx.initializers.normal(0.02)
        self.patch_embed = nnx.Conv(
            3, width, (patch, patch), strides=patch, padding="VALID", **options
        )
        self.cls_token = nnx.Param(normal(rngs.params(), (1, 1, width)))
        self.pos_embed = nnx.Param(normal(rngs.params(), (1, 1 + self.side**2, width)))
        self.blocks = nnx.List(
            [Block(width, variant.num_heads, **options) for _ in range(variant.depth)]
        )
        self.norm = nnx.LayerNorm(width, **options)
        self.head = nnx.Linear(width, self.num_classes, dtype=jnp.float32, rngs=rngs)

    def forward(self, x):
        batch = len(x)
        x = self.patch_embed(x).reshape(batch, self.side**2, -1)
        cls_token = jnp.broadcast_to(self.cls_token[...], (batch, 1, x.shape[-1]))
        x = jnp.concatenate([cls_token.astype(self.dtype), x], axis=1)
        x = x + self.pos_embed[...].astype(self.dtype)
        features = []
        for block in self.blocks:
            x, normed = block(x)
            features.append(self.feature_map(x if self.features == "block" else normed))
        return self.head(self.norm(x[:, 0])), tuple(features[-3:])

    def feature_map(self, tokens: jax.Array) -> jax.Array:
        """[B, 1 + N, D] -> [B, sqrt N, sqrt N, D]: the class token is dropped."""
        return tokens[:, 1:].reshape(len(tokens), self.side, self.side, -1)

    def check_size(self, height, width):
        size = self.preprocessing.image_size
        if (height, width) != (size, size):
            raise ValueError(
                f"{self.name} was built for {size}x{size} pixels, got {height}x{width}; "
                "load it with the image_size you need (square images)"
            )

    @property
    def config(self) -> Mapping[str, Any]:
        if self.name != "vit":
            return super().config
        return {**super().config, **{k: getattr(self.variant, k) for k in ARCHITECTURE}}

    def fit_tensor(self, path, tensor):
        return resample_pos_embed(tensor, self.side) if path == "pos_embed" else tensor


def resample_pos_embed(pos_embed: Any, side: int) -> Any:
    """Position embeddings [1, 1 + n^2, D] -> [1, 1 + side^2, D] for another number of patches.

    Antialiased bicubic interpolation of the patch grid; the class token's embedding is kept, as
    in timm's `resample_abs_pos_embed`. Anything that is not such a square grid stays as it is.
    """
    if pos_embed.ndim != 3 or len(pos_embed) != 1:
        return pos_embed
    count, width = pos_embed.shape[1] - 1, pos_embed.shape[2]
    old_side = isqrt(max(count, 0))
    if old_side == side or old_side**2 != count or count < 1:
        return pos_embed
    with jax.default_matmul_precision("highest"):
        grid = jnp.asarray(pos_embed[:, 1:]).reshape(1, old_side, old_side, width)
        grid = jax.image.resize(grid, (1, side, side, width), "cubic", antialias=True)
    return jnp.concatenate([pos_embed[:, :1], grid.reshape(1, side**2, width)], axis=1)

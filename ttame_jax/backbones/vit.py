"""Vision Transformer (Dosovitskiy et al., 2021, arXiv:2010.11929) with timm's plain refinements:
register tokens, no class token, LayerScale, CLIP's first LayerNorm."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isqrt, pi, sqrt
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from .base import DIGITS, IMAGENET, Backbone, Preprocessing, State, chain
from .layers import classify


@dataclass(frozen=True)
class Variant:
    """Sizes, and what timm's models differ in; the defaults are the original's (ViT-S)."""

    patch_size: int = 16
    width: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_width: int | None = None  # None: four times the width
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    epsilon: float = 1e-6  # of every LayerNorm
    qkv_bias: bool = True
    patch_bias: bool = True
    class_token: bool = True
    registers: int = 0  # further tokens between the class token and the patches
    embed_prefix: bool = True  # class token and registers have position embeddings too
    pre_norm: bool = False  # a LayerNorm before the first block
    layer_scale: bool = False  # a learned factor a channel on each residual branch
    pool: Literal["token", "average"] = "token"  # what the head reads: class token or patches
    norm_after_pool: bool = False
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
        width=64,
        depth=4,
        num_heads=4,
        num_classes=10,
        preprocessing=DIGITS,
    ),
}

ARCHITECTURE = ("patch_size", "width", "depth", "num_heads")  # what only the free ViT takes


class Attention(nnx.Module):
    """Multi-head self-attention, [B, N, D] -> [B, N, D]."""

    def __init__(self, width: int, num_heads: int, qkv_bias: bool = True, **options):
        self.qkv = nnx.Linear(width, 3 * width, use_bias=qkv_bias, **options)
        self.proj = nnx.Linear(width, width, **options)
        self.num_heads = num_heads

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
        return self.proj(attend(qkv).reshape(batch, tokens, width))


def attend(qkv: jax.Array) -> jax.Array:
    """Softmax attention of every head: queries, keys, values [B, N, 3, h, d] -> [B, N, h, d]."""
    if _has_cudnn_attention(qkv):
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
    # Heads first, the matrix products need no further transposes: on CPU, a seventh quicker.
    query, key, value = qkv.transpose(2, 0, 3, 1, 4)
    scores = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * query.shape[-1] ** -0.5).astype(qkv.dtype)
    return (weights @ value).swapaxes(1, 2)


def _has_cudnn_attention(qkv: jax.Array) -> bool:
    return (
        jax.default_backend() == "gpu"
        and qkv.dtype in (jnp.bfloat16, jnp.float16)
        and qkv.shape[-1] % 8 == 0
        and qkv.shape[-1] <= 128
    )


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU. Its derivative is written out because JAX 0.12 fails at the one of the error
    function inside of `jax.shard_map`."""
    return nnx.gelu(x, approximate=False)


@gelu.defjvp
def _gelu_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    cumulative = 0.5 * jax.lax.erfc(-sqrt(0.5) * x)
    density = jnp.exp(-0.5 * x * x) / sqrt(2 * pi)
    return gelu(x), (cumulative + x * density) * tangent


ACTIVATIONS = {
    "gelu": gelu,
    "quick_gelu": lambda x: x * nnx.sigmoid(1.702 * x),
}


class MLP(nnx.Module):
    """[B, N, D] -> [B, N, D], wider inside."""

    def __init__(self, variant: Variant, **options):
        inner = variant.mlp_width or 4 * variant.width
        self.fc1 = nnx.Linear(variant.width, inner, **options)
        self.fc2 = nnx.Linear(inner, variant.width, **options)
        self.activation = variant.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class Block(nnx.Module):
    """Encoder block, [B, N, D] -> [B, N, D], in two steps: its first LayerNorm, and the rest."""

    def __init__(self, variant: Variant, **options):
        width, epsilon = variant.width, variant.epsilon
        self.norm1 = nnx.LayerNorm(width, epsilon=epsilon, **options)
        self.attn = Attention(width, variant.num_heads, variant.qkv_bias, **options)
        self.norm2 = nnx.LayerNorm(width, epsilon=epsilon, **options)
        self.mlp = MLP(variant, **options)
        self.scale1, self.scale2 = (
            nnx.Param(jnp.ones(width)) if variant.layer_scale else None for _ in range(2)
        )

    def normed(self, x: jax.Array) -> State:
        """Tokens -> (the first LayerNorm's output, tokens)."""
        return self.norm1(x), x

    def rest(self, normed: jax.Array, x: jax.Array) -> State:
        """What `normed` gives -> (the block's output,)."""
        x = x + scaled(self.attn(normed), self.scale1)
        return (x + scaled(self.mlp(self.norm2(x)), self.scale2),)


def scaled(x: jax.Array, scale: nnx.Param | None) -> jax.Array:
    """LayerScale: x [..., D] times a block's `scale1` or `scale2`, where it has one."""
    return x if scale is None else x * scale[...].astype(x.dtype)


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
        architecture: Variant | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if features not in ("block", "norm"):
            raise ValueError(f"features of {name} are 'block' or 'norm', not {features!r}")
        sizes = (patch_size, width, depth, num_heads)
        chosen = {k: size for k, size in zip(ARCHITECTURE, sizes) if size is not None}
        if chosen and name != "vit":
            raise ValueError(f"{name} has a fixed {', '.join(chosen)}; use the free 'vit'")
        variant = replace(architecture or VARIANTS[name], **chosen)
        super().__init__(
            name,
            num_classes or variant.num_classes,
            preprocessing or variant.preprocessing,
            image_size,
            dtype,
            architecture,
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
        ending = {"block": "", "norm": ".norm1"}[features]
        last = range(variant.depth)[-3:]
        self.feature_layers = tuple(f"blocks.{i}{ending}" for i in last)
        self.target_layer = f"blocks.{last[-1]}.norm1"
        self.side = size // patch
        self.prefix = variant.class_token + variant.registers  # tokens before the patches
        options = {"dtype": self.dtype, "rngs": rngs}
        norm_options = {**options, "epsilon": variant.epsilon}

        def tokens(count: int) -> nnx.Param | None:
            normal = nnx.initializers.normal(0.02)
            return nnx.Param(normal(rngs.params(), (1, count, width))) if count else None

        self.patch_embed = nnx.LinearGeneral(
            (patch, patch, 3), width, axis=(-3, -2, -1), use_bias=variant.patch_bias, **options
        )
        self.cls_token = tokens(int(variant.class_token))
        self.reg_token = tokens(variant.registers)
        self.pos_embed = tokens(self.embedded_prefix + self.side**2)
        # Small ViTs learn several times faster from positions than from noise.
        patches = sincos_positions(self.side, width)
        self.pos_embed[:, self.embedded_prefix :] = jnp.asarray(patches)
        self.pre_norm = nnx.LayerNorm(width, **norm_options) if variant.pre_norm else None
        self.blocks = nnx.List([Block(variant, **options) for _ in range(variant.depth)])
        self.norm = nnx.LayerNorm(width, **norm_options)
        self.head = nnx.Linear(width, self.num_classes, dtype=jnp.float32, rngs=rngs)

    @property
    def embedded_prefix(self) -> int:
        """How many tokens before the patches have a position embedding."""
        return self.prefix if self.variant.embed_prefix else 0

    def named_layers(self):
        layers = chain([("embed", self.embed)])
        for i, block in enumerate(self.blocks):
            layers += [(f"blocks.{i}.norm1", block.normed), (f"blocks.{i}", block.rest)]
        return layers + chain([("head", self._classify)])

    def _classify(self, x, classes=None):
        return classify(self.head, self.pooled(x), classes)

    def embed(self, x: jax.Array) -> jax.Array:
        """Images [B, H, W, 3] -> tokens [B, prefix + N, D]: class token, registers, patches."""
        batch, side, patch = len(x), self.side, self.variant.patch_size
        # The convolution, as the matrix product that it is: its gradient is many times quicker.
        x = x.reshape(batch, side, patch, side, patch, 3).swapaxes(2, 3)
        x = self.patch_embed(x).reshape(batch, side**2, -1)
        extra = [
            jnp.broadcast_to(token[...], (batch, *token.shape[1:])).astype(self.dtype)
            for token in (self.cls_token, self.reg_token)
            if token is not None
        ]
        positions = self.pos_embed[...].astype(self.dtype)
        if self.variant.embed_prefix:
            x = jnp.concatenate([*extra, x], axis=1) + positions
        else:
            x = jnp.concatenate([*extra, x + positions], axis=1)
        return x if self.pre_norm is None else self.pre_norm(x)

    def pooled(self, x: jax.Array) -> jax.Array:
        """Tokens [B, prefix + N, D] -> what the head reads, [B, D]."""
        if self.variant.pool == "token":
            return self.norm(x[:, 0])
        patches = x[:, self.prefix :]
        if self.variant.norm_after_pool:
            return self.norm(patches.mean(axis=1))
        return self.norm(patches).mean(axis=1)

    def feature_map(self, tokens: jax.Array) -> jax.Array:
        """[B, prefix + N, D] -> [B, sqrt N, sqrt N, D]: only patches have a place."""
        return tokens[:, self.prefix :].reshape(len(tokens), self.side, self.side, -1)

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
        if path != "pos_embed":
            return tensor
        return resample_pos_embed(tensor, self.side, self.embedded_prefix)


def sincos_positions(side: int, width: int) -> np.ndarray:
    """Sines and cosines of the rows and columns of a patch grid: [side^2, width]."""
    frequencies = 100.0 ** -np.linspace(0, 1, width // 4, endpoint=False)
    angles = np.arange(side)[:, None] * frequencies
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    grid = np.concatenate([np.repeat(waves, side, axis=0), np.tile(waves, (side, 1))], axis=1)
    return np.pad(grid, ((0, 0), (0, width - grid.shape[1]))).astype(np.float32)


def resample_pos_embed(pos_embed: Any, side: int, prefix: int = 1) -> Any:
    """Position embeddings [1, prefix + n^2, D] -> [1, prefix + side^2, D], for other patch counts.

    Antialiased bicubic interpolation of the patch grid; the embeddings before it are kept, as
    in timm's `resample_abs_pos_embed`. Anything that is not such a square grid stays as it is.
    """
    if pos_embed.ndim != 3 or len(pos_embed) != 1:
        return pos_embed
    count, width = pos_embed.shape[1] - prefix, pos_embed.shape[2]
    old_side = isqrt(max(count, 0))
    if old_side == side or old_side**2 != count or count < 1:
        return pos_embed
    with jax.default_matmul_precision("highest"):
        grid = jnp.asarray(pos_embed[:, prefix:]).reshape(1, old_side, old_side, width)
        grid = jax.image.resize(grid, (1, side, side, width), "cubic", antialias=True)
    return jnp.concatenate([pos_embed[:, :prefix], grid.reshape(1, side**2, width)], axis=1)

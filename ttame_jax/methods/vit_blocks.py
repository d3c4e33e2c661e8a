"""The inner values of ViT blocks, for methods that read attention maps.

Functions take the tokens of one image, `[N, D]`. `map_images` applies them to a batch.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ttame_jax.backbones import Backbone
from ttame_jax.backbones.vit import ACTIVATIONS, Block, ViT, scaled

IMAGES = 8
"""Images processed at a time, so memory does not grow with larger batches."""


def map_images(function: Callable[..., jax.Array], *batches: jax.Array) -> jax.Array:
    """Applies a function of one image's arrays to each image of the batches.

    An exported program, for any number of images, processes them one by one.
    """
    size = None if jax.export.is_symbolic_dim(batches[0].shape[0]) else IMAGES
    return jax.lax.map(lambda arrays: function(*arrays), batches, batch_size=size)


class Trace(NamedTuple):
    """Intermediate values of a block, with h heads of d channels and M channels in the MLP."""

    x: jax.Array  # [N, D], the block's input
    normed1: jax.Array  # [N, D]
    query: jax.Array  # [h, N, d]
    key: jax.Array  # [h, N, d]
    value: jax.Array  # [h, N, d]
    weights: jax.Array  # [h, N, N], the attention map A: rows sum up to 1
    mixed: jax.Array  # [N, D], A V
    branch1: jax.Array  # [N, D], what attention adds to x
    middle: jax.Array  # [N, D]
    normed2: jax.Array  # [N, D]
    hidden: jax.Array  # [N, M]
    branch2: jax.Array  # [N, D], what the MLP adds to the middle


def run_block(
    block: Block, x: jax.Array, change: Callable[[jax.Array], jax.Array] = lambda weights: weights
) -> tuple[jax.Array, Trace]:
    """Runs a block with a change to its attention map; returns its output [N, D] and the trace."""
    attn, mlp = block.attn, block.mlp
    normed1 = block.norm1(x)
    query, key, value = split_qkv(attn.qkv(normed1), attn.num_heads)
    scores = query @ key.mT / jnp.sqrt(query.shape[-1]).astype(query.dtype)
    # Relevance needs many digits: at least float32, and float64 is kept.
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    weights = change(jax.nn.softmax(scores))
    mixed = join_heads(weights.astype(value.dtype) @ value)
    branch1 = scaled(attn.proj(mixed), block.scale1)
    middle = x + branch1
    normed2 = block.norm2(middle)
    hidden = ACTIVATIONS[mlp.activation](mlp.fc1(normed2))
    branch2 = scaled(mlp.fc2(hidden), block.scale2)
    trace = Trace(
        x,
        normed1,
        query,
        key,
        value,
        weights,
        mixed,
        branch1,
        middle,
        normed2,
        hidden,
        branch2,
    )
    return middle + branch2, trace


def split_heads(x: jax.Array, num_heads: int) -> jax.Array:
    """[N, D] -> [h, N, d]."""
    return x.reshape(x.shape[0], num_heads, -1).swapaxes(0, 1)


def join_heads(x: jax.Array) -> jax.Array:
    """[h, N, d] -> [N, D]."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1)


def split_qkv(qkv: jax.Array, num_heads: int) -> list[jax.Array]:
    """[N, 3 D] -> queries, keys and values [h, N, d]."""
    return [split_heads(x, num_heads) for x in jnp.split(qkv, 3, axis=-1)]


def class_token_row(maps: Sequence[jax.Array]) -> jax.Array:
    """The class token's row [N] of the product of token maps [N, N], those of the last block
    first (attention rollout, Abnar and Zuidema, ACL 2020)."""
    row, *rest = maps
    row = row[0]
    for matrix in rest:
        row = row @ matrix
    return row


def patch_maps(backbone: ViT, rows: jax.Array) -> jax.Array:
    """Values of tokens [B, K, N] -> values of the patches in their place, [B, K, side, side]."""
    return jnp.moveaxis(backbone.feature_map(rows.swapaxes(1, 2)), -1, 1)


def ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    """a / b, and 0 where b is 0."""
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))


def require_vit(backbone: Backbone, method: str) -> ViT:
    """Returns the backbone; raises ValueError unless it is a ViT."""
    vit = backbone if isinstance(backbone, ViT) else None
    if vit is None:
        raise ValueError(f"{method} explains only ViTs; {backbone.name} is not one")
    return vit


def require_class_token(backbone: Backbone, method: str) -> None:
    """Raises ValueError unless the backbone is a ViT that classifies by its class token."""
    if require_vit(backbone, method).architecture.pool != "token":
        raise ValueError(
            f"{method} follows the class token, but {backbone.name} averages its patches instead"
        )

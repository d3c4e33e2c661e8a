"""A ViT's forward pass whose gradient follows other rules, for input times gradient.

The outputs are those of the backbone. Whatever a rule takes for a constant is under
``stop_gradient``. Functions take one image or its tokens, `[N, D]`, and compute in at least float32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.lax import stop_gradient

from ttame_jax.backbones.layers import LayerNorm
from ttame_jax.backbones.vit import ACTIVATIONS, Block, ViT, scaled
from ttame_jax.methods.vit_blocks import join_heads, ratio, split_qkv

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""Queries, keys and values `[h, N, d]` -> `[h, N, d]`."""


def embed(backbone: ViT, image: jax.Array, gamma: float = 0.0) -> jax.Array:
    """`ViT.embed` of one standardised image [H, W, 3]; gamma is that of the patch embedding."""
    layer = backbone.patch_embed
    bias = None if layer.bias is None else layer.bias[...]
    patches = backbone.patches(image[None])[0].reshape(backbone.side**2, -1)
    kernel = layer.kernel[...].reshape(patches.shape[1], -1)
    tokens = backbone.add_positions(linear(patches, kernel, bias, gamma)[None])[0]
    return tokens if backbone.pre_norm is None else normalise(backbone.pre_norm, tokens)


def run_block(
    block: Block,
    x: jax.Array,
    attention: Attention,
    gamma: float = 0.0,
    share: jax.Array | float = 1.0,
) -> jax.Array:
    """A block's output.

    Args:
      block: the block.
      x: its input [N, D].
      attention: mixes the values.
      gamma: that of the MLP's linear layers.
      share: factor of every bias, for each token [N, 1]. Its gradient at 1 is the sum of all
        biases times their gradients.
    """
    attn, mlp = block.attn, block.mlp
    qkv = dense(attn.qkv, normalise(block.norm1, x, share), share=share)
    mixed = join_heads(attention(*split_qkv(qkv, attn.num_heads)))
    x = x + scaled(dense(attn.proj, mixed, share=share), block.scale1)
    hidden = dense(mlp.fc1, normalise(block.norm2, x, share), gamma, share)
    return x + scaled(dense(mlp.fc2, gate(mlp.activation, hidden), gamma, share), block.scale2)


def classify(backbone: ViT, tokens: jax.Array, gamma: float = 0.0) -> jax.Array:
    """The logits [num_classes] for the last block's output; gamma is that of the head."""
    architecture = backbone.architecture
    if architecture.pool == "token":
        pooled = normalise(backbone.norm, tokens[0])
    elif architecture.norm_after_pool:
        pooled = normalise(backbone.norm, tokens[backbone.prefix_tokens :].mean(0))
    else:
        pooled = normalise(backbone.norm, tokens[backbone.prefix_tokens :]).mean(0)
    return dense(backbone.head, pooled, gamma)


def dense(
    layer: nnx.Linear, x: jax.Array, gamma: float = 0.0, share: jax.Array | float = 1.0
) -> jax.Array:
    """`linear` of a layer."""
    bias = None if layer.bias is None else layer.bias[...] * share
    return linear(x, layer.kernel[...], bias, gamma)


def linear(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, gamma: float) -> jax.Array:
    """A linear layer with the generalised gamma rule (Andeol et al., 2021); 0 is no rule.

    Contributions with the sign of the output count ``1 + gamma`` times, and the gradient is that of
    the sum of all, scaled back to the output.

    x [N, D], kernel [D, E], bias [E] or [N, E] -> [N, E].
    """
    bias = jnp.zeros(()) if bias is None else bias
    y = x @ kernel + bias
    if gamma == 0:
        return y
    up, down = jnp.maximum(kernel, 0), jnp.minimum(kernel, 0)
    positive = jnp.maximum(x, 0) @ up + jnp.minimum(x, 0) @ down + jnp.maximum(bias, 0)
    favoured = y + gamma * jnp.where(y > 0, positive, y - positive)
    return favoured * stop_gradient(ratio(y, favoured))


def gate(activation: str, x: jax.Array) -> jax.Array:
    """The MLP's activation as x times a constant."""
    return x * stop_gradient(ratio(ACTIVATIONS[activation](x), x))


def normalise(norm: LayerNorm, x: jax.Array, share: jax.Array | float = 1.0) -> jax.Array:
    """LayerNorm with a constant standard deviation."""
    x = x - x.mean(-1, keepdims=True)
    variance = jnp.square(x).mean(-1, keepdims=True)
    factor = stop_gradient(jax.lax.rsqrt(variance + norm.epsilon))
    return x * factor * norm.scale[...] + norm.bias[...] * share


def attention_map(query: jax.Array, key: jax.Array) -> jax.Array:
    """[h, N, d] -> [h, N, N], of which rows sum to 1."""
    return jax.nn.softmax(query @ key.mT / query.shape[-1] ** 0.5)


def fixed_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Self-attention whose attention map is a constant."""
    return stop_gradient(attention_map(query, key)) @ value

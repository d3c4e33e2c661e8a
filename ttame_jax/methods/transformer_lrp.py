"""Relevance propagation through a ViT (Chefer, Gur and Wolf, "Transformer Interpretability
Beyond Attention Visualization", CVPR 2021, arXiv:2012.09838; `transformer_attribution` of
their code). Equation numbers are that paper's.

A rule distributes the relevance of a layer's output over its inputs. LayerNorm, softmax, the MLP's
activation and a learned scale have one input for each output and pass it on unchanged.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ttame_jax.backbones import Backbone
from ttame_jax.backbones.vit import Block, ViT
from ttame_jax.masking import min_max_scale
from ttame_jax.methods.base import Method
from ttame_jax.methods.vit_blocks import (
    Trace,
    class_token_row,
    join_heads,
    map_images,
    patch_maps,
    ratio,
    require_class_token,
    run_block,
    split_heads,
)


class TransformerLRP(Method, name="transformer_lrp", title="Transformer LRP"):
    """Attention maps weighted by their relevance, rolled out to the class token.

    Each block contributes ``I + mean over heads (gradient * R)+`` with R the relevance of its
    attention map (Eq. 13). The blocks are multiplied (Eq. 14). The class token's row of the
    product is the map, ``[B, K, sqrt N, sqrt N]``.

    Raises:
      ValueError: the backbone is not a ViT with a class token.
    """

    forward_passes = 1
    backbone: ViT

    def __init__(self, backbone: Backbone):
        require_class_token(backbone, self.name)
        super().__init__(backbone)

    def __call__(self, images: jax.Array, classes: jax.Array) -> jax.Array:
        backbone = self.backbone
        standardised = backbone.preprocessing.standardise(images).astype(backbone.dtype)
        targets = jax.nn.one_hot(classes, backbone.num_classes)
        rows = map_images(self._rows, backbone.embed(standardised), targets)
        return min_max_scale(patch_maps(backbone, rows))

    def _rows(self, tokens: jax.Array, targets: jax.Array) -> jax.Array:
        """One image's tokens [N, D] and targets [K, num_classes] -> [K, N]."""
        backbone, steps = self.backbone, []
        for block in backbone.blocks:
            shift = jnp.zeros((block.attn.num_heads, len(tokens), len(tokens)))

            def shifted(x, shift, block=block):
                return run_block(block, x, lambda weights: weights + shift)

            tokens, backward, trace = jax.vjp(shifted, tokens, shift, has_aux=True)
            steps.append((block, backward, trace))

        _, classify = backbone.split(f"blocks.{len(steps) - 1}")
        logits, backward_head = jax.vjp(lambda tokens: classify((tokens[None],))[0], tokens)
        pooled = backbone.pooled(tokens[None])[0]

        def explain(target):
            (gradient,) = backward_head(target.astype(logits.dtype))
            of_pooled = linear(pooled, backbone.head.kernel[...], target)
            relevance, maps = jnp.zeros(tokens.shape).at[0].set(of_pooled), []
            for block, backward, trace in reversed(steps):
                gradient, map_gradient = backward(gradient)
                relevance, map_relevance = propagate(block, trace, relevance)
                heads = jax.nn.relu(map_gradient * map_relevance)
                maps.append(jnp.eye(len(tokens)) + heads.mean(axis=0))
            return class_token_row(maps)

        return jax.vmap(explain)(targets)


def propagate(block: Block, trace: Trace, relevance: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Relevance [N, D] of a block's output -> that of its input and of its attention map."""
    attn, mlp = block.attn, block.mlp
    middle, branch2 = add(trace.middle, trace.branch2, relevance)
    hidden = linear(trace.hidden, mlp.fc2.kernel[...], branch2)
    middle = middle + linear(trace.normed2, mlp.fc1.kernel[...], hidden)
    x, branch1 = add(trace.x, trace.branch1, middle)
    mixed = linear(trace.mixed, attn.proj.kernel[...], branch1)
    weights, value = matmul(trace.weights, trace.value, split_heads(mixed, attn.num_heads))
    query, key = matmul(trace.query, trace.key.mT, weights)
    qkv = jnp.concatenate([join_heads(part) for part in (query, key.mT, value)], axis=-1)
    return x + linear(trace.normed1, attn.qkv.kernel[...], qkv), weights


def taylor(layer: Callable, inputs: tuple[jax.Array, ...], relevance: jax.Array):
    """Eq. 2: each input gets ``R_j = sum_i X_j dL_i/dX_j R_i / L_i``.

    The relevance of outputs that are exactly 0 is dropped.
    """
    inputs = tuple(x.astype(relevance.dtype) for x in inputs)
    outputs, backward = jax.vjp(layer, *inputs)
    shares = backward(ratio(relevance, outputs))
    return tuple(x * share for x, share in zip(inputs, shares))


def linear(x: jax.Array, kernel: jax.Array, relevance: jax.Array) -> jax.Array:
    """Eq. 5: only positive contributions ``x_j w_ji > 0`` get relevance; biases get none.

    x [..., D], kernel [D, E], relevance [..., E] -> [..., D].
    """
    up, down = jnp.maximum(kernel, 0), jnp.minimum(kernel, 0)
    signs = jnp.maximum(x, 0), jnp.minimum(x, 0)
    positive, negative = taylor(lambda p, n: p @ up + n @ down, signs, relevance)
    return positive + negative


def matmul(u: jax.Array, v: jax.Array, relevance: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eq. 7 for ``u @ v``. Both u and v receive all of R, so Eq. 9 is a factor of one half."""
    shares = taylor(jnp.matmul, (u, v), relevance)
    return shares[0] / 2, shares[1] / 2


def add(u: jax.Array, v: jax.Array, relevance: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eq. 7 and 9 for ``u + v``: each gets a part of R in proportion to the sum of its share.

    Shares of both signs can be far larger than R. After scaling they sum to R.
    """
    shares = taylor(jnp.add, (u, v), relevance)
    sums = [share.sum() for share in shares]
    size = jnp.abs(sums[0]) + jnp.abs(sums[1])
    parts = [ratio(jnp.abs(total), size) * relevance.sum() for total in sums]
    return tuple(x * ratio(part, total) for x, part, total in zip(shares, parts, sums))

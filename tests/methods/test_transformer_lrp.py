import jax
import jax.numpy as jnp
import numpy as np
import pytest
from counting import count_passes
from flax import nnx
from jax.sharding import PartitionSpec as P
from tiny import TINY
from vits import AVERAGING, PLAIN, REFINED, build, randomised

from ttame_jax.backbones.vit import ViT
from ttame_jax.masking import min_max_scale
from ttame_jax.mesh import AXIS, data_mesh
from ttame_jax.methods import TransformerLRP, compute_maps
from ttame_jax.methods.transformer_lrp import add, linear, matmul, propagate
from ttame_jax.methods.vit_blocks import run_block
from ttame_jax.weights import load_backbone

# Sums close to 0 hand on many times their relevance, with both signs: they amplify rounding by as
# much, and two ways to add up the same numbers would not agree in float32.
pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture(scope="module")
def backbone():
    return randomised(load_backbone("vit", **TINY, dtype="float64"))


@pytest.fixture(scope="module")
def images():
    return jax.random.uniform(jax.random.key(1), (16, 32, 32, 3))


CLASSES = np.tile([[0, 3, 4]], (16, 1))


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def test_a_linear_layer_gives_relevance_to_what_adds_to_an_output():
    # 2 * 1 and -1 * -2 add 2 each to the first output; only 2 * 3 adds to the second.
    x, kernel = jnp.array([2.0, -1.0]), jnp.array([[1.0, 3.0], [-2.0, 1.0]])
    np.testing.assert_allclose(linear(x, kernel, jnp.array([1.0, 1.0])), [1.5, 0.5])


def test_a_product_gives_half_of_the_relevance_to_each_factor():
    u, v = jnp.array([[1.0, 2.0]]), jnp.array([[3.0], [1.0]])  # 3 + 2
    of_u, of_v = matmul(u, v, jnp.array([[10.0]]))
    np.testing.assert_allclose(of_u, [[3.0, 2.0]])
    np.testing.assert_allclose(of_v, [[3.0], [2.0]])


def test_a_sum_scales_its_shares_back_to_the_relevance():
    # Shares are u: 1, 3 and v: 1, -2, which sum up to 4 and -1: 4/5 and 1/5 of R's sum, 3.
    u, v = jnp.array([1.0, -3.0]), jnp.array([1.0, 2.0])
    of_u, of_v = add(u, v, jnp.array([2.0, 1.0]))
    np.testing.assert_allclose(of_u, [0.6, 1.8], rtol=1e-6)
    np.testing.assert_allclose(of_v, [-0.6, 1.2], rtol=1e-6)


def test_outputs_of_zero_give_no_relevance_and_no_nan():
    zeros = jnp.zeros((2, 2))
    for parts in (linear(zeros, zeros, zeros + 1), *matmul(zeros, zeros, zeros + 1)):
        np.testing.assert_array_equal(parts, zeros)
    np.testing.assert_array_equal(add(zeros, zeros, zeros + 1), jnp.zeros((2, 2, 2)))


def test_each_rule_conserves_relevance():
    relevance = normal(0, 6, 7)
    layers = [
        [linear(normal(1, 6, 9), normal(2, 9, 7), relevance)],
        matmul(normal(1, 6, 9), normal(2, 9, 7), relevance),
        add(normal(1, 6, 7), normal(2, 6, 7), relevance),
    ]
    for parts in layers:
        total = sum(part.sum() for part in parts)
        np.testing.assert_allclose(total, relevance.sum(), rtol=1e-6)


@pytest.mark.parametrize("architecture", [PLAIN, REFINED])
def test_relevance_is_conserved_from_the_head_to_the_first_block(architecture, images):
    backbone = build(architecture)

    @jax.jit
    def totals():
        (tokens, *_), traces = backbone.embed(images[:1]), []
        for block in backbone.blocks:
            tokens, trace = run_block(block, tokens)
            traces.append(trace)
        of_pooled = linear(
            backbone.pooled(tokens[None])[0], backbone.head.kernel[...], jax.nn.one_hot(2, 5)
        )
        relevance = jnp.zeros(tokens.shape).at[0].set(of_pooled)
        sums = [(relevance.sum(), of_pooled.sum())]
        for block, trace in zip(reversed(backbone.blocks), reversed(traces)):
            relevance, of_map = propagate(block, trace, relevance)
            sums.append((relevance.sum(), of_map.sum()))
        return jnp.array(sums)

    of_tokens, of_maps = totals().T
    np.testing.assert_allclose(of_tokens, 1, rtol=1e-6)
    assert np.abs(of_maps).min() > 1e-3


@pytest.mark.parametrize("architecture", [PLAIN, REFINED])
def test_opened_blocks_compute_what_the_backbone_computes(architecture, images):
    backbone = build(architecture)

    @jax.jit
    def both():
        tokens, maps = backbone.embed(images), []
        for block in backbone.blocks:
            tokens, trace = jax.vmap(lambda x, block=block: run_block(block, x))(tokens)
            maps.append(trace.weights)
        return backbone.head(backbone.pooled(tokens)), backbone(images)[0], jnp.stack(maps)

    opened, whole, maps = both()
    np.testing.assert_allclose(opened, whole, atol=1e-5)
    np.testing.assert_allclose(maps.sum(axis=-1), 1, rtol=1e-6)


def test_one_block_worked_out_by_hand(images):
    """Queries and keys of zero look everywhere alike, and an MLP of zero adds nothing."""
    options = {**TINY, "depth": 1, "num_heads": 1, "dtype": "float64"}
    backbone = randomised(load_backbone("vit", **options))
    (block,) = backbone.blocks
    attn, fc2 = block.attn, block.mlp.fc2
    attn.qkv.kernel[:, :64], attn.qkv.bias[:64] = 0, 0
    fc2.kernel[...] *= 0
    fc2.bias[...] *= 0

    @jax.jit
    def by_hand():
        (x,) = backbone.embed(backbone.preprocessing.standardise(images[:1]))
        value = attn.qkv(block.norm1(x))[:, 64:]
        mixed = value.mean(axis=0)
        branch = attn.proj(mixed)

        def pooled(branch):
            return backbone.pooled((x[0] + branch)[None, None])

        slope = jax.grad(lambda mixed: backbone.head(pooled(attn.proj(mixed)))[0, 3])(mixed)
        target = jax.nn.one_hot(3, 5)
        relevance = linear(pooled(branch)[0], backbone.head.kernel[...], target)
        _, relevance = add(x[0], branch, relevance)
        relevance = linear(mixed, attn.proj.kernel[...], relevance)
        # Of the class token's row of the map: all its entries are one over the number of tokens.
        of_row = (value / len(x) * relevance / mixed).sum(axis=1) / 2
        return jax.nn.relu(of_row * (value @ slope))[1:].reshape(4, 4)

    maps = compute_maps(TransformerLRP(backbone), images[:1], np.array([[3]]))
    np.testing.assert_allclose(maps[0, 0], min_max_scale(by_hand()), atol=1e-5)


def test_maps_are_scaled_and_depend_on_the_class(backbone, images):
    maps = compute_maps(TransformerLRP(backbone), images, CLASSES)
    assert maps.shape == (16, 3, 4, 4)
    assert maps.dtype == jnp.float32
    np.testing.assert_allclose(maps.min(axis=(2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(maps.max(axis=(2, 3)), 1, rtol=1e-6)
    assert np.abs(maps[:, 0] - maps[:, 1]).max() > 0.1


def test_neither_other_images_nor_other_classes_change_a_map(backbone, images):
    method = TransformerLRP(backbone)
    together = compute_maps(method, images, CLASSES)
    alone = compute_maps(method, images[2:3], CLASSES[2:3, 1:2])
    np.testing.assert_allclose(together[2, 1], alone[0, 0], atol=1e-5)


@pytest.mark.slow
def test_devices_share_the_images(backbone, images):
    method = TransformerLRP(backbone)
    graph, state = nnx.split(method)
    step = jax.shard_map(
        lambda state, *batch: nnx.merge(graph, state)(*batch),
        mesh=data_mesh(),
        in_specs=(P(), P(AXIS), P(AXIS)),
        out_specs=P(AXIS),
        check_vma=False,
    )
    maps = jax.jit(step)(state, images, CLASSES)
    np.testing.assert_allclose(maps, compute_maps(method, images, CLASSES), atol=1e-5)


def test_registers_have_no_place_in_the_map(images):
    maps = compute_maps(TransformerLRP(build(REFINED)), images, CLASSES)
    assert maps.shape == (16, 3, 4, 4)
    assert np.isfinite(maps).all()


@pytest.mark.slow
def test_a_backbone_in_bfloat16_is_explained(images):
    backbone = load_backbone("vit", **TINY, dtype="bfloat16")
    maps = compute_maps(TransformerLRP(backbone), images, CLASSES)
    assert maps.dtype == jnp.float32
    assert np.isfinite(maps).all()


def test_backbones_without_a_class_token_are_refused():
    with pytest.raises(
        ValueError, match="^transformer_lrp explains only ViTs; resnet18 is not one$"
    ):
        TransformerLRP(load_backbone("resnet18", image_size=32))
    backbone = ViT("averaging", AVERAGING, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="class token, but averaging averages its patches"):
        TransformerLRP(backbone)


def test_it_takes_one_forward_pass(backbone, images):
    method = TransformerLRP(backbone)
    assert count_passes(method, images, CLASSES) == method.forward_passes == 1

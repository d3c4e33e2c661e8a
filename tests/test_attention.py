import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from ttame_jax.attention import VARIANTS, AttentionMechanism, BatchNorm
from ttame_jax.masking import upsample

pytestmark = pytest.mark.quick

CHANNELS, SIZES, CLASSES = (4, 6, 5), (8, 4, 3), 11


def features(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(3, s, s, c)).astype(dtype) for s, c in zip(SIZES, CHANNELS)]


def mechanism(variant="ttame", **options):
    """With BatchNorm parameters and statistics that are not the trivial initial ones."""
    attention = AttentionMechanism(CHANNELS, CLASSES, variant=variant, rngs=nnx.Rngs(0), **options)
    rng = np.random.default_rng(1)
    for branch in attention.branches:
        if branch.norm is not None:
            for name in ("scale", "bias", "mean", "var"):
                variable = getattr(branch.norm, name)
                variable[...] = jnp.asarray(rng.uniform(0.5, 1.5, variable.shape), jnp.float32)
    return attention


def literal(attention, variant, maps, train=False):
    """Fig. 3 as it is drawn: branches, upsample, concatenate, fuse; all classes [B, K, H, W]."""
    settings = VARIANTS[variant]
    maps = maps[-(settings.layers or 3) :]
    size = (max(m.shape[1] for m in maps),) * 2
    outputs = []
    for i, features in enumerate(maps):
        x = features
        if settings.branches:
            branch = attention.branches[i]
            x = x @ branch.conv.kernel[...] + branch.conv.bias[...]
            if settings.batch_norm:
                norm = branch.norm
                mean, var = norm.mean[...], norm.var[...]
                if train:
                    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
                x = (x - mean) / jnp.sqrt(var + 1e-5) * norm.scale[...] + norm.bias[...]
            if settings.skip:
                x = x + features
            x = jax.nn.sigmoid(x) if settings.activation == "sigmoid" else jnp.maximum(x, 0)
        outputs.append(upsample(x.transpose(0, 3, 1, 2), size))
    joined = jnp.concatenate(outputs, axis=1)
    class_maps = jnp.einsum("bchw,ck->bkhw", joined, attention.fusion.kernel[...])
    return class_maps + attention.fusion.bias[...][:, None, None]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("train", [False, True])
def test_class_maps_and_gradients_equal_the_literal_formula(variant, train):
    attention = mechanism(variant)
    graph, params, rest = nnx.split(attention, nnx.Param, ...)
    weights = np.random.default_rng(2).normal(size=(3, CLASSES, 1, 1)).astype(np.float32)

    def run(params, maps, function):
        model = nnx.merge(graph, params, rest, copy=True)
        out = function(model, maps)
        return jnp.sum(weights * out**2), out

    def ours(model, maps):
        return model(maps, train=train)

    def theirs(model, maps):
        return literal(model, variant, maps, train)

    with jax.default_matmul_precision("highest"):
        grad = jax.jit(jax.grad(run, argnums=(0, 1), has_aux=True), static_argnums=2)
        gradients, maps = grad(params, features(), ours)
        expected_gradients, expected = grad(params, features(), theirs)
    np.testing.assert_allclose(maps, expected, atol=1e-5 * jnp.abs(expected).max())
    pairs = list(zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients)))
    largest = max(jnp.abs(b).max() for _, b in pairs)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, atol=1e-5 * largest)


def test_chosen_classes_are_the_same_maps_as_all_classes():
    attention = mechanism()
    everything = attention(features())
    shared = attention(features(), jnp.array([7, 0]))
    np.testing.assert_allclose(shared, everything[:, [7, 0]], atol=1e-6)
    own = np.array([[1, 2], [10, 10], [0, 5]])
    expected = np.take_along_axis(np.asarray(everything), own[:, :, None, None], axis=1)
    np.testing.assert_allclose(attention(features(), jnp.asarray(own)), expected, atol=1e-6)


def test_maps_have_the_size_of_the_largest_feature_map_used():
    assert mechanism()(features()).shape == (3, CLASSES, 8, 8)
    assert mechanism("two_layers")(features()).shape == (3, CLASSES, 4, 4)
    assert mechanism("lcam")(features()).shape == (3, CLASSES, 3, 3)


def test_lcam_is_one_convolution():
    shapes = [p.shape for p in jax.tree.leaves(nnx.state(mechanism("lcam"), nnx.Param))]
    assert sorted(shapes) == [(CHANNELS[-1], CLASSES), (CLASSES,)] or sorted(shapes) == [
        (CLASSES,),
        (CHANNELS[-1], CLASSES),
    ]


def test_batch_norm_moves_its_statistics_as_pytorch_does():
    x = np.random.default_rng(3).normal(2, 3, size=(4, 5, 5, 6)).astype(np.float32)
    ours, theirs = BatchNorm(6), torch.nn.BatchNorm2d(6)
    for _ in range(3):
        out = ours(jnp.asarray(x), train=True)
        expected = theirs(torch.tensor(x.transpose(0, 3, 1, 2)))
        np.testing.assert_allclose(out, expected.detach().numpy().transpose(0, 2, 3, 1), atol=1e-5)
    np.testing.assert_allclose(ours.mean[...], theirs.running_mean, rtol=1e-5)
    np.testing.assert_allclose(ours.var[...], theirs.running_var, rtol=1e-5)


def test_statistics_stay_when_not_training():
    attention = mechanism()
    before = nnx.state(attention, nnx.BatchStat)
    attention(features())
    assert jax.tree.all(jax.tree.map(jnp.array_equal, before, nnx.state(attention, nnx.BatchStat)))


def test_bfloat16_is_close_and_finite_with_float32_parameters_and_maps():
    half = mechanism(dtype=jnp.bfloat16)
    assert {p.dtype for p in jax.tree.leaves(nnx.state(half))} == {jnp.dtype("float32")}
    for train in (False, True):
        maps = half([jnp.asarray(f, jnp.bfloat16) for f in features()], train=train)
        assert maps.dtype == jnp.float32
        expected = mechanism()(features(), train=train)
        np.testing.assert_allclose(maps, expected, atol=0.05 * float(jnp.abs(expected).max()))


def test_initial_parameters_have_pytorchs_spread():
    attention = AttentionMechanism((64,), 500, variant="lcam", rngs=nnx.Rngs(0))
    for value in (attention.fusion.kernel[...], attention.fusion.bias[...]):
        assert jnp.abs(value).max() <= 1 / 8
        np.testing.assert_allclose(value.std(), 1 / 8 / np.sqrt(3), rtol=0.1)


def test_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="unknown variant 'deep': use one of ttame, no_skip"):
        mechanism("deep")


@pytest.mark.parametrize("variant", ["ttame", "two_layers", "one_layer", "lcam"])
def test_started_from_the_head_the_maps_are_class_activation_maps(variant):
    attention = AttentionMechanism(CHANNELS, CLASSES, variant=variant, rngs=nnx.Rngs(0))
    weights = np.random.default_rng(4).normal(size=(CHANNELS[-1], CLASSES)).astype(np.float32)
    attention.start_from_head(jnp.asarray(weights))
    rectified = [np.maximum(f, 0) for f in features()]
    maps = attention(rectified)
    cam = jnp.einsum("bhwc,ck->bkhw", rectified[-1], weights)
    expected = 4 * upsample(cam, maps.shape[-2:]) / np.linalg.norm(weights, axis=0).mean()
    np.testing.assert_allclose(maps, expected, atol=1e-5)


@pytest.mark.parametrize("variant", ["no_skip", "no_skip_no_batch_norm", "sigmoid"])
def test_variants_that_cannot_start_from_the_head_say_so(variant):
    attention = AttentionMechanism(CHANNELS, CLASSES, variant=variant, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=f"'{variant}' lacks: use --start random"):
        attention.start_from_head(jnp.ones((CHANNELS[-1], CLASSES)))


SCALES = (300.0, 0.01, 7.0)
SCALABLE = [name for name, settings in VARIANTS.items() if settings.activation == "relu"]


def scaled_mechanism(variant):
    attention = mechanism(variant, scale_features=True)
    attention.feature_scale[...] = jnp.array(SCALES[-len(attention.channels) :])
    return attention


@pytest.mark.parametrize("variant", SCALABLE)
@pytest.mark.parametrize("train", [False, True])
def test_feature_maps_are_divided_by_their_scale(variant, train):
    large = [scale * f for scale, f in zip(SCALES, features())]
    maps = scaled_mechanism(variant)(large, train=train)
    np.testing.assert_allclose(maps, mechanism(variant)(features(), train=train), atol=1e-5)


@pytest.mark.parametrize("variant", SCALABLE)
def test_a_folded_scale_gives_the_same_maps(variant):
    attention = scaled_mechanism(variant)
    large = [scale * f for scale, f in zip(SCALES, features())]
    maps = attention(large)
    attention.fold_feature_scale()
    assert attention.feature_scale is None
    np.testing.assert_allclose(attention(large), maps, atol=1e-5)
    attention.fold_feature_scale()  # nothing is left to fold
    np.testing.assert_allclose(attention(large), maps, atol=1e-5)


def test_a_scale_that_cannot_be_folded_is_refused():
    with pytest.raises(ValueError, match="--scale-features .* --variant sigmoid: only with ReLU"):
        mechanism("sigmoid", scale_features=True)

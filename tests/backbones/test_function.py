"""Classifiers given as functions: found properties, reading and editing a feature, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from running import run
from tiny import TINY

from ttame_jax import save_backbone
from ttame_jax.backbones import FunctionBackbone
from ttame_jax.methods import compute_maps, load_method
from ttame_jax.preprocessing import Preprocessing
from ttame_jax.weights.transfer import digest

SMALL = Preprocessing(image_size=8, resize_size=8)
IMAGES = jax.random.normal(jax.random.key(1), (5, 8, 8, 3))


def weights(*shape):
    return jax.random.normal(jax.random.key(sum(shape)), shape) / np.sqrt(shape[0])


PARAMS = {
    "stem": weights(3, 6),
    "body": weights(6, 6),
    "skip": weights(6, 4),
    "head": weights(6, 4),
}


def convolve(kernel, x):
    """A 3x3 mean and a 1x1 convolution of [B, H, W, C]."""
    window = ((1, 3, 3, 1), (1, 1, 1, 1), "SAME")
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, *window) / 9 @ kernel


def cnn(params, images):
    first = jax.nn.relu(convolve(params["stem"], images))
    second = jax.nn.gelu(convolve(params["body"], first))
    logits = second.mean((1, 2)) @ params["head"] + first.max((1, 2)) @ params["skip"]
    return logits, {"first": first, "second": second}


def nested(params, images):
    """The same in functions under `jax.jit` and `jax.checkpoint`."""
    block = jax.checkpoint(lambda kernel, x: jax.nn.gelu(convolve(kernel, x)))
    first = jax.jit(lambda params: jax.nn.relu(convolve(params["stem"], images)))(params)
    second = jax.jit(lambda params, x: block(params["body"], x))(params, first)
    logits = second.mean((1, 2)) @ params["head"] + first.max((1, 2)) @ params["skip"]
    return logits, {"first": first, "second": second}


def channels_first(params, images):
    """The same, whose features are other layouts of the arrays that the logits are computed from."""
    logits, features = cnn(params, images)
    return logits, {name: x.transpose(0, 3, 1, 2) for name, x in features.items()}


def tokens(params, images):
    """A class token before the 64 tokens of the pixels."""
    x = images.reshape(len(images), 64, 3) @ params["stem"]
    first = jnp.concatenate([jnp.broadcast_to(params["token"], (len(x), 1, 6)), x], axis=1)
    second = first + jax.nn.softmax(first @ first.mT) @ first @ params["body"]
    return second[:, 0] @ params["head"], {"first": first, "second": second}


def built(function, **options):
    params = PARAMS | {"token": weights(1, 6)} if function is tokens else PARAMS
    return FunctionBackbone(function, params, preprocessing=SMALL, **options)


FUNCTIONS = [cnn, nested, channels_first, tokens]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("layer", ["first", "second"])
def test_the_two_parts_equal_the_whole(function, layer):
    backbone = built(function)
    logits, features = run(backbone, IMAGES)
    before, after = backbone.split(layer)
    after, state = jax.jit(after), jax.jit(before)(IMAGES)
    feature = features[backbone.layers.index(layer)]
    np.testing.assert_allclose(backbone.feature_map(state[0]), feature, atol=1e-6)
    np.testing.assert_allclose(after(state), logits, atol=1e-5)
    some = jax.tree.map(lambda x: x[2:4], state)  # another batch size
    np.testing.assert_allclose(after(some, jnp.array([3, 1])), logits[2:4, [3, 1]], atol=1e-5)


@pytest.mark.parametrize("function", [cnn, nested, channels_first])
def test_an_edited_feature_changes_what_is_computed_from_it(function):
    before, after = built(function).split("first")
    feature, *rest = jax.jit(before)(IMAGES)
    kept = feature.at[..., 2].set(0)
    second = jax.nn.gelu(convolve(PARAMS["body"], kept))
    expected = second.mean((1, 2)) @ PARAMS["head"] + kept.max((1, 2)) @ PARAMS["skip"]
    np.testing.assert_allclose(jax.jit(after)((kept, *rest)), expected, atol=1e-5)


@pytest.mark.parametrize("function", [channels_first, tokens])
def test_gradients_pass_through_both_parts(function):
    backbone = built(function)
    before, after = backbone.split("first")
    found = jax.jit(jax.grad(lambda x: (after(before(x)) ** 2).sum()))(IMAGES)
    expected = jax.jit(jax.grad(lambda x: (backbone(x)[0] ** 2).sum()))(IMAGES)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_only_what_depends_on_the_feature_is_computed_after_it():
    before, after = built(cnn).split("second")
    state = jax.eval_shape(before, IMAGES)
    assert [x.shape for x in state] == [(5, 8, 8, 6), (5, 1, 4), (5, 8, 8, 0)]
    program = str(jax.make_jaxpr(after)(state))
    assert "erf" not in program and "tanh" not in program and "reduce_window" not in program


def test_layout_prefix_size_and_masking_are_found():
    found = built(cnn)
    assert (found.layout, found.any_size, found.masking) == ("NHWC", True, "pixel")
    assert found.name == "cnn" and found.num_classes == 4
    assert found.feature_layers == ("first", "second") and found.target_layer == "second"
    assert built(channels_first).layout == "NCHW"
    found = built(tokens)
    assert (found.prefix_tokens, found.any_size, found.masking) == (1, False, "standardised")
    assert found.feature_shapes() == ((8, 8, 6), (8, 8, 6))
    with pytest.raises(ValueError, match="tokens was built for 8x8 pixels, got 12x8"):
        found(jnp.zeros((1, 12, 8, 3)))


def test_images_of_another_size():
    backbone = built(cnn)
    images = jnp.ones((2, 10, 12, 3))
    before, after = backbone.split("first")
    found = jax.jit(lambda x: after(before(x)))(images)
    np.testing.assert_allclose(found, run(backbone, images)[0], atol=1e-5)


def test_features_for_explanations_and_for_cams_may_differ():
    backbone = built(cnn, feature_layers=["second"], target_layer="first")
    assert len(backbone(IMAGES)[1]) == 1
    assert backbone.split()[0](IMAGES)[0].shape == (5, 8, 8, 6)


def test_parameters_are_arguments_of_the_compiled_function():
    graph, state = nnx.split(built(cnn))
    program = jax.make_jaxpr(lambda state, x: nnx.merge(graph, state)(x))(state, IMAGES)
    assert not program.consts
    doubled = nnx.merge(graph, jax.tree.map(lambda x: 2 * x, state))
    np.testing.assert_allclose(doubled.params["stem"], 2 * PARAMS["stem"])


def test_integers_and_keys_of_random_numbers_may_be_parameters():
    def function(params, images):
        shift = jax.random.normal(params["key"], (6,)) * params["count"]
        first = images @ params["stem"] + shift
        return first.mean((1, 2)) @ params["head"], {"first": first}

    params = PARAMS | {"key": jax.random.key(3), "count": np.arange(6)}
    backbone = FunctionBackbone(function, params, preprocessing=SMALL)
    expected, _ = function(params, IMAGES)
    np.testing.assert_allclose(run(backbone, IMAGES)[0], expected, atol=1e-4)
    other = FunctionBackbone(function, params | {"key": jax.random.key(4)}, preprocessing=SMALL)
    assert digest(backbone) != digest(other)


def as_function(backbone):
    """A ported backbone as a function that returns the outputs of its layers."""
    graph, state = nnx.split(backbone)
    names = {*backbone.feature_layers, backbone.target_layer}

    def function(state, images):
        values, features = (images,), {}
        for name, layer in nnx.merge(graph, state).named_layers():
            values = layer(*values)
            if name in names:
                features[name] = values[0]
        return values[0], features

    return FunctionBackbone(
        function,
        state,
        preprocessing=backbone.preprocessing,
        feature_layers=backbone.feature_layers,
        target_layer=backbone.target_layer,
    )


@pytest.mark.parametrize(
    ("name", "options"), [("squeezenet1_1", {"image_size": 33, "num_classes": 5}), ("vit", TINY)]
)
def test_methods_explain_a_function_as_they_explain_a_ported_family(name, options, random_backbone):
    ported = random_backbone(name, **options)
    function = as_function(ported)
    size = ported.preprocessing.image_size
    images = jax.random.uniform(jax.random.key(0), (2, size, size, 3))
    classes = jnp.array([[0, 1], [3, 2]])
    assert function.masking == ported.masking and function.any_size == ported.any_size
    with jax.default_matmul_precision("highest"):
        for method in ("gradcam", "ablationcam"):
            maps = [
                compute_maps(load_method(method, b), images, classes) for b in (ported, function)
            ]
            np.testing.assert_allclose(*maps, atol=1e-5)


def test_iia_of_tokens_gives_maps_of_the_patches():
    method = load_method("iia", built(tokens), layer="first", steps=1)
    maps = compute_maps(method, IMAGES[:2].clip(0, 1), [[0], [1]])
    assert maps.shape == (2, 1, 8, 8) and maps.max() == 1


def test_what_only_ported_families_have_is_refused(tmp_path):
    with pytest.raises(ValueError, match="transformer_lrp explains only .*tokens is not one"):
        load_method("transformer_lrp", built(tokens))
    with pytest.raises(ValueError, match="cnn belongs to no family"):
        save_backbone(built(cnn), tmp_path / "cnn.safetensors")


def returning(logits=lambda x: x.mean((1, 2)), **features):
    def function(params, images):
        return logits(images), {name: value(images) for name, value in features.items()}

    return function


def copied(params, images):
    first = images @ params["stem"]
    return first.mean((1, 2)), {"first": first * 1}


def looped(params, images):
    last, each = jax.lax.scan(lambda x, _: (x + 1, x), images, length=2)
    return last.mean((1, 2)), {"first": each[0]}


def constant(params, images):
    first = images @ params["stem"]
    return first.mean((1, 2)), {"first": jnp.ones((len(images), 4, 4, 3))}


WRONG = {
    "no pair": (lambda params, images: images.mean((1, 2)), {}, "must return logits and a"),
    "no features": (returning(), {}, "must return logits and a dict of at least one feature"),
    "list": (returning(x=lambda x: [x]), {}, "must return feature 'x' as an array, not a list"),
    "logits": (
        returning(lambda x: x.sum((0, 1, 2)), x=jnp.abs),
        {},
        r"must return logits \[2, num",
    ),
    "vector": (
        returning(x=lambda x: x.mean((1, 2))),
        {},
        r"'x' of function has the shape \[2, 3\]",
    ),
    "position": (
        returning(x=lambda x: x.mean((1, 2), keepdims=True)),
        {"layout": "NHWC"},
        "'x' of function has a single position",
    ),
    "shapes": (
        returning(x=lambda x: x @ jnp.ones((4, 3))),
        {},
        "cannot be evaluated on images .*dot",
    ),
    "layout": (returning(x=lambda x: x[:, :3, :3]), {}, "layout of the features .* is not clear"),
    "prefix": (
        returning(x=lambda x: x[:, 0]),
        {"prefix_tokens": 1},
        "has 8 tokens: without prefix",
    ),
    "target": (cnn, {"target_layer": "third"}, "cnn has no layer 'third'; it has first, second"),
    "any size": (tokens, {"any_size": True}, "need any_size=False"),
    "class weights": (cnn, {"class_weights": lambda p: p["stem"]}, r"must have the shape \[6, 4\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_functions_are_refused_in_one_line(case):
    function, options, message = WRONG[case]
    with pytest.raises(ValueError, match=message) as error:
        built(function, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("function", [copied, looped, constant])
def test_a_feature_beside_the_path_to_the_logits_cannot_be_split_at(function):
    backbone = built(function)
    assert backbone(IMAGES)[1][0].shape[0] == 5
    with pytest.raises(ValueError, match="not computed from its feature 'first'"):
        load_method("gradcam", backbone)


def test_parameters_must_be_arrays():
    with pytest.raises(ValueError, match=r"params\['act'\] is a function"):
        FunctionBackbone(cnn, {"act": cnn}, preprocessing=SMALL)


def test_class_weights_are_those_of_the_parameters():
    backbone = built(cnn, class_weights=lambda params: params["head"])
    np.testing.assert_array_equal(backbone.class_weights, PARAMS["head"])
    assert built(cnn).class_weights is None

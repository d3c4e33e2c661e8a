import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TINY

from ttame_jax import compilers
from ttame_jax.backbones.function import FunctionBackbone
from ttame_jax.masking import min_max_scale, upsample
from ttame_jax.methods import LibraGrad
from ttame_jax.methods.cam import CAM
from ttame_jax.preprocessing import Preprocessing
from ttame_jax.training.relevance import classify_with_relevance
from ttame_jax.weights import load_backbone

SIZE = 64
IMAGES = jax.random.uniform(jax.random.key(0), (4, SIZE, SIZE, 3))


def channels_first(params, images):
    """A CNN with features [B, C, H, W]."""
    features, x = {}, jnp.moveaxis(images, -1, 1)
    for name in ("first", "second"):
        x = jax.nn.relu(jax.lax.conv(x, params[name], (2, 2), "SAME"))
        features[name] = x
    return jnp.tanh(x.mean((2, 3))) @ params["head"], features


def function_backbone():
    keys = jax.random.split(jax.random.key(1), 3)
    shapes = {"first": (8, 3, 3, 3), "second": (12, 8, 3, 3), "head": (12, 5)}
    params = {
        name: jax.random.normal(key, shape) / 5 for key, (name, shape) in zip(keys, shapes.items())
    }
    return FunctionBackbone(channels_first, params, preprocessing=Preprocessing(image_size=SIZE))


def squeezenet():
    return load_backbone("squeezenet1_1", image_size=SIZE, num_classes=5)


def relevance(backbone, layers):
    """The relevance maps, and the classes [B, 1] that they are of."""
    logits, features, maps = jax.jit(lambda x: classify_with_relevance(backbone, x, layers))(IMAGES)
    expected = jax.jit(lambda x: backbone(backbone.preprocessing.standardise(x)))(IMAGES)
    for a, b in zip(jax.tree.leaves((logits, features)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(abs(b).max()))
    return maps, logits.argmax(-1)[:, None]


@pytest.mark.parametrize("build", [squeezenet, function_backbone])
@pytest.mark.parametrize("first", [0, 1])
def test_of_a_cnn_it_is_the_mean_of_gradient_times_activation(build, first, monkeypatch):
    monkeypatch.setattr(compilers, "CPU_PIXELS", 2 * SIZE * SIZE)
    backbone, maps = build(), []
    layers = backbone.feature_layers[first:]
    found, classes = relevance(backbone, layers)
    for layer in layers:
        cam = CAM(backbone, layer)
        activations, gradients = jax.jit(cam.activations_and_gradients)(IMAGES, classes)
        products = np.array((activations * gradients[:, 0]).sum(-1))
        products -= products.mean((1, 2), keepdims=True)
        maps.append(products / products.std((1, 2), keepdims=True))
    size = maps[0].shape[1:]
    expected = np.mean([upsample(jnp.asarray(m), size) for m in maps], axis=0)
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_the_passes_share_what_they_have_in_common():
    """Several feature maps cost little more than the earliest, whose gradient passes the others,
    and that no more than the gradient of the pass that classifies."""
    backbone = squeezenet()
    before, after = backbone.split(backbone.feature_layers[0])

    def flops(function):
        return jax.jit(function).lower(IMAGES).compile().cost_analysis()["flops"]

    def gradient(images):
        state = before(backbone.preprocessing.standardise(images))
        return jax.grad(lambda state: after(state).max(-1).sum())(state)

    layers = backbone.feature_layers
    most = flops(lambda images: classify_with_relevance(backbone, images, layers))
    assert most < 1.05 * flops(gradient)


def test_of_a_vit_it_is_that_of_libragrad_with_its_sign():
    backbone = load_backbone("vit", **TINY | {"image_size": SIZE})
    maps, classes = relevance(backbone, backbone.feature_layers)
    assert maps.shape == (4, SIZE // 8, SIZE // 8) and (maps < 0).any()
    expected = jax.jit(LibraGrad(backbone))(IMAGES, classes)[:, 0]
    np.testing.assert_allclose(min_max_scale(jax.nn.relu(maps)), expected, atol=1e-5)

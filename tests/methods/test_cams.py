"""Grad-CAM, Grad-CAM++, Score-CAM and Ablation-CAM: the package's maps, and cases by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from real_images import read_images
from running import run
from tiny import TINY

from benchmarks.methods import CAMS, RECIPES, agreement, our_maps, package_cam, torch_model
from ttame_jax.backbones.base import Architecture, Backbone, chain
from ttame_jax.methods import (
    AblationCAM,
    GradCAM,
    GradCAMPlusPlus,
    LayerCAM,
    ScoreCAM,
    compute_maps,
    load_method,
)
from ttame_jax.weights import load_backbone


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def assert_agrees(method, images, classes):
    """The largest difference and the correlation that the package's map may have from ours."""
    theirs = package_cam(method.name, torch_model(method.backbone), method.backbone)
    found = agreement(our_maps(method, images, classes), theirs(images, classes))
    assert found["largest_difference"] <= 1e-3
    assert found["correlation"] >= 0.9999


@pytest.fixture(scope="module")
def squeezenet(shared):
    weights = shared / "weights/squeezenet1_0.safetensors"
    return load_backbone("squeezenet1_0", weights, image_size=64)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in ("scorecam", "ablationcam"))) for n in CAMS],
)
def test_methods_agree_with_the_package_on_real_images(name, squeezenet, shared):
    several = name not in ("scorecam", "ablationcam")  # one forward pass
    images = read_images(shared, squeezenet.preprocessing, 3 if several else 1)
    method = load_method(name, squeezenet, **RECIPES.get(name, {}))
    assert_agrees(method, images, np.array([281, 5, 900])[: len(images)])


# Not Score-CAM and Ablation-CAM of ResNet-18, which take 512 forward passes.
OTHERS = [(name, "vit", TINY) for name in CAMS]
OTHERS += [(name, "resnet18", {"image_size": 64}) for name in ("gradcam", "gradcam++")]
OTHERS += [
    pytest.param("gradcam", name, {"image_size": size}, marks=pytest.mark.slow)
    for name, size in (("convnext_tiny", 64), ("swin_t", 224))
]


@pytest.mark.parametrize(("name", "backbone", "config"), OTHERS)
def test_methods_agree_with_the_package_on_other_families(name, backbone, config):
    backbone = load_backbone(backbone, **config)
    size = backbone.preprocessing.image_size
    images = np.random.default_rng(0).normal(size=(1, size, size, 3)).astype(np.float32)
    likeliest = np.asarray(run(backbone, images)[0].argmax(-1))
    assert_agrees(load_method(name, backbone, **RECIPES.get(name, {})), images, likeliest)


class Pixels(Backbone):
    """Classes are weighted means of colours: its target layer is the image itself."""

    feature_layers, target_layer = ("image",), "image"

    def __init__(self, weights):
        from ttame_jax.preprocessing import Preprocessing

        preprocessing = Preprocessing(4, 4, mean=(0.0,) * 3, std=(1.0,) * 3)
        architecture = Architecture(num_classes=len(weights[0]), preprocessing=preprocessing)
        super().__init__("pixels", architecture)
        self.weights = nnx.Param(jnp.array(weights, jnp.float32))  # [3, Cls]

    def named_layers(self):
        return chain([("image", lambda x: x), ("head", self._classify)])

    def _classify(self, x, classes=None):
        logits = x.mean((1, 2)) @ self.weights[...]
        return logits if classes is None else logits[:, classes]


def one_colour_each():
    """An image [1, 4, 4, 3] whose colours have a row each: red the first, and so on."""
    image = np.zeros((1, 4, 4, 3), np.float32)
    for colour in range(3):
        image[0, colour, :, colour] = 1
    return jnp.asarray(image)


def rows(values):
    return np.repeat(np.array(values, np.float32)[:, None], 4, axis=1)


def test_gradcam_weighs_a_channel_by_the_slope_of_the_class_and_keeps_what_is_positive():
    maps = compute_maps(
        GradCAM(Pixels([[2.0, -1], [1, 4], [-3, 0]])), one_colour_each(), jnp.array([[0, 1]])
    )
    np.testing.assert_allclose(maps[0, 0], rows([1, 0.5, 0, 0]), atol=1e-6)
    np.testing.assert_allclose(maps[0, 1], rows([0, 1, 0, 0]), atol=1e-6)


def test_gradcam_plus_plus_weighs_by_equation_19():
    # The slope at each of 16 places is w / 16, and a colour sums to 4:
    # alpha = g^2 / (2 g^2 + 4 g^3) = 1 / (2 + 4 g), and a channel weighs 16 alpha g.
    maps = compute_maps(
        GradCAMPlusPlus(Pixels([[16.0], [4], [-8]])), one_colour_each(), jnp.array([[0]])
    )
    expected = np.array([16 * 1 / (2 + 4), 16 * 0.25 / (2 + 1), 0, 0])
    np.testing.assert_allclose(maps[0, 0], rows(expected / expected.max()), rtol=1e-5)


def test_gradcam_plus_plus_as_the_package_has_it_adds_to_the_denominator():
    backbone = Pixels([[1e-2], [2e-3], [0]])
    maps = compute_maps(
        GradCAMPlusPlus(backbone, recipe="reference"), one_colour_each(), jnp.array([[0]])
    )
    slope = np.array([1e-2, 2e-3, 0, 0]) / 16
    expected = slope**3 / (2 * slope**2 + 4 * slope**3 + 1e-6)
    np.testing.assert_allclose(maps[0, 0], rows(expected / expected.max()), rtol=1e-3)


def test_ablationcam_weighs_a_channel_by_the_share_of_the_class_that_goes_with_it():
    # The class is (4 * 3 + 4 * 1) / 16 = 1; red carries three quarters, green one.
    maps = compute_maps(AblationCAM(Pixels([[3.0], [1], [0]])), one_colour_each(), jnp.array([[0]]))
    np.testing.assert_allclose(maps[0, 0], rows([1, 1 / 3, 0, 0]), rtol=1e-5)


def test_ablationcam_of_a_class_at_zero_is_finite():
    maps = compute_maps(AblationCAM(Pixels([[0.0], [0], [0]])), one_colour_each(), jnp.array([[0]]))
    assert np.isfinite(maps).all()


def test_scorecam_weighs_by_the_softmax_of_what_each_channel_leaves():
    # A mask of one colour's row leaves that colour alone: 4 * w / 16.
    maps = compute_maps(ScoreCAM(Pixels([[8.0], [4], [0]])), one_colour_each(), jnp.array([[0]]))
    left = np.exp([2.0, 1, 0])
    np.testing.assert_allclose(maps[0, 0], rows([*left / left[0], 0]), rtol=1e-5)


@pytest.mark.parametrize("name", CAMS)
def test_maps_do_not_depend_on_the_batch_nor_on_which_classes_are_asked_together(name):
    backbone = load_backbone("digits_cnn")
    method = load_method(name, backbone)
    images = jax.random.uniform(jax.random.key(0), (3, 64, 64, 3))
    together = compute_maps(method, images, jnp.array([[1, 2], [3, 4], [5, 6]]))
    assert together.shape == (3, 2, 2, 2)
    assert np.ptp(together, axis=(2, 3)).max() == 1
    alone = compute_maps(method, images[1:2], jnp.array([[4]]))
    np.testing.assert_allclose(together[1, 1], alone[0, 0], atol=1e-4)


def test_layercam_weighs_each_position_by_its_own_slope():
    # The class is the sum of squares of the first row's red and of the last row's blue, negative.
    class Squares(Pixels):
        def _classify(self, x, classes=None):
            logits = jnp.einsum("bhwc,c->b", x**2, self.weights[:, 0])[:, None]
            return logits if classes is None else logits[:, classes]

    image = one_colour_each().at[0, 0, 0, 0].set(0.5)
    maps = compute_maps(LayerCAM(Squares([[1.0], [0], [-1]])), image, jnp.array([[0]]))
    expected = rows([1, 0, 0, 0])
    expected[0, 0] = 0.25  # slope times activation, 2 x^2
    np.testing.assert_allclose(maps[0, 0], expected, atol=1e-6)


def test_another_layer_can_be_read_by_name():
    cam = GradCAM(load_backbone("digits_cnn"), layer="layers.1.0")
    assert compute_maps(cam, jnp.ones((1, 64, 64, 3)) / 2, jnp.array([[0]])).shape == (1, 1, 8, 8)
    with pytest.raises(ValueError, match="digits_cnn has no layer 'layer4'"):
        GradCAM(load_backbone("digits_cnn"), layer="layer4")

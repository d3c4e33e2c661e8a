import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import TINY

from ttame_jax import TTAME, AttentionMechanism, Explainer, load_backbone, load_explainer
from ttame_jax.experiments.train import train

pytestmark = pytest.mark.quick

IMAGES = np.random.default_rng(0).uniform(size=(3, 32, 32, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def explainer():
    attention = AttentionMechanism([32] * 3, 5, rngs=nnx.Rngs(0))
    return Explainer(TTAME(load_backbone("vit", **TINY), attention))


def test_the_predicted_class_is_explained_by_default(explainer):
    explanation = explainer(IMAGES)
    logits, _ = explainer.backbone(explainer.backbone.preprocessing.standardise(IMAGES))
    assert explanation.maps.shape == (3, 1, 4, 4)
    np.testing.assert_array_equal(explanation.classes[:, 0], logits.argmax(-1))
    np.testing.assert_allclose(
        explanation.probabilities[:, 0], jax.nn.softmax(logits).max(-1), rtol=1e-5
    )
    np.testing.assert_allclose(explanation.maps.min((2, 3)), 0)
    np.testing.assert_allclose(explanation.maps.max((2, 3)), 1)


def test_every_way_to_ask_for_classes_gives_the_same_maps(explainer):
    everything = explainer(IMAGES, "all")
    assert everything.maps.shape == (3, 5, 4, 4)
    np.testing.assert_array_equal(everything.classes, np.tile(np.arange(5), (3, 1)))
    np.testing.assert_allclose(everything.probabilities.sum(1), 1, rtol=1e-5)
    two = explainer(IMAGES, 2)
    np.testing.assert_allclose(two.maps[:, 0], everything.maps[:, 2], atol=1e-5)
    for same in ([2, 4], np.array([2, 4]), ["2", 4]):
        listed = explainer(IMAGES, same)
        np.testing.assert_array_equal(listed.classes, [[2, 4]] * 3)
        np.testing.assert_allclose(listed.maps[:, 1], everything.maps[:, 4], atol=1e-5)
    own = explainer(IMAGES, np.array([[4, 0], [1, 1], [3, 2]]))
    np.testing.assert_allclose(own.maps[2, 1], everything.maps[2, 2], atol=1e-5)
    top = explainer(IMAGES, "top3")
    order = np.argsort(-np.asarray(everything.probabilities), axis=1)[:, :3]
    np.testing.assert_array_equal(top.classes, order)


def test_classes_are_given_by_name(explainer):
    named = Explainer(explainer.method, ["cat", "dog", "cow", "hen", "small dog"])
    np.testing.assert_array_equal(named(IMAGES, "Dog").maps, explainer(IMAGES, 1).maps)
    np.testing.assert_array_equal(named(IMAGES, ["hen", 0]).classes, [[3, 0]] * 3)
    with pytest.raises(ValueError, match="no class 'dogs': did you mean dog"):
        named(IMAGES, "dogs")
    with pytest.raises(ValueError, match="2 class names for 5 classes"):
        Explainer(explainer.method, ["cat", "dog"])


@pytest.mark.parametrize("sigmoid_maps", [False, True])
def test_maps_are_scaled_before_the_sigmoid_unless_they_were_trained_behind_it(
    sigmoid_maps, explainer
):
    attention = AttentionMechanism([32] * 3, 5, sigmoid_maps=sigmoid_maps, rngs=nnx.Rngs(0))
    explainer = Explainer(TTAME(explainer.backbone, attention))
    _, features = explainer.backbone(explainer.backbone.preprocessing.standardise(IMAGES))
    class_maps = 1 / (1 + jnp.exp(-attention(features))) if sigmoid_maps else attention(features)
    low, high = (f(class_maps, (2, 3), keepdims=True) for f in (jnp.min, jnp.max))
    expected = (class_maps - low) / (high - low)
    np.testing.assert_allclose(explainer(IMAGES, "all").maps, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("images", "classes", "message"),
    [
        (IMAGES[0], None, r"floats \[B, H, W, 3\] in \[0, 1\], not float32 \[32, 32, 3\]"),
        ((IMAGES * 255).astype(np.uint8), None, "not uint8"),
        (IMAGES * 255, None, "divide uint8 images by 255"),
        (IMAGES - 0.5, None, "do not standardise them"),
        (IMAGES, 5, "classes must lie in 0 to 4"),
        (IMAGES, -1, "classes must lie in 0 to 4"),
        (IMAGES, np.zeros((2, 1), int), r"B = 3, not int64 \[2, 1\]"),
        (IMAGES, 1.5, "not float64"),
        (IMAGES, "top9", "classes 'top9': use up to 'top5'"),
        (IMAGES, "best", "no names, so 'best' is unknown: give ids \\(0 to 4\\), all, top5"),
        (IMAGES, ["cat", 2], "'cat' is unknown"),
        (IMAGES, [2, 9], "classes must lie in 0 to 4"),
        (IMAGES, "7", "no class 7: class ids are 0 to 4"),
    ],
)
def test_bad_input_is_refused_in_one_line(explainer, images, classes, message):
    with pytest.raises(ValueError, match=message) as error:
        explainer(images, classes)
    assert "\n" not in str(error.value)


def test_load_explainer_says_what_is_missing(config):
    with pytest.raises(FileNotFoundError, match="is not a run: config.json is missing"):
        load_explainer(config.output)
    config.save()
    with pytest.raises(FileNotFoundError, match="has no checkpoint yet"):
        load_explainer(config.output)


def test_load_explainer_takes_weights_that_have_moved(config, tmp_path):
    from ttame_jax.weights import save_backbone

    weights = tmp_path / "weights.safetensors"
    save_backbone(load_backbone("vit", **TINY), weights)
    config = dataclasses.replace(config, weights=str(weights), epochs=1, validation_images=0)
    train(config)
    here = load_explainer(config.output)(IMAGES)
    moved = weights.rename(tmp_path / "moved.safetensors")
    with pytest.raises(FileNotFoundError, match="weights.safetensors"):
        load_explainer(config.output)
    there = load_explainer(config.output, weights=str(moved))(IMAGES)
    for field in dataclasses.fields(here):
        np.testing.assert_array_equal(getattr(here, field.name), getattr(there, field.name))

import absl.logging
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny import TINY

import ttame_jax
from ttame_jax import load_backbone, load_explainer, preprocess, save_backbone
from ttame_jax.explaining import open_explainer
from ttame_jax.pictures import resize_map
from ttame_jax.preprocessing import to_float


@pytest.fixture(scope="module")
def squeezenet(random_backbone):
    return random_backbone("squeezenet1_1", num_classes=6, image_size=64)


@pytest.fixture(scope="module")
def photograph(pictures):
    return next((pictures / "validation").iterdir())


def test_a_run_explains_a_path_as_its_explainer_does(run, photograph):
    explanation = ttame_jax.explain(photograph, run=run, classes="top2")
    explainer = load_explainer(run)
    image = to_float(preprocess(photograph, explainer.backbone.preprocessing)[None])
    expected = explainer(image, "top2")
    np.testing.assert_allclose(explanation.maps, expected.maps[0], atol=1e-6)
    np.testing.assert_array_equal(explanation.classes, expected.classes[0])
    np.testing.assert_allclose(explanation.probabilities, expected.probabilities[0], rtol=1e-5)
    assert explanation.image.shape == (40, 36, 3)


def test_loading_a_run_logs_nothing(run, caplog):
    absl.logging.set_verbosity(absl.logging.WARNING)  # the default, which commands change
    load_explainer(run)
    assert [record.getMessage() for record in caplog.records] == []
    assert absl.logging.get_verbosity() == absl.logging.WARNING


def test_every_kind_of_picture_gives_the_same_maps(run, photograph):
    explainer = load_explainer(run)
    with Image.open(photograph) as opened:
        image = opened.convert("RGB")
    pixels = np.asarray(image)
    kinds = [str(photograph), image, pixels, pixels / 255, jnp.asarray(pixels)]
    maps = [explainer.explain_picture(kind, 1).maps for kind in kinds]
    for other in maps[1:]:
        np.testing.assert_array_equal(other, maps[0])


def test_several_pictures_give_a_list(squeezenet):
    rng = np.random.default_rng(0)
    sizes = ((64, 64), (96, 130))
    images = [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    explanations = ttame_jax.explain(images, backbone=squeezenet, classes=[2, 0])
    assert [e.image.shape[:2] for e in explanations] == list(sizes)
    assert [e.labels for e in explanations] == [("class 2", "class 0")] * 2
    (only,) = ttame_jax.explain(images[0][None], backbone=squeezenet)
    assert only.maps.shape == (1, *explanations[0].maps.shape[1:])


def test_a_backbone_by_name_is_explained_with_its_weights_and_any_method(tmp_path, photograph):
    vit = load_backbone("vit", **TINY)
    save_backbone(vit, tmp_path / "vit.safetensors")
    named = ttame_jax.explain(
        photograph, backbone="vit", weights=tmp_path / "vit.safetensors", method="gradcam++"
    )
    given = ttame_jax.explain(photograph, backbone=vit, method="gradcam++")
    np.testing.assert_array_equal(named.maps, given.maps)
    assert open_explainer(backbone=vit).method.name == "gradcam"


def test_class_names_come_from_the_caller_or_the_run(run, photograph, tmp_path):
    names = ["cat", "dog", "cow", "hen", "sheep"]
    explanation = ttame_jax.explain(photograph, run=run, classes="cow", class_names=names)
    assert (explanation.classes.tolist(), explanation.labels) == ([2], ("cow",))
    assert ttame_jax.explain(photograph, run=run, classes=2).labels == ("class 2",)


def test_cnns_see_the_whole_picture_and_vits_its_centre(squeezenet):
    wide = np.zeros((64, 200, 3), np.uint8)
    whole = ttame_jax.explain(wide, backbone=squeezenet)
    assert whole.is_whole and whole.maps.shape[2] > 2 * whole.maps.shape[1]
    crop = ttame_jax.explain(wide, backbone=squeezenet, view="crop")
    assert not crop.is_whole and crop.box[2] - crop.box[0] < 64
    vit = load_backbone("vit", **TINY)
    assert not ttame_jax.explain(wide, backbone=vit).is_whole


def test_vits_see_the_whole_picture_in_tiles(run):
    rng = np.random.default_rng(0)
    left, right = rng.integers(0, 256, (2, 32, 32, 3), np.uint8)
    explainer = load_explainer(run)
    wide = explainer.explain_picture(np.concatenate([left, right], axis=1), 3, "whole")
    parts = explainer(to_float(np.stack([left, right])), 3)
    confidence = np.asarray(parts.probabilities[:, 0])
    assert wide.is_whole and wide.maps.shape == (1, 32, 64)
    assert wide.probabilities[0] == pytest.approx(confidence.mean(), rel=1e-4)
    weights = confidence / confidence.max()
    halves = (wide.maps[0, :, :32], wide.maps[0, :, 32:])
    for half, part, weight in zip(halves, np.asarray(parts.maps[:, 0]), weights):
        np.testing.assert_allclose(half, weight * resize_map(part, (32, 32)), atol=1e-4)
    likeliest = explainer.explain_picture(np.concatenate([left, right], axis=1), "top2", "whole")
    assert len(set(likeliest.classes.tolist())) == 2
    assert (np.diff(likeliest.probabilities) <= 0).all()


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((8, 8, 4), np.uint8), r"not uint8 \[8, 8, 4\]"),
        (np.zeros((8, 8, 3), np.int32), "not int32"),
        (np.full((8, 8, 3), 9.0), "divide values up to 255 by 255"),
        (np.full((8, 8, 3), np.nan), r"must lie in \[0, 1\]"),
        (np.zeros((0, 8, 3), np.uint8), r"not uint8 \[0, 8, 3\]"),
        ("nowhere.png", "nowhere.png"),
        (np.zeros((8, 90, 3), np.uint8), "too elongated"),
    ],
)
def test_what_is_no_picture_is_refused(squeezenet, picture, message):
    with pytest.raises((ValueError, OSError), match=message):
        ttame_jax.explain(picture, backbone=squeezenet)


def test_a_run_or_a_backbone_is_needed(run, squeezenet, photograph):
    with pytest.raises(ValueError, match="give a run, or a backbone"):
        ttame_jax.explain(photograph)
    with pytest.raises(ValueError, match="give either a run or a backbone"):
        ttame_jax.explain(photograph, run=run, backbone=squeezenet)
    with pytest.raises(ValueError, match="view must be whole or crop, not 'half'"):
        ttame_jax.explain(photograph, backbone=squeezenet, view="half")


@pytest.mark.parametrize(
    ("method", "message"), [("transformer_lrp", "ViT"), ("ttame", "train one"), ("lime", "unknown")]
)
def test_what_does_not_apply_is_refused_before_weights_are_loaded(method, message, monkeypatch):
    monkeypatch.setattr("ttame_jax.explaining.load_backbone", None)
    with pytest.raises(ValueError, match=message):
        open_explainer(backbone="resnet18", weights="torchvision", method=method)


def test_arguments_that_a_loaded_classifier_cannot_use_are_refused(run, squeezenet, photograph):
    with pytest.raises(ValueError, match="a loaded backbone has its own weights"):
        ttame_jax.explain(photograph, backbone=squeezenet, weights="torchvision")
    for classifier in ({"run": run}, {"backbone": squeezenet}):
        with pytest.raises(ValueError, match="options of a backbone .* need its name"):
            open_explainer(**classifier, backbone_config={"image_size": 64})


def test_an_empty_list_of_class_names_is_refused(run, photograph):
    with pytest.raises(ValueError, match="0 class names for 5 classes"):
        ttame_jax.explain(photograph, run=run, class_names=())

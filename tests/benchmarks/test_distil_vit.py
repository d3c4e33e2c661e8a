import distil_vit
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttame_jax.files import write_safetensors
from ttame_jax.weights import load_backbone, save_backbone
from ttame_jax.weights.transfer import to_torch

TINY = {"patch_size": 8, "width": 32, "depth": 3, "num_heads": 2}


def test_a_vit_is_distilled_from_a_cnn(tmp_path):
    save_backbone(load_backbone("digits_cnn"), tmp_path / "teacher.safetensors")
    options = distil_vit.Options(
        output=tmp_path / "vit.safetensors",
        dataset="digits",
        split="train[:64]",
        test_split="train[:64]",
        teacher="digits_cnn",
        teacher_weights=str(tmp_path / "teacher.safetensors"),
        teacher_size=64,
        image_size=32,
        test_size=40,
        crop_pct=0.8,
        epochs=2,
        batch_size=32,
        **TINY,
    )
    result = distil_vit.run(options)
    assert result["images"] == result["test_images"] == 64
    vit = load_backbone("vit", options.output)
    assert vit.class_names == tuple("0123456789")
    assert (vit.preprocessing.image_size, vit.preprocessing.resize_size) == (40, 50)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "teacher.safetensors",
        "vit.safetensors",
    ]


def test_images_without_labels_are_refused(pictures, tmp_path):
    options = distil_vit.Options(tmp_path / "vit.safetensors", f"folder:{pictures}")
    with pytest.raises(ValueError, match="has no labels"):
        distil_vit.run(options)


def test_a_test_size_that_does_not_fit_is_refused_before_the_training(tmp_path):
    options = distil_vit.Options(
        tmp_path / "vit.safetensors", "digits", test_split="train[:1]", test_size=36, **TINY
    )
    with pytest.raises(ValueError, match="36"):
        distil_vit.run(options)


@pytest.mark.parametrize("wrong", [{"crop_pct": 0.0}, {"smallest_crop": 1.5}, {"mixed": -0.1}])
def test_shares_are_checked(wrong, tmp_path):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} must be"):
        distil_vit.Options(tmp_path / "vit.safetensors", **wrong)


def test_exchanged_patches_count_with_their_label_and_their_features(monkeypatch):
    seen = []

    class Student:
        backbone = load_backbone("vit", image_size=16, num_classes=5, **TINY)

        def __call__(self, images, kept):
            seen.append(kept.shape)
            patches = images.reshape(2, 2, 8, 2, 8, 3).mean((2, 4, 5)).reshape(2, 4, 1)
            logits = jnp.array([[2.0, 0, 0, 0, 0], [0, 2.0, 0, 0, 0]])
            return logits, patches[:, kept]  # the features are those of the exchanged images

    images = np.stack([np.full((16, 16, 3), value, np.uint8) for value in (51, 204)])
    standardised = Student.backbone.preprocessing.standardise(jnp.asarray(images) / 255)
    features = standardised.reshape(2, 2, 8, 2, 8, 3).mean((2, 4, 5))[..., None]
    left = jnp.array([[True, False], [True, False]])
    monkeypatch.setattr(distil_vit, "random_crops", lambda key, x, y, *sizes: (x, y))
    monkeypatch.setattr(distil_vit, "random_rectangle", lambda key, side: left)
    batch = images, jnp.arange(2), features
    for progress, mixed in ((0.0, 1.0), (0.9, 1.0), (0.9, 0.0)):
        loss = distil_vit.distillation_loss(
            Student(), batch, progress, jax.random.key(0), smallest_crop=0.25, mixed=mixed
        )
        own = np.log(np.e**2 + 4) - 2  # the other label has 2 more, and half of the patches
        assert loss == pytest.approx(own + 0.5 * 2 * mixed, abs=1e-5)
    assert set(seen) == {(2,), (4,)}


@pytest.mark.parametrize("layout", ["timm", "own"])
def test_a_vit_for_smaller_images_is_the_start(layout, tmp_path):
    small = load_backbone("vit", image_size=32, num_classes=4, **TINY | {"patch_size": 4})
    if layout == "timm":
        write_safetensors(tmp_path / "small.safetensors", to_torch(small, "timm"), {})
    else:
        save_backbone(small, tmp_path / "small.safetensors")
    large = load_backbone("vit", image_size=64, num_classes=7, seed=1, **TINY)
    head = large.head.kernel[...]
    distil_vit.start_from(large, tmp_path / "small.safetensors")
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        expected = small(images)[1]
        maps = large(images.repeat(2, axis=1).repeat(2, axis=2))[1]
    for ours, theirs in zip(maps, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_array_equal(large.head.kernel[...], head)


def test_the_position_embeddings_of_the_start_are_interpolated(tmp_path):
    save_backbone(load_backbone("vit", image_size=32, **TINY), tmp_path / "small.safetensors")
    large = load_backbone("vit", image_size=48, seed=1, **TINY)
    distil_vit.start_from(large, tmp_path / "small.safetensors")
    expected = load_backbone("vit", tmp_path / "small.safetensors", image_size=48)
    images = np.random.default_rng(0).normal(size=(2, 48, 48, 3)).astype(np.float32)
    for ours, theirs in zip(large(images)[1], expected(images)[1], strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("flip", [False, True])
def test_an_image_and_its_features_are_cropped_alike(flip):
    coordinates = np.stack(np.mgrid[:64, :64], axis=-1).astype(np.float32)
    features = coordinates.reshape(8, 8, 8, 8, 2).mean((1, 3))
    part = (jnp.array([0.2, 0.3]), jnp.array([0.5, 0.6]), flip)
    image = distil_vit.crop(jnp.asarray(coordinates), *part, 64)
    cropped = distil_vit.crop(jnp.asarray(features), *part, 8)
    means = np.asarray(image).reshape(8, 8, 8, 8, 2).mean((1, 3))
    np.testing.assert_allclose(cropped, means, atol=1e-3)
    corner = [0.2 * 64, (0.3 + 0.6 * flip) * 64]
    assert np.abs(image[0, 0] - np.array(corner)).max() < 1


@pytest.mark.parametrize("smallest", [0.1, 0.9])
def test_crops_have_at_least_the_smallest_area(smallest):
    coordinates = np.stack([*np.mgrid[:64, :64], np.zeros((64, 64))], axis=-1)
    images = np.repeat(coordinates[None] / 64, 200, axis=0).astype(np.float32)
    _, parts = distil_vit.random_crops(jax.random.key(0), images, images, 8, 8, smallest)
    extents = np.ptp(parts[..., :2], axis=(1, 2)) * 8 / 7  # from centre to centre of 8 cells
    least = extents.prod(-1).min()
    assert 0.75 * smallest < least < 1.3 * smallest  # a side that does not fit is cut


def test_rectangles_have_all_areas_and_positions():
    keys = jax.random.split(jax.random.key(0), 400)
    masks = np.asarray(jax.vmap(lambda key: distil_vit.random_rectangle(key, 8))(keys))
    areas = masks.mean((1, 2))
    assert areas.min() < 0.05 and areas.max() > 0.8
    assert masks.mean(0).min() > 0.15  # every patch
    rows, columns = masks.any(2), masks.any(1)
    np.testing.assert_array_equal(masks, rows[:, :, None] & columns[:, None, :])
    assert (np.abs(np.diff(rows.astype(int), axis=1)).sum(1) <= 2).all()

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.ndimage import zoom

from benchmarks.methods import torch_model
from ttame_jax.methods import RISE, compute_maps
from ttame_jax.weights import abstract_backbone, load_backbone


@pytest.mark.slow
def test_the_same_masks_through_a_pytorch_loop_give_the_same_map(random_backbone):
    backbone = random_backbone("resnet18", image_size=64)
    images = jax.random.uniform(jax.random.key(0), (2, 64, 64, 3))
    classes = jnp.array([[3, 5], [7, 9]])
    method = RISE(backbone, masks=20)
    masks = torch.from_numpy(np.array(method.random_masks(jnp.arange(20), (64, 64))))
    standardised = np.array(backbone.preprocessing.standardise(images)).transpose(0, 3, 1, 2)
    model, expected = torch_model(backbone), np.zeros((2, 2, 64, 64))
    with torch.no_grad():
        for mask in masks:
            confidence = model(mask * torch.from_numpy(standardised)).softmax(1).numpy()
            for b, k in np.ndindex(2, 2):
                expected[b, k] += confidence[b, classes[b, k]] * mask.numpy()
    low, high = (f(expected, axis=(2, 3), keepdims=True) for f in (np.min, np.max))
    with jax.default_matmul_precision("highest"):
        maps = compute_maps(method, images, classes)
    np.testing.assert_allclose(maps, (expected - low) / (high - low), atol=1e-4)


@pytest.mark.parametrize(
    ("recipe", "cells", "probability"), [("paper", 7, 0.5), ("reference", 8, 0.1)]
)
def test_masks_keep_a_share_of_coarse_cells_and_shift_by_less_than_one(recipe, cells, probability):
    method = RISE(load_backbone("digits_cnn"), recipe=recipe)
    masks = np.asarray(method.random_masks(jnp.arange(400), (64, 64)))
    assert masks.shape == (400, 64, 64)
    assert masks.min() >= 0
    assert masks.max() <= 1
    assert abs(masks.mean() - probability) < 0.02
    cell = -(-64 // cells)
    slope = np.abs(np.diff(masks, axis=1)).max()
    assert slope == pytest.approx(cells / (cells + 1) / cell, rel=1e-3)  # bilinear, cell to cell
    assert len(np.unique(masks.reshape(400, -1), axis=0)) == 400


def test_a_mask_is_a_shifted_window_of_its_enlarged_grid():
    method = RISE(load_backbone("digits_cnn"))
    key, shift_key = jax.random.split(jax.random.fold_in(jax.random.key(0), 5))
    grid = np.asarray(jax.random.bernoulli(key, 0.5, (7, 7)), np.float32)
    row, column = jax.random.randint(shift_key, (2,), 0, 10)
    whole = zoom(grid, 80 / 7, order=1, mode="mirror", grid_mode=True)
    expected = whole[row : row + 64, column : column + 64]
    np.testing.assert_allclose(
        method.random_masks(jnp.array([5]), (64, 64))[0], expected, atol=1e-5
    )


def test_maps_do_not_depend_on_the_batch():
    method = RISE(load_backbone("digits_cnn"), masks=30)
    images = jax.random.uniform(jax.random.key(0), (3, 64, 64, 3))
    classes = jnp.array([[1], [2], [3]])
    maps = method(images, classes)
    np.testing.assert_allclose(maps[1:2], method(images[1:2], classes[1:2]), atol=1e-4)


def test_the_number_of_masks_is_the_papers():
    assert RISE(abstract_backbone("digits_cnn")).forward_passes == 8000
    assert RISE(abstract_backbone("digits_vit")).forward_passes == 8000
    assert RISE(abstract_backbone("squeezenet1_0")).forward_passes == 4000

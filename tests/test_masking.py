import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ttame_jax.masking import mask_images, min_max_scale, standardise_maps, upsample
from ttame_jax.preprocessing import Preprocessing

pytestmark = pytest.mark.quick


def test_min_max_scale_spans_0_to_1_per_map():
    maps = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32) * 9
    scaled = min_max_scale(jnp.asarray(maps))
    np.testing.assert_allclose(scaled.min(axis=(2, 3)), 0)
    np.testing.assert_allclose(scaled.max(axis=(2, 3)), 1)
    low, high = maps.min(axis=(2, 3), keepdims=True), maps.max(axis=(2, 3), keepdims=True)
    np.testing.assert_allclose(scaled, (maps - low) / (high - low), atol=1e-6)


@pytest.mark.parametrize("value", [0.0, -7.5, 1e30])
def test_min_max_scale_of_a_constant_map_is_zero(value):
    np.testing.assert_array_equal(min_max_scale(jnp.full((1, 1, 3, 3), value)), 0)


def test_min_max_scale_of_a_map_with_nan_is_nan():
    maps = jnp.ones((2, 3, 3)).at[0, 1, 1].set(jnp.nan).at[1, 0, 0].set(2)
    scaled = min_max_scale(maps)
    assert jnp.isnan(scaled[0]).all() and scaled[1].max() == 1


def test_min_max_scale_of_a_map_of_large_values_is_finite():
    maps = jnp.array([[[0, 1e38], [1e37, 8e37]]])
    np.testing.assert_allclose(min_max_scale(maps), [[[0, 1], [0.1, 0.8]]], rtol=1e-6)


def test_gradients_of_scaled_saturated_sigmoids_are_finite():
    class_maps = jnp.linspace(-60, -50, 16).reshape(1, 4, 4)

    def total(class_maps):
        return min_max_scale(jax.nn.sigmoid(class_maps)).sum()

    gradient = jax.grad(total)(class_maps)
    assert jnp.isfinite(gradient).all()
    step = jnp.zeros_like(class_maps).at[0, 2, 2].set(1e-2)
    change = (total(class_maps + step) - total(class_maps - step)) / 2e-2
    np.testing.assert_allclose(gradient[0, 2, 2], change, rtol=1e-2)


def test_standardised_maps_have_mean_0_and_variance_1_each():
    maps = np.random.default_rng(0).normal(3, 1e-3, size=(2, 3, 5, 4)).astype(np.float32)
    standardised = standardise_maps(jnp.asarray(maps))
    np.testing.assert_allclose(standardised.mean(axis=(2, 3)), np.zeros((2, 3)), atol=1e-3)
    np.testing.assert_allclose(standardised.std(axis=(2, 3)), np.ones((2, 3)), rtol=1e-3)


def test_a_constant_standardised_map_is_zero_with_a_finite_gradient():
    value, gradient = jax.value_and_grad(lambda x: standardise_maps(x).sum())(
        jnp.full((1, 3, 3), 0.5)
    )
    assert value == 0 and jnp.isfinite(gradient).all()


@pytest.mark.parametrize("size", [(28, 28), (224, 224), (15, 31)])
def test_upsample_equals_pytorch(size):
    maps = np.random.default_rng(1).normal(size=(2, 3, 14, 7)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.tensor(maps), size, mode="bilinear", align_corners=False
    )
    np.testing.assert_allclose(upsample(jnp.asarray(maps), size), expected, atol=1e-6)


def test_pixel_masking_blackens_and_standardised_masking_greys():
    preprocessing = Preprocessing()
    images = jnp.full((1, 2, 2, 3), 0.5)
    masks = jnp.array([[[0.0, 1.0], [0.5, 0.0]]])
    black = preprocessing.standardise(jnp.zeros(3))
    whole = preprocessing.standardise(jnp.full(3, 0.5))
    pixel = mask_images(images, masks, preprocessing, "pixel")
    np.testing.assert_allclose(pixel[0, 0, 0], black, rtol=1e-6)
    np.testing.assert_allclose(pixel[0, 0, 1], whole, rtol=1e-6)
    np.testing.assert_allclose(pixel[0, 1, 0], preprocessing.standardise(jnp.full(3, 0.25)))
    standardised = mask_images(images, masks, preprocessing, "standardised")
    np.testing.assert_allclose(standardised[0, 0, 0], 0)
    np.testing.assert_allclose(standardised[0, 0, 1], whole, rtol=1e-6)
    np.testing.assert_allclose(standardised[0, 1, 0], 0.5 * whole, rtol=1e-6)


def test_unknown_masking_is_refused():
    with pytest.raises(ValueError, match="unknown masking 'blur'"):
        mask_images(jnp.zeros((1, 2, 2, 3)), jnp.zeros((1, 2, 2)), Preprocessing(), "blur")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import convolve, gaussian_filter

from ttame_jax.metrics.auc import blur, deletion, insertion
from ttame_jax.metrics.selection import relevance_rank

pytestmark = pytest.mark.quick


def left_brightness(images):
    """Probability of class 1: the share of the left half that is not 0."""
    share = (images[:, :, :2, 0] != 0).mean(axis=(1, 2))
    return jnp.stack([1 - share, share], axis=1)


IMAGES = jnp.ones((1, 4, 4, 1))
CLASSES = jnp.array([1])


def test_deleting_what_matters_first_gives_the_area_worked_out_by_hand():
    """Eight of sixteen pixels matter; deleted first, the confidence falls to 0 half-way."""
    left = jnp.array([[[1.0, 1, 0, 0]] * 4])
    for maps, expected in ((left, 0.25), (-left, 0.75)):
        area = deletion(left_brightness, IMAGES, relevance_rank(maps), CLASSES, 16)
        np.testing.assert_allclose(area, expected)


def test_inserting_what_matters_first_is_better():
    """Where the blurred image says nothing, insertion mirrors deletion."""

    def predict(images):
        share = (images[:, :, :4, 0] > 0.999).mean(axis=(1, 2))
        return jnp.stack([1 - share, share], axis=1)

    rng = np.random.default_rng(0)
    images = jnp.asarray(1 + rng.uniform(0, 3, (1, 8, 8, 1)), jnp.float32)
    images = images.at[:, ::2].set(1.0)
    left = jnp.asarray(np.tile(np.arange(8) < 4, (1, 8, 1)), jnp.float32)
    good = insertion(predict, images, relevance_rank(left), CLASSES, 32)
    bad = insertion(predict, images, relevance_rank(-left), CLASSES, 32)
    assert good > bad


def test_blur_is_that_of_the_original():
    """Its kernel is an image of one bright pixel, filtered with SciPy's defaults."""
    images = np.random.default_rng(1).normal(size=(2, 16, 20, 3)).astype(np.float32)
    point = np.zeros((11, 11))
    point[5, 5] = 1
    kernel = gaussian_filter(point, 5)
    for image, blurred in zip(images, np.asarray(jax.jit(blur)(images))):
        for channel in range(3):
            expected = convolve(image[..., channel], kernel, mode="constant")
            np.testing.assert_allclose(blurred[..., channel], expected, atol=1e-5)

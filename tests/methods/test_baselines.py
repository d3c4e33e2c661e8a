import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttame_jax.methods import compute_maps, load_method
from ttame_jax.weights import load_backbone

pytestmark = pytest.mark.quick

IMAGES = jax.random.uniform(jax.random.key(0), (3, 64, 64, 3))
CLASSES = jnp.array([[1, 2]] * 3)


@pytest.fixture(scope="module")
def cnn():
    return load_backbone("digits_cnn")


def test_the_gaussian_is_centred_and_a_quarter_wide(cnn):
    maps = compute_maps(load_method("gaussian", cnn), IMAGES[:, :32], CLASSES)
    assert maps.shape == (3, 2, 32, 64) and (maps == maps[0, 0]).all()
    one = np.asarray(maps[0, 0])
    np.testing.assert_allclose(one, one[::-1, ::-1], atol=1e-6)
    assert one[15:17, 31:33].min() == one.max() == 1 and one[0, 0] == one.min() < 1e-6
    row = one[16]
    # At one standard deviation, 16 pixels from the middle, exp(-1/2) is left of the maximum.
    unscaled = np.exp(-0.5 * (4 * ((np.arange(64) + 0.5) / 64 - 0.5)) ** 2)
    assert np.corrcoef(row, unscaled)[0, 1] > 0.9999999


def test_random_maps_differ_by_image_and_class_but_not_by_batch(cnn):
    method = load_method("random", cnn)
    maps = compute_maps(method, IMAGES, CLASSES)
    assert maps.shape == (3, 2, 7, 7)
    flat = np.asarray(maps).reshape(6, -1)
    assert len(np.unique(flat, axis=0)) == 6
    assert np.abs(np.corrcoef(flat) - np.eye(6)).max() < 0.5
    np.testing.assert_array_equal(compute_maps(method, IMAGES[2:], CLASSES[2:])[0], maps[2])


def test_a_seed_and_a_grid_can_be_chosen(cnn):
    method = load_method("random", cnn, cells=4, seed=1)
    assert compute_maps(method, IMAGES, CLASSES).shape == (3, 2, 4, 4)
    with pytest.raises(ValueError, match="random needs 2 cells or more, not 1"):
        load_method("random", cnn, cells=1)

import numpy as np
import pytest

from ttame_jax.metrics.energy import energy_inside

pytestmark = pytest.mark.quick


def test_the_share_is_that_of_the_sum_not_of_the_pixels():
    maps = np.array([[[0.5, 0.25], [0.25, 0.0]]] * 2, np.float32)
    inside = np.array([[[True, False], [False, False]], [[False, True], [True, True]]])
    np.testing.assert_allclose(energy_inside(maps, inside), [0.5, 0.5])


def test_a_map_of_zeros_has_no_energy_inside_and_an_image_without_the_object_is_left_out():
    maps = np.stack([np.zeros((3, 3)), np.ones((3, 3))]).astype(np.float32)
    inside = np.stack([np.ones((3, 3), bool), np.zeros((3, 3), bool)])
    np.testing.assert_array_equal(energy_inside(maps, inside), [0, np.nan])


def test_a_map_inside_its_box_has_all_of_its_energy_there():
    maps = np.full((1, 3, 3), 1e-6, np.float32)
    np.testing.assert_allclose(energy_inside(maps, np.ones((1, 3, 3), bool)), [1])

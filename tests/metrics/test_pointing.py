import numpy as np
import pytest

from ttame_jax.metrics import load_metric
from ttame_jax.metrics.base import pixels_inside
from ttame_jax.metrics.pointing import hits

pytestmark = pytest.mark.quick


def test_the_maximum_must_lie_in_the_box():
    maps = np.zeros((3, 64, 64), np.float32)
    maps[0, 3, 3] = 1  # top left, in its box
    maps[1, 3, 60] = 1  # top right; a box that swaps x and y would hold it
    maps[2, 60, 20] = 1  # bottom, in its box
    boxes = np.array([[[0, 0, 0.3, 0.3]], [[0.7, 0, 1, 0.3]], [[0.7, 0.2, 1, 0.5]]])
    assert hits(maps, pixels_inside(boxes, (64, 64))).tolist() == [1, 0, 1]


def test_the_first_of_equal_maxima_counts():
    inside = np.zeros((2, 4, 4), bool)
    inside[0, 0, 0] = inside[1, -1, -1] = True
    assert hits(np.ones((2, 4, 4), np.float32), inside).tolist() == [1, 0]


def test_an_image_without_the_object_is_left_out():
    maps = np.zeros((2, 8, 8), np.float32)
    inside = np.stack([np.ones((8, 8), bool), np.zeros((8, 8), bool)])
    np.testing.assert_array_equal(hits(maps, inside), [1, np.nan])
    assert load_metric("pointing").summarise({"pointing": hits(maps, inside)}) == {"mean": 100}


def test_pixels_are_inside_any_of_several_boxes():
    boxes = np.array([[[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1], [np.nan] * 4], [[np.nan] * 4] * 3])
    first, second = pixels_inside(boxes, (4, 6))
    np.testing.assert_array_equal(first, np.kron(np.eye(2), np.ones((2, 3))).astype(bool))
    assert not second.any()

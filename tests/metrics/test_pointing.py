import numpy as np
import pytest

from ttame_jax.data.transforms import inside_boxes
from ttame_jax.metrics.pointing import hits
from ttame_jax.preprocessing import Preprocessing

pytestmark = pytest.mark.quick

WHOLE = Preprocessing(image_size=64, resize_size=64)


def test_the_maximum_must_lie_in_the_box():
    maps = np.zeros((3, 64, 64), np.float32)
    maps[0, 3, 3] = 1  # top left, in its box
    maps[1, 3, 60] = 1  # top right; a box that swaps x and y would hold it
    maps[2, 60, 20] = 1  # bottom, in its box
    boxes = np.array([[[0, 0, 0.3, 0.3]], [[0.7, 0, 1, 0.3]], [[0.7, 0.2, 1, 0.5]]])
    inside = np.stack([inside_boxes(each, (64, 64), WHOLE) for each in boxes])
    assert hits(maps, inside).tolist() == [True, False, True]


def test_the_first_of_equal_maxima_counts():
    inside = np.zeros((2, 4, 4), bool)
    inside[0, 0, 0] = inside[1, -1, -1] = True
    assert hits(np.ones((2, 4, 4), np.float32), inside).tolist() == [True, False]


def test_an_image_without_boxes_is_a_miss():
    maps = np.random.default_rng(0).random((1, 8, 8), np.float32)
    assert hits(maps, np.zeros((1, 8, 8), bool)).tolist() == [False]

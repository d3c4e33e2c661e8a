import numpy as np

from ttame_jax.metrics.pointing import in_box, peak


def test_the_maximum_must_lie_in_the_box():
    maps = np.zeros((3, 4, 4), np.float32)
    maps[0, 0, 0] = 1  # top left, in its box
    maps[1, 0, 3] = 1  # top right; a box that swaps x and y would hold it
    maps[2, 3, 1] = 1  # bottom, in its box
    boxes = np.array([[0, 0, 0.3, 0.3], [0.7, 0, 1, 0.3], [0.7, 0.2, 1, 0.5]])
    assert in_box(peak(maps, (64, 64)), boxes).tolist() == [True, False, True]

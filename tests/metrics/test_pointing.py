import jax.numpy as jnp
import numpy as np

from ttame_jax.metrics.pointing import pointing_hits


def test_the_maximum_must_lie_in_the_box():
    maps = np.zeros((3, 4, 4), np.float32)
    maps[0, 0, 0] = 1  # top left, in its box
    maps[1, 0, 3] = 1  # top right; a box that swaps x and y would hold it
    maps[2, 3, 1] = 1  # bottom, in its box
    boxes = jnp.array([[0, 0, 0.3, 0.3], [0.7, 0, 1, 0.3], [0.7, 0.2, 1, 0.5]])
    assert pointing_hits(maps, boxes, (64, 64)).tolist() == [True, False, True]

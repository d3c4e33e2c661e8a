import jax
import numpy as np
import pytest

from ttame_jax.metrics.selection import pixel_count, relevance_rank

pytestmark = pytest.mark.quick


def top_mask(maps, percent):
    return relevance_rank(maps) < pixel_count(percent, maps[0].size)


def test_count_is_the_largest_within_the_share():
    assert pixel_count(15, 224 * 224) == 7526  # 7526.4
    assert pixel_count(29, 100) == 29
    assert pixel_count(100, 7) == 7 and pixel_count(0, 7) == 0
    for percent in (-1, 100.5):
        with pytest.raises(ValueError, match="0 to 100"):
            pixel_count(percent, 10)


def test_constant_map_keeps_its_first_pixels():
    mask = np.asarray(top_mask(np.full((2, 4, 5), 0.3, np.float32), 37))  # 7.4 pixels
    np.testing.assert_array_equal(mask.reshape(2, -1), [[True] * 7 + [False] * 13] * 2)


def test_tie_at_the_threshold_is_broken_by_pixel_index():
    maps = np.array([[[0.0, 0.5, 0.5], [1.0, 0.5, -0.0]]], np.float32)
    np.testing.assert_array_equal(
        top_mask(maps, 50)[0], [[False, True, True], [True, False, False]]
    )
    np.testing.assert_array_equal(
        top_mask(-maps, 34)[0], [[True, False, False], [False, False, True]]
    )


@pytest.mark.parametrize("levels", [2, 16, 10**6])
@pytest.mark.parametrize("percent", [10, 15, 50, 99.9])
def test_equals_a_sort_in_numpy(levels, percent):
    rng = np.random.default_rng(levels)
    maps = (rng.integers(0, levels, (3, 21, 17)) / levels).astype(np.float32)
    got = np.asarray(jax.jit(top_mask, static_argnums=1)(maps, percent))
    for mask, values in zip(got, maps.reshape(3, -1)):
        order = sorted(range(values.size), key=lambda i: (-values[i], i))
        expected = np.zeros(values.size, bool)
        expected[order[: int(np.floor(values.size * percent / 100))]] = True
        np.testing.assert_array_equal(mask.ravel(), expected)


def test_nan_is_never_preferred():
    maps = np.array([[[np.nan, 0.1], [0.2, np.nan]]], np.float32)
    np.testing.assert_array_equal(top_mask(maps, 50)[0], [[False, True], [True, False]])

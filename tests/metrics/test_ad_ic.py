import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ttame_jax.metrics.ad_ic import average_drop, increase_in_confidence
from ttame_jax.metrics.confidence import masked_confidences
from ttame_jax.metrics.selection import relevance_rank
from ttame_jax.preprocessing import Preprocessing

pytestmark = pytest.mark.quick

PREPROCESSING = Preprocessing(mean=(0, 0, 0), std=(1, 1, 1))  # standardising changes nothing


def brightness(images):
    """Probability of class 1: the mean brightness of the image; class 0 has the rest."""
    share = images.mean(axis=(1, 2, 3))
    return jnp.stack([1 - share, share], axis=1)


def test_values_worked_out_by_hand():
    confidences = np.array([0.8, 0.5, 0.2])
    masked = np.array([[0.4, 0.8], [0.5, 0.0], [0.3, 0.2]])
    # drops: (0.5, 0), (0, 1), (0, 0)
    np.testing.assert_allclose(average_drop(confidences, masked), [50 / 3, 100 / 3])
    np.testing.assert_allclose(increase_in_confidence(confidences, masked), [100 / 3, 0])


def test_only_the_top_pixels_stay_with_their_values():
    images = jnp.ones((1, 2, 2, 3))
    maps = jnp.array([[[1.0, 0.5], [0.25, 0.0]]])
    ranks, percentages = relevance_rank(maps), (100, 50, 25, 15)
    result = masked_confidences(
        brightness, images, maps, ranks, jnp.array([1]), PREPROCESSING, "pixel", percentages
    )
    np.testing.assert_allclose(result, [[1.75 / 4, 1.5 / 4, 1 / 4, 0]])


@pytest.mark.parametrize("masking", ["pixel", "standardised"])
def test_equals_a_plain_numpy_version_on_random_and_quantised_maps(masking):
    rng = np.random.default_rng(0)
    preprocessing = Preprocessing()
    images = rng.uniform(size=(6, 10, 10, 3)).astype(np.float32)
    maps = rng.uniform(size=(6, 10, 10)).astype(np.float32)
    maps[3:] = np.round(4 * maps[3:]) / 4  # many ties
    maps[5] = 0.5  # nothing but ties
    weights = rng.normal(size=(300, 4)).astype(np.float32) / 10
    classes = rng.integers(0, 4, 6)

    def predict(standardised):
        return jax.nn.softmax(standardised.reshape(len(standardised), -1) @ weights)

    ranks, percentages = relevance_rank(maps), (100, 50, 15, 3)
    with jax.default_matmul_precision("highest"):
        ours = masked_confidences(
            predict, images, maps, ranks, jnp.asarray(classes), preprocessing, masking, percentages
        )
    mean, std = np.float32(preprocessing.mean), np.float32(preprocessing.std)
    for j, percent in enumerate(percentages):
        for i in range(6):
            count = int(percent * 100 / 100)
            kept = np.argsort(-maps[i].ravel(), kind="stable")[:count]
            mask = np.zeros(100, np.float32)
            mask[kept] = maps[i].ravel()[kept]
            assert (mask > 0).sum() <= percent
            mask = mask.reshape(10, 10, 1)
            if masking == "pixel":
                masked = (mask * images[i] - mean) / std
            else:
                masked = mask * ((images[i] - mean) / std)
            logits = masked.ravel().astype(np.float64) @ weights
            expected = np.exp(logits)[classes[i]] / np.exp(logits).sum()
            np.testing.assert_allclose(ours[i, j], expected, atol=1e-6)

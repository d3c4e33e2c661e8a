import numpy as np
import pytest

from ttame_jax.experiments.repeats import Repeats
from ttame_jax.metrics import intervals, summarise

pytestmark = pytest.mark.quick

METRICS = ("ad", "ic")
NOISE = np.random.default_rng(0).uniform(0.1, 0.9, 40)


def repeats(*shifts, images=range(40)):
    """Evaluations by seed. Each has the same noise, and drops that are larger by its shift."""
    result, index = Repeats(metrics=METRICS), np.array(images)
    for seed, shift in enumerate(shifts):
        masked = np.stack([NOISE[index] - shift] * 3, axis=1)
        rows = {"index": index, "confidence": np.ones(len(index)), "masked": masked}
        figures = {"method": "ttame", "images": len(index), **summarise(rows, METRICS)}
        result.add(seed, figures | {"intervals": intervals(rows, METRICS)}, rows)
    return result


def test_evaluations_know_their_images():
    one = Repeats(metrics=METRICS)
    one.figures[0] = {"settings": {"inputs": {"images": "40 images"}}}
    assert one.source == "40 images"


def drop(figures):
    return figures["AD"]["100"]


def test_one_evaluation_is_its_own_mean():
    one = repeats(0)
    assert one.mean() == one.figures[0] and "spread" not in one.mean()


def test_the_mean_has_the_spread_over_the_seeds():
    several, (first, second) = repeats(0, 0.04), (repeats(0).mean(), repeats(0.04).mean())
    mean = several.mean()
    assert mean["seeds"] == 2 and mean["images"] == 40
    assert drop(mean) == pytest.approx((drop(first) + drop(second)) / 2)
    assert drop(mean["spread"]) == pytest.approx(4 / np.sqrt(2))


def test_seeds_that_differ_widen_the_interval():
    def width(*shifts):
        low, high = drop(repeats(*shifts).mean()["intervals"])
        return high - low

    assert width(0, 0) == pytest.approx(width(0))
    assert width(0, 0.1) > width(0) + 2


def test_a_difference_is_paired_over_the_images():
    """The noise of the images, which is the same in both, cancels."""
    change = repeats(0.03).minus(repeats(0))
    assert drop(change) == pytest.approx(3)
    assert drop(change["intervals"]) == pytest.approx([3, 3])
    low, high = drop(repeats(0).mean()["intervals"])
    assert high - low > 10


def test_a_difference_is_paired_over_the_seeds():
    change = repeats(0.05, 0.09).minus(repeats(0.02, 0.06))
    assert drop(change) == pytest.approx(3)
    assert drop(change["intervals"]) == pytest.approx([3, 3])
    assert change["seeds"] == 2 and "spread" not in change


def test_the_order_in_which_seeds_are_added_does_not_matter():
    other = repeats(0.02, 0.06)
    reverse = Repeats(metrics=METRICS)
    for seed in (1, 0):
        reverse.add(seed, other.figures[seed], other.rows[seed])
    assert drop(repeats(0.05, 0.09).minus(reverse)["intervals"]) == pytest.approx([3, 3])


def test_means_over_seeds_are_compared_with_a_single_evaluation():
    assert drop(repeats(0.02, 0.06).minus(repeats(0))) == pytest.approx(4)


@pytest.mark.parametrize("images", [range(10, 40, 2), range(20)])
def test_a_difference_is_that_of_the_images_of_both(images):
    change = repeats(0.03, images=images).minus(repeats(0))
    assert change["images"] == len(images)
    assert drop(change["intervals"]) == pytest.approx([3, 3])
    assert drop(repeats(0).minus(repeats(0.03, images=images))) == pytest.approx(-3)


def test_evaluations_without_a_common_image_cannot_be_compared():
    with pytest.raises(ValueError, match="no image in common"):
        repeats(0, images=range(10)).minus(repeats(0, images=range(10, 20)))

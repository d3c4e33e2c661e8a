import numpy as np
import pytest
from skimage.measure import label, regionprops

from ttame_jax.metrics import functional, load_metric
from ttame_jax.metrics.maxboxacc import THRESHOLDS, overlaps

pytestmark = pytest.mark.quick

NONE = [np.nan] * 4


def rectangle(top, left, bottom, right, value=1.0, size=(20, 40)):
    scores = np.zeros(size, np.float32)
    scores[top:bottom, left:right] = value
    return scores


def test_a_map_that_fills_the_box_fits():
    scores = rectangle(5, 10, 15, 30)
    accuracy = functional.max_box_accuracy(scores[None], [[[0.25, 0.25, 0.75, 0.75]]], (20, 40))
    assert accuracy == {"50": 100, "V2": 100}


def test_rows_and_columns_are_not_exchanged():
    scores = rectangle(0, 0, 20, 4)
    found = overlaps(scores[None], np.array([[[0, 0, 1, 0.1], NONE]]))
    np.testing.assert_allclose(found, 1)
    assert overlaps(scores[None], np.array([[[0, 0, 0.1, 1], NONE]])).max() < 0.1


def test_only_the_second_version_looks_at_smaller_regions():
    scores = np.maximum(rectangle(0, 0, 4, 8), rectangle(10, 0, 20, 40))
    first, second = overlaps(scores[None], np.array([[[0, 0, 0.2, 0.2]]]))[0].T
    assert first.max() == 0
    np.testing.assert_allclose(second, 1)


def test_any_of_several_boxes_counts():
    scores = rectangle(10, 20, 20, 40)
    found = overlaps(scores[None], np.array([[[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1], NONE]]))
    np.testing.assert_allclose(found, 1)


def test_one_threshold_serves_all_images():
    """Each image fits at a threshold of its own, and at no other."""
    maps = np.stack(
        [
            np.maximum(rectangle(0, 0, 19, 40, 0.5), rectangle(0, 0, 4, 4)),  # fits below 0.5
            np.maximum(rectangle(0, 0, 19, 40, 0.5), rectangle(0, 0, 10, 20)),  # above
        ]
    )
    boxes = np.array([[[0, 0, 1, 1]], [[0, 0, 0.5, 0.5]]])
    assert functional.max_box_accuracy(maps, boxes, (20, 40))["50"] == 50
    assert functional.max_box_accuracy(maps[:1], boxes[:1], (20, 40))["50"] == 100


def test_images_without_a_box_in_view_are_left_out():
    maps = np.stack([rectangle(5, 10, 15, 30)] * 3)
    boxes = np.array([[[0.25, 0.25, 0.75, 0.75]], [NONE], [[-0.5, 0, -0.1, 1]]])
    assert np.isnan(overlaps(maps, boxes)).all((1, 2)).tolist() == [False, True, True]
    assert functional.max_box_accuracy(maps, boxes, (20, 40))["50"] == 100
    rows = {"maxboxacc": overlaps(maps[1:], boxes[1:])}
    assert np.isnan(load_metric("maxboxacc").summarise(rows)["V2"])


def test_regions_are_those_of_scikit_image():
    rng = np.random.default_rng(0)
    scores = rng.random((1, 20, 40), np.float32)
    boxes = np.array([[[0.1, 0.2, 0.6, 0.5]]])
    truth = np.array([2, 8, 12, 20])
    expected = []
    for threshold in THRESHOLDS:
        regions = regionprops(label(scores[0] > threshold, connectivity=2))
        ious = [iou(np.array(region.bbox), truth) for region in regions]
        largest = max(range(len(regions)), key=lambda i: regions[i].area)
        expected.append((ious[largest], max(ious)))
    np.testing.assert_allclose(overlaps(scores, boxes)[0], expected, rtol=1e-6)


def iou(first, second):
    masks = np.zeros((2, 20, 40), bool)
    for mask, (top, left, bottom, right) in zip(masks, (first, second)):
        mask[top:bottom, left:right] = True
    return (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum()

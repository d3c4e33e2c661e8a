"""MaxBoxAcc: how often the box around a map's highest values fits the object's box.

Choe et al., "Evaluating Weakly Supervised Object Localization Methods Right", CVPR 2020, and
MaxBoxAccV2 of its extended version (arXiv:2007.04178). The threshold is the best one for the whole
data set.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from ttame_jax.masking import min_max_scale
from ttame_jax.metrics.base import Metric, Rows, Sample, TableRow

THRESHOLDS = np.linspace(0, 1, 50, endpoint=False)
"""Of the maps, scaled to [0, 1]."""

OVERLAPS = (0.3, 0.5, 0.7)
"""Intersections over union from which a box fits, for MaxBoxAccV2. MaxBoxAcc has 0.5."""


class MaxBoxAcc(Metric, name="maxboxacc"):
    table = "localisation"
    label = "MaxBoxAcc"
    lower_is_better = False
    needs = "boxes"

    def measure(self, sample: Sample) -> dict[str, jax.Array]:
        shape = jax.ShapeDtypeStruct((len(sample.maps), len(THRESHOLDS), 2), jnp.float32)
        maps = min_max_scale(sample.maps)
        return {self.name: jax.pure_callback(overlaps, shape, maps, sample.boxes)}

    def summarise(self, rows: Rows) -> dict[str, Any]:
        values = rows[self.name]
        values = values[~np.isnan(values).any((1, 2))]
        if not len(values):
            return dict.fromkeys(("50", "V2"), float("nan"))
        largest, best = np.moveaxis(values, -1, 0)
        accuracies = [_accuracy(best, overlap) for overlap in OVERLAPS]
        return {"50": _accuracy(largest, 0.5), "V2": float(np.mean(accuracies))}

    def table_rows(self) -> Sequence[TableRow]:
        return [
            TableRow("MaxBoxAcc", (self.key, "50"), lower_is_better=False),
            TableRow("MaxBoxAccV2", (self.key, "V2"), lower_is_better=False),
        ]


def _accuracy(overlap: np.ndarray, least: float) -> float:
    """Share of images in % with at least that overlap `[N, T]`, at the best threshold."""
    return 100 * float((overlap >= least).mean(axis=0).max())


def overlaps(maps: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Returns the overlaps of the boxes found in maps with those of the objects.

    Args:
      maps: `[B, H, W]`, scaled to [0, 1].
      boxes: `[B, M, 4]`, see `Sample`.

    Returns:
      Largest intersections over union with any of the image's boxes, float32 `[B, T, 2]`: of the
      box around the largest region above each of the `THRESHOLDS`, and the best of the boxes around
      all its regions. NaN for an image without a box in view.
    """
    return np.stack([_overlaps(np.asarray(m), np.asarray(b)) for m, b in zip(maps, boxes)])


def _overlaps(scores: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    result = np.full((len(THRESHOLDS), 2), np.nan, np.float32)
    objects = np.clip(boxes[~np.isnan(boxes).any(axis=1)], 0, 1) * np.tile(scores.shape, 2)
    objects = objects[(objects[:, 2:] > objects[:, :2]).all(axis=1)]
    if not len(objects):
        return result
    for i, threshold in enumerate(THRESHOLDS):
        found, sizes = _regions(scores > threshold)
        iou = _iou(found, objects).max(axis=1)
        result[i] = (iou[sizes.argmax()], iou.max()) if len(iou) else 0
    return result


def _regions(above: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The boxes `[R, 4]` around connected regions, diagonals included, and their pixels `[R]`."""
    labels, count = ndimage.label(above, np.ones((3, 3)))
    boxes = [
        (rows.start, columns.start, rows.stop, columns.stop)
        for rows, columns in ndimage.find_objects(labels)
    ]
    return np.reshape(boxes, (count, 4)), np.bincount(labels.ravel(), minlength=1)[1:]


def _iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersections over union of boxes `[R, 4]` and `[N, 4]`: `[R, N]`."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    both = (high - low).clip(0).prod(axis=-1)
    area = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=-1) for boxes in (first, second)]
    return both / (area[0][:, None] + area[1] - both)

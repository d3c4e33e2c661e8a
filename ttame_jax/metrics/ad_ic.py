"""Average Drop and Increase in Confidence (T-TAME, section IV-B).

Both compare the confidence `f(I)[y]` in the predicted class y with the confidence after masking
the image with the top v % of its explanation map.
"""

import jax
import numpy as np

from ttame_jax.metrics.base import Metric, Rows, Sample, TableRow, by_percentage
from ttame_jax.metrics.confidence import PERCENTAGES


def average_drop(confidences: np.ndarray, masked: np.ndarray) -> np.ndarray:
    """Average Drop in %, `[P]`, lower is better.

    Args:
      confidences: `[N]`, in the unmasked images.
      masked: `[N, P]`, in the masked images at each percentage.

    Raises:
      ValueError: a confidence is not a number in [0, 1], or is 0 in an unmasked image.
    """
    before = _checked(confidences, masked)
    return 100 * np.mean(np.maximum(0, before - masked) / before, axis=0)


def increase_in_confidence(confidences: np.ndarray, masked: np.ndarray) -> np.ndarray:
    """Increase in Confidence in %, `[P]`, higher is better.

    Arguments and errors are those of `average_drop`.
    """
    return 100 * np.mean(masked > _checked(confidences, masked), axis=0)


def _checked(confidences: np.ndarray, masked: np.ndarray) -> np.ndarray:
    """The confidences in the unmasked images, `[N, 1]`."""
    for name, values in (("confidences", confidences), ("masked confidences", masked)):
        low, high = np.min(values), np.max(values)
        if not (0 <= low and high <= 1 + 1e-6):  # also false for NaN
            raise ValueError(f"{name} must lie in [0, 1], not {low:.3g} to {high:.3g}")
    if np.min(confidences) == 0:
        raise ValueError("the drop of a confidence of 0 is undefined: explain the predicted class")
    return confidences[:, None]


class _MaskedConfidence(Metric):
    table = "ad_ic"

    def measure(self, sample: Sample) -> dict[str, jax.Array]:
        return {"masked": sample.masked_confidences}

    def table_rows(self) -> list[TableRow]:
        return [
            TableRow(self.key, (self.key, str(percent)), self.lower_is_better, f"({percent}%)")
            for percent in PERCENTAGES
        ]


class AverageDrop(_MaskedConfidence, name="ad", key="AD"):
    lower_is_better = True

    def summarise(self, rows: Rows) -> dict[str, float]:
        return by_percentage(PERCENTAGES, average_drop(rows["confidence"], rows["masked"]))


class IncreaseInConfidence(_MaskedConfidence, name="ic", key="IC"):
    lower_is_better = False

    def summarise(self, rows: Rows) -> dict[str, float]:
        values = increase_in_confidence(rows["confidence"], rows["masked"])
        return by_percentage(PERCENTAGES, values)

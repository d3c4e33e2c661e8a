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
    """
    before = confidences[:, None]
    return 100 * np.mean(np.maximum(0, before - masked) / before, axis=0)


def increase_in_confidence(confidences: np.ndarray, masked: np.ndarray) -> np.ndarray:
    """Increase in Confidence in %, `[P]`, higher is better. Arguments as in `average_drop`."""
    return 100 * np.mean(masked > confidences[:, None], axis=0)


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

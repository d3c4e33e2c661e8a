"""The interface of every metric, what a metric is given, and the registry of metrics."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ttame_jax.metrics.confidence import masked_confidences
from ttame_jax.metrics.selection import relevance_rank
from ttame_jax.preprocessing import Masking, Preprocessing

Rows = dict[str, np.ndarray]
"""Arrays with one row per image: `index`, `class`, `confidence` and the columns of the metrics."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Sample:
    """A batch of explained images. Quantities that several metrics need are computed once.

    Attributes:
      predict: standardised images `[B, H, W, 3]` to softmax probabilities `[B, num_classes]`.
      images: `[B, H, W, 3]` in [0, 1].
      maps: the explanation maps, upsampled to the images, `[B, H, W]` in [0, 1].
      classes: int `[B]`, the explained (and predicted) classes.
      confidence: `[B]`, the probabilities of these classes.
      preprocessing: the backbone's.
      masking: how a map masks an image.
      index: int `[B]`, the images' indices in their data set.
      key: a typed key, the same for every batch.
      boxes: `[B, M, 4]`, the ymin, xmin, ymax and xmax of each image's boxes as fractions of the
        image; NaN for an image with fewer. None unless a metric needs them.
      inside: bool `[B, H, W]`, the pixels of the object. None unless a metric needs them.
    """

    predict: Callable[[jax.Array], jax.Array]
    images: jax.Array
    maps: jax.Array
    classes: jax.Array
    confidence: jax.Array
    preprocessing: Preprocessing
    masking: Masking
    index: jax.Array
    key: jax.Array
    boxes: Any = None
    inside: Any = None

    @cached_property
    def standardised(self) -> jax.Array:
        """The classifier's input, `[B, H, W, 3]`."""
        return self.preprocessing.standardise(self.images)

    @cached_property
    def ranks(self) -> jax.Array:
        """`relevance_rank` of the maps: int32 `[B, H, W]`, 0 is the most relevant pixel."""
        return relevance_rank(self.maps)

    @cached_property
    def reverse_ranks(self) -> jax.Array:
        """0 is the least relevant pixel. With ties, this is not the reverse of `ranks`."""
        return relevance_rank(-self.maps)

    @cached_property
    def masked_confidences(self) -> jax.Array:
        """`masked_confidences` at the paper's percentages: `[B, 3]` in [0, 1]."""
        return masked_confidences(
            self.predict,
            self.images,
            self.maps,
            self.ranks,
            self.classes,
            self.preprocessing,
            self.masking,
        )


@dataclass(frozen=True)
class TableRow:
    """One row of a comparison table.

    Attributes:
      label: the quantity, such as "AD".
      path: keys that lead to its value in a summary.
      lower_is_better: the direction, shown as an arrow.
      detail: text after the arrow.
    """

    label: str
    path: tuple[str, ...]
    lower_is_better: bool
    detail: str = ""

    @property
    def title(self) -> str:
        return f"{self.label}{'↓' if self.lower_is_better else '↑'}{self.detail}"

    def value(self, summary: Mapping[str, Any]) -> Any:
        """The leaf of a tree such as a summary, or of its intervals."""
        value: Any = summary
        for key in self.path:
            value = value[key]
        return value


class Metric(ABC):
    """Measures explanations image by image and averages over the images.

    `class Energy(Metric, name="energy")` registers the metric under that name. By default, a
    metric has one column, which has its name and holds scores in [0, 1], and one table row.

    Attributes:
      name: on the command line.
      key: in the summary; by default the name.
      table: the comparison table that shows the metric. Metrics may share one.
      label: of the default table row.
      lower_is_better: the metric's direction.
      needs: what it reads of the images' objects: `Sample.boxes`, `Sample.inside`, or nothing.
    """

    name: str
    key: str
    table: str
    label: str
    lower_is_better: bool
    needs: Literal["boxes", "inside"] | None = None

    def __init_subclass__(cls, *, name: str | None = None, key: str | None = None):
        super().__init_subclass__()
        if name is not None:
            cls.name, cls.key = name, key or name
            _METRICS[name] = cls

    @abstractmethod
    def measure(self, sample: Sample) -> dict[str, jax.Array]:
        """Returns the metric's columns, `[B, ...]`. Called under `jax.jit`.

        NaN marks an image that cannot be measured.
        """

    def summarise(self, rows: Rows) -> dict[str, Any]:
        """Returns means over the rows in %, such as `{"mean": 12.5}`."""
        values = rows[self.name]
        measured = values[~np.isnan(values)]
        return {"mean": 100 * float(measured.mean()) if measured.size else math.nan}

    def table_rows(self) -> Sequence[TableRow]:
        """Returns the rows that show the metric in its table."""
        return [TableRow(self.label, (self.key, "mean"), self.lower_is_better)]


def pixels_inside(boxes: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """Returns the pixels whose centres lie in any box: bool `[B, *size]`.

    Args:
      boxes: see `Sample`.
      size: height and width of the images.
    """
    down, across = ((jnp.arange(length) + 0.5) / length for length in size)
    top, left, bottom, right = jnp.moveaxis(boxes, -1, 0)[..., None]
    rows = (top <= down) & (down <= bottom)  # [B, M, H]
    columns = (left <= across) & (across <= right)
    return (rows[..., :, None] & columns[..., None, :]).any(axis=1)


def measure_sample(sample: Sample, metrics: Sequence[Metric]) -> dict[str, jax.Array]:
    """Returns the rows of a sample, without the images' indices. Called under `jax.jit`."""
    rows = {"class": sample.classes, "confidence": sample.confidence}
    for metric in metrics:
        rows |= metric.measure(sample)
    return rows


_METRICS: dict[str, type[Metric]] = {}


def list_metrics() -> list[str]:
    """Returns the names of all metrics, in the order of summaries and tables."""
    return list(_METRICS)


def load_metric(name: str) -> Metric:
    """Returns the metric with this name.

    Raises:
      ValueError: the metric does not exist.
    """
    if name not in _METRICS:
        raise ValueError(f"unknown metric {name!r}; available metrics: {', '.join(_METRICS)}")
    return _METRICS[name]()


def load_metrics(names: Sequence[str]) -> list[Metric]:
    """Returns the metrics with these names, each once and in the order of `list_metrics`.

    Raises:
      ValueError: a metric does not exist.
    """
    metrics = {name: load_metric(name) for name in names}
    return [metrics[name] for name in list_metrics() if name in metrics]


def by_percentage(percentages: Sequence[float], values: np.ndarray) -> dict[str, float]:
    """Returns values `[P]` under their percentages, as in `{"100": 8.7, "50": 9.3}`."""
    return {str(percent): float(value) for percent, value in zip(percentages, values)}

"""Evaluations that differ only in the seed of the training: means, spreads and differences."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ttame_jax.metrics import interval, replicates, summarise
from ttame_jax.metrics.base import Rows


@dataclasses.dataclass(kw_only=True)
class Repeats:
    """The evaluations of a method or a setting.

    Attributes:
      metrics: names of the metrics.
      figures: by seed, as `EvaluationSetup.evaluate` returns them.
      rows: what the figures are means of, by seed, in the order of their index.
      resampled: the figures of resampled images, by seed. They take long to compute.
    """

    metrics: Sequence[str]
    figures: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    rows: dict[int, Rows] = dataclasses.field(default_factory=dict)
    resampled: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def add(self, seed: int, figures: dict[str, Any], rows: Rows) -> None:
        """Adds the evaluation of one seed."""
        self.figures[seed] = figures
        self.rows[seed] = rows
        self.resampled[seed] = replicates(rows, lambda rows: summarise(rows, self.metrics))

    def mean(self) -> dict[str, Any]:
        """The means over the seeds, as a method's figures.

        With several seeds, the figures also have `seeds`, their number, and `spread`, the standard
        deviations over them, and the intervals are those of `replicates`.
        """
        runs = [*self.figures.values()]
        if len(runs) == 1:
            return dict(runs[0])
        measured = [self._measured(run) for run in runs]
        return {
            **runs[0],
            **jax.tree.map(lambda *values: float(np.mean(values)), *measured),
            "intervals": jax.tree.map(interval, self.replicates()),
            "spread": jax.tree.map(lambda *values: float(np.std(values, ddof=1)), *measured),
            "seeds": len(runs),
        }

    def replicates(self) -> dict[str, Any]:
        """The means for resampled images and resampled seeds: a tree with leaves `[resamples]`.

        The images and the seeds of each resampling depend on their numbers only. Differences between
        the replicates of two `Repeats` on the same images are those of a paired bootstrap. It is also
        paired over the seeds if both have the same ones.
        """
        trees = [self.resampled[seed] for seed in sorted(self.resampled)]
        if len(trees) == 1:
            return trees[0]
        resamples = len(jax.tree.leaves(trees[0])[0])
        chosen = np.random.default_rng(0).integers(len(trees), size=(len(trees), resamples))

        def resample(*values: np.ndarray) -> np.ndarray:
            return np.take_along_axis(np.stack(values), chosen, axis=0).mean(axis=0)

        return jax.tree.map(resample, *trees)

    def minus(self, other: "Repeats") -> dict[str, Any]:
        """The means of these minus those of others, on the images of both, as a method's figures.

        The intervals are those of a paired bootstrap.

        Raises:
          ValueError: the two have no image in common.
        """
        images = np.intersect1d(self.images, other.images)
        if not len(images):
            raise ValueError("the evaluations have no image in common")
        own, others = self._on(images), other._on(images)
        means, others_means = own.mean(), others.mean()
        change = jax.tree.map(np.subtract, own._measured(means), others._measured(others_means))
        difference = jax.tree.map(np.subtract, own.replicates(), others.replicates())
        means.pop("spread", None)
        return means | change | {"intervals": jax.tree.map(interval, difference)}

    @property
    def images(self) -> np.ndarray:
        """The indices of the images that all seeds were evaluated on."""
        return functools.reduce(np.intersect1d, (rows["index"] for rows in self.rows.values()))

    @property
    def source(self) -> str:
        """The fingerprint of the images that were selected."""
        return next(iter(self.figures.values()))["settings"]["inputs"]["images"]

    def _on(self, images: np.ndarray) -> "Repeats":
        """These evaluations on some of their images."""
        if all(np.array_equal(rows["index"], images) for rows in self.rows.values()):
            return self
        restricted = Repeats(metrics=self.metrics)
        for seed, rows in self.rows.items():
            chosen = {name: x[np.isin(rows["index"], images)] for name, x in rows.items()}
            figures = self.figures[seed] | {"images": len(images)}
            restricted.add(seed, figures | summarise(chosen, self.metrics), chosen)
        return restricted

    def _measured(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        """What the metrics gave, without what else is in figures."""
        return {key: figures[key] for key in next(iter(self.resampled.values()))}

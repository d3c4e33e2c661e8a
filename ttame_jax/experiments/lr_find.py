"""`ttame lr-find`: the paper's grid search over peak rates and epochs, by AD and IC at 15 %."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
from etils import epath
from matplotlib.figure import Figure

from ttame_jax.config import TrainConfig, command, preset
from ttame_jax.errors import Damaged, Failure
from ttame_jax.experiments import sweep
from ttame_jax.experiments.arguments import listed
from ttame_jax.experiments.sweep import Axis, Setting, train_each
from ttame_jax.experiments.tables import csv_table, markdown_table
from ttame_jax.files import write_atomically
from ttame_jax.plots import line_style, save_figure
from ttame_jax.runs import score


@dataclasses.dataclass(frozen=True)
class Grid:
    """The peak rates and numbers of epochs to try."""

    rates: Annotated[tuple[float, ...], listed(float, "RATE,...")] = (
        1e-4,
        3e-4,
        1e-3,
        3e-3,
        1e-2,
    )
    """Peak rates to try instead of --learning-rate."""
    epochs_grid: Annotated[tuple[int, ...], listed(int, "EPOCHS,...")] = ()
    """Numbers of epochs to try, each with its own cycle. By default each rate has one cycle of
    --epochs, validated after every epoch; all but the last epoch then lie within the cycle."""


@dataclasses.dataclass(frozen=True)
class Point:
    """A run after a number of epochs."""

    run: TrainConfig
    epochs: int
    figures: Mapping[str, float]  # a line of validation.jsonl

    @property
    def score(self) -> float:
        """The criterion for the best checkpoint."""
        return score(self.figures)


def lr_find(config: TrainConfig, grid: Grid) -> Point | None:
    """Trains a run for every setting of the grid and tabulates their validation metrics.

    The runs are in ``OUTPUT/rate_R``, or in ``OUTPUT/rate_R/epochs_E`` if the grid has epochs.
    Finished runs are not trained again, and interrupted ones resume. After each run ``lr_find.md``,
    ``.csv``, ``.png`` and ``.svg`` are written with all finished runs.

    Args:
      config: of all runs, except for the rate, the folder and, if the grid has them, the epochs.
      grid: the rates and epochs.

    Returns:
      The best point; None if SIGTERM has stopped the search.

    Raises:
      ValueError: a setting cannot be trained (raised before any training).
      Failure: all rates diverge.
    """
    if not grid.rates:
        raise ValueError("no rate given: ttame lr-find --rates 1e-4,1e-3,1e-2")
    if config.validation_images < 1:
        raise ValueError(
            f"lr-find needs validation images: --validation-images must be at least 1, "
            f"not {config.validation_images}"
        )
    axes = [_axis("rate", "learning_rate", grid.rates)]
    if grid.epochs_grid:
        axes.append(_axis("epochs", "epochs", grid.epochs_grid))
    points: list[Point] = []
    for trial, outcome in train_each(sweep.grid(config, axes)):
        if outcome == "stopped":
            return None
        if outcome == "finished":
            lines = _lines(trial.run)
            points += [
                Point(trial.run, line["epoch"], line)
                for line in (lines[-1:] if grid.epochs_grid else lines)
            ]
            if jax.process_index() == 0:
                _write(points, config.output)
    best = max(points, key=lambda point: point.score, default=None)
    if best is None or best.score == -math.inf:
        raise Failure("every rate diverged: try lower ones, as --rates 1e-6,1e-5,1e-4")
    _report(points, best)
    return best


def _axis(name: str, field: str, values: Sequence[float]) -> Axis:
    return Axis(name, tuple(Setting(str(x), {field: x}) for x in dict.fromkeys(values)))


def _lines(run: TrainConfig) -> list[dict]:
    """The validation of a finished run after each epoch."""
    path = epath.Path(run.output) / "validation.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            score(line)
        if lines[-1]["epoch"] < run.epochs:
            raise ValueError("lines are missing")
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        raise Damaged(f"{path} is damaged: delete {run.output} to train it again") from error
    return [line for line in lines if line["epoch"]]


def _write(points: Sequence[Point], output: Path) -> None:
    write_atomically(output / "lr_find.md", markdown(points))
    write_atomically(output / "lr_find.csv", comma_separated(points))
    figure = draw(points)
    for suffix in ("png", "svg"):
        save_figure(figure, output / f"lr_find.{suffix}")


def _axes(points: Sequence[Point]) -> tuple[list[float], list[int]]:
    rates = sorted({point.run.learning_rate for point in points})
    return rates, sorted({point.epochs for point in points})


def markdown(points: Sequence[Point]) -> str:
    """AD(15 %)/IC(15 %) with one line per rate and one column per number of epochs; the best is
    bold."""
    rates, epochs = _axes(points)
    best = max(points, key=lambda point: point.score)
    cells = {
        (point.run.learning_rate, point.epochs): ("**{}**" if point is best else "{}").format(
            "{AD_15:.1f}/{IC_15:.1f}".format(**point.figures)
        )
        for point in points
    }
    lines = [["rate ↓ epochs →", *map(str, epochs)], ["---"] * (len(epochs) + 1)]
    lines += [[f"{rate:g}", *(cells.get((rate, e), "") for e in epochs)] for rate in rates]
    return markdown_table(lines)


def comma_separated(points: Sequence[Point]) -> str:
    """One line per point. The score is IC - AD."""
    lines: list[list[Any]] = [["learning_rate", "epochs", "AD_15", "IC_15", "score"]]
    for point in sorted(points, key=lambda point: (point.run.learning_rate, point.epochs)):
        values = (point.figures["AD_15"], point.figures["IC_15"], point.score)
        lines.append([point.run.learning_rate, point.epochs, *(f"{v:.3f}" for v in values)])
    return csv_table(lines)


def draw(points: Sequence[Point]) -> Figure:
    """AD and IC over the rate, side by side, with one line per number of epochs."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = zip(figure.subplots(1, 2), ("AD", "IC"), ("lower", "higher"))
    for axes, metric, better in panels:
        for i, epochs in enumerate(_axes(points)[1]):
            line = sorted(
                (point.run.learning_rate, point.figures[f"{metric}_15"])
                for point in points
                if point.epochs == epochs
            )
            axes.plot(
                *zip(*line),
                **line_style(i),
                label=str(epochs),
            )
        title = f"{metric}(15 %): {better} is better"
        axes.set(title=title, xlabel="peak rate", xscale="log", ylabel="%")
        axes.grid(alpha=0.3)
    figure.axes[1].legend(title="epochs", fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _report(points: Sequence[Point], best: Point) -> None:
    if jax.process_index() > 0:
        return
    run, of = best.run, f" of {best.run.epochs}" if best.epochs < best.run.epochs else ""
    print("AD(15 %)/IC(15 %) by rate and epochs:\n")
    print(markdown(points))
    print(
        f"best: rate {run.learning_rate:g}, after {best.epochs}{of} epochs "
        f"(score {best.score:.1f}), kept in {run.output}; to train it elsewhere:"
    )
    print(command(dataclasses.replace(run, output=preset(run.backbone).output)))

"""`ttame lr-find`: the paper's grid search over peak rates and epochs, by AD and IC at 15 %."""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import jax
from etils import epath
from matplotlib.figure import Figure

from ttame_jax.experiments.evaluate import listed
from ttame_jax.files import write_atomically
from ttame_jax.plots import line_style, save_figure
from ttame_jax.training.checkpoints import CHECKPOINT_FOLDER, score
from ttame_jax.training.config import CONFIG_FILE, TrainConfig, command, load_config, preset
from ttame_jax.training.log import say
from ttame_jax.training.loop import settle, train


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is tried."""

    rates: Annotated[tuple[float, ...], listed(float, "RATE,...")] = (
        1e-4,
        3e-4,
        1e-3,
        3e-3,
        1e-2,
    )
    """Peak rates, each in place of --learning-rate."""
    epochs_grid: Annotated[tuple[int, ...], listed(int, "EPOCHS,...")] = ()
    """Numbers of epochs, each a cycle of its own. By default there is one cycle of --epochs a rate,
    measured after each of them: all but the last are then of a cycle that goes on."""


@dataclasses.dataclass(frozen=True)
class Point:
    """A run as it was after so many epochs."""

    run: TrainConfig
    epochs: int
    measured: Mapping[str, float]  # a line of validation.jsonl

    @property
    def score(self) -> float:
        """As of checkpoints."""
        return score(self.measured)


def lr_find(config: TrainConfig, grid: Grid) -> Point | None:
    """Trains every setting of the grid as a run of its own and writes what the runs measure.

    The runs are in ``OUTPUT/rate_R``, or ``OUTPUT/rate_R/epochs_E`` for cycles of their own.
    Finished ones are not trained again, and one that was interrupted resumes. After each run
    ``lr_find.md``, ``.csv``, ``.png`` and ``.svg`` hold all that have finished.

    Args:
      config: of all runs, but for the rate, the folder and, if the grid has them, the epochs.
      grid: the rates and epochs.

    Returns:
      The best point; None if SIGTERM has stopped the search.

    Raises:
      ValueError: for a setting that cannot be trained, before any is, or if all diverge.
    """
    if not grid.rates:
        raise ValueError("no rate given: ttame lr-find --rates 1e-4,1e-3,1e-2")
    if config.validation_images < 1:
        raise ValueError(
            f"lr-find chooses by the validation images: --validation-images must be at least 1, "
            f"not {config.validation_images}"
        )
    runs = _runs(config, grid)
    points: list[Point] = []
    for i, run in enumerate(runs, start=1):
        run = settle(dataclasses.replace(run, batch_size=_batch_size(runs)))
        if _measured(run) is None:
            say(f"run {i} of {len(runs)}: --learning-rate {run.learning_rate:g}")
            train(run)
        lines = _measured(run)
        if lines is None:
            say("stopped: the same command resumes the search")
            return None
        settled = load_config(run.output)
        points += [
            Point(settled, line["epoch"], line)
            for line in (lines[-1:] if grid.epochs_grid else lines)
        ]
        if jax.process_index() == 0:
            _write(points, config.output)
    best = max(points, key=lambda point: point.score)
    if best.score == -math.inf:
        raise ValueError("every rate diverged: try lower ones, as --rates 1e-6,1e-5,1e-4")
    _report(points, best)
    return best


def _runs(config: TrainConfig, grid: Grid) -> list[TrainConfig]:
    runs = []
    for rate in dict.fromkeys(grid.rates):
        folder = config.output / f"rate_{rate}"
        run = dataclasses.replace(config, learning_rate=rate, output=folder)
        runs += [
            dataclasses.replace(run, epochs=epochs, output=folder / f"epochs_{epochs}")
            for epochs in dict.fromkeys(grid.epochs_grid)
        ] or [run]
    return runs


def _batch_size(runs: Sequence[TrainConfig]):
    """The same in all runs: where it is auto, what the first of them has found."""
    for run in runs:
        if run.batch_size == "auto" and (epath.Path(run.output) / CONFIG_FILE).is_file():
            return load_config(run.output).batch_size
    return runs[0].batch_size


def _measured(run: TrainConfig) -> list[dict] | None:
    """The lines of a finished run, one an epoch; None of a run that is not."""
    path = epath.Path(run.output) / "validation.jsonl"
    text = path.read_text() if path.is_file() else ""
    lines = [json.loads(line) for line in text.split("\n")[:-1]]
    if not lines or lines[-1]["epoch"] < run.epochs:
        return None
    # A run is measured before it is saved.
    saved = epath.Path(run.output) / CHECKPOINT_FOLDER / str(lines[-1]["step"])
    return lines if saved.is_dir() else None


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
    """AD(15 %)/IC(15 %), a line a rate and a column a number of epochs; the best is bold."""
    rates, epochs = _axes(points)
    best = max(points, key=lambda point: point.score)
    cells = {
        (point.run.learning_rate, point.epochs): ("**{}**" if point is best else "{}").format(
            "{AD_15:.1f}/{IC_15:.1f}".format(**point.measured)
        )
        for point in points
    }
    lines = [["rate ↓ epochs →", *map(str, epochs)], ["---"] * (len(epochs) + 1)]
    lines += [[f"{rate:g}", *(cells.get((rate, e), "") for e in epochs)] for rate in rates]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def comma_separated(points: Sequence[Point]) -> str:
    """A line a point; the score is IC - AD."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["learning_rate", "epochs", "AD_15", "IC_15", "score"])
    for point in sorted(points, key=lambda point: (point.run.learning_rate, point.epochs)):
        values = (point.measured["AD_15"], point.measured["IC_15"], point.score)
        writer.writerow([point.run.learning_rate, point.epochs, *(f"{v:.3f}" for v in values)])
    return buffer.getvalue()


def draw(points: Sequence[Point]) -> Figure:
    """AD and IC over the rate, side by side, a line a number of epochs."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = zip(figure.subplots(1, 2), ("AD", "IC"), ("lower", "higher"))
    for axes, measure, better in panels:
        for i, epochs in enumerate(_axes(points)[1]):
            line = sorted(
                (point.run.learning_rate, point.measured[f"{measure}_15"])
                for point in points
                if point.epochs == epochs
            )
            axes.plot(
                *zip(*line),
                **line_style(i),
                label=str(epochs),
            )
        title = f"{measure}(15 %): {better} is better"
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

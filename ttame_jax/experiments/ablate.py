"""`ttame ablate`: what settings of a run change in its AD and IC (Tables VI and VII)."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import tyro
from matplotlib.figure import Figure

from ttame_jax.backbones import Backbone
from ttame_jax.config import TrainConfig
from ttame_jax.errors import Failure
from ttame_jax.experiments import tables
from ttame_jax.experiments.evaluate import (
    EvaluationOptions,
    EvaluationSetup,
    MetricNames,
    known_figures,
    read_rows,
)
from ttame_jax.experiments.repeats import Repeats
from ttame_jax.experiments.sweep import Axis, Setting, Trial, field_axis, grid, train_each
from ttame_jax.files import check_output_folder, locked, to_json, write_atomically
from ttame_jax.losses import RECIPES
from ttame_jax.methods import load_method
from ttame_jax.metrics.base import Rows
from ttame_jax.plots import COLOURS, save_figure
from ttame_jax.preprocessing import Masking
from ttame_jax.runs import Run, load_run
from ttame_jax.weights import abstract_backbone, module_files

SEED = "seed"
EVALUATION_MASKING = "evaluation_masking"
FACTORS = (0.5, 2)
"""What `--over loss` multiplies each weight of the loss with, one at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ablation:
    """The settings to compare, and the images to evaluate them on."""

    over: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """A setting and its values, such as learning-rate 1e-3 2e-3 or loss.area-exponent 0.2 0.3 0.4.
    Without values: variant (Table VI), masking (Table VII), loss (all recipes, and half and twice
    each weight), or all choices of another flag. Several --over are a grid."""
    seeds: int = 1
    """Number of runs of each setting, with the seeds --seed, --seed + 1 and so on. The tables have
    their means and standard deviations."""
    evaluation_split: str = "validation"
    """Split to evaluate the trained runs on."""
    evaluation_list: Path | None = None
    """File that names the images to evaluate on, one FILENAME LABEL per line."""
    evaluation_images: int = 2000
    """Largest number of images to evaluate on, evenly spread."""
    evaluation_boxes: Path | None = None
    """CSV file of the objects' boxes, for metrics of localisation."""
    measures: MetricNames = ("ad", "ic")

    def options(self, **given: Any) -> EvaluationOptions:
        """Images and metrics, for `EvaluationSetup`."""
        return EvaluationOptions(
            split=self.evaluation_split,
            list=self.evaluation_list,
            limit=self.evaluation_images,
            boxes=self.evaluation_boxes,
            measures=self.measures,
            **given,
        )


def ablate(config: TrainConfig, ablation: Ablation) -> list["Result"]:
    """Trains and evaluates a run for every combination of settings, and tabulates them.

    Runs are trained and resumed as `train_each` does, and evaluations that have been finished with
    the same settings are not repeated. After each run ``ablation.md``, ``.csv``, ``.tex``,
    ``.json``, ``.png`` and ``.svg`` are written with what is known so far.

    Args:
      config: of all runs, except for what is compared and the folder.
      ablation: the settings and images.

    Returns:
      The results, in the order of the settings. Fewer than there are settings if SIGTERM has stopped
      the training.

    Raises:
      ValueError: a setting cannot be trained (raised before any training).
      Failure: all runs diverge, or another process writes to the output.
    """
    _check(ablation)
    axes, maskings = _axes(config, ablation)
    # All settings once, before any of them with another seed.
    trials = sorted(grid(config, axes), key=lambda trial: trial.run.seed)
    check_output_folder(config.output)
    results: dict[tuple[str, ...], Result] = {}
    with locked(config.output):
        for trial, outcome in train_each(trials):
            if outcome == "stopped":
                break
            labels = {name: label for name, label in trial.labels.items() if name != SEED}
            run = _load(trial) if outcome == "finished" else None
            for masking in maskings:
                shown = labels | ({EVALUATION_MASKING: masking} if masking else {})
                result = results.setdefault(
                    tuple(shown.values()), Result(metrics=ablation.measures, labels=shown)
                )
                if run is None:
                    result.diverged.append(trial.run.seed)
                elif evaluated := _evaluate(run, ablation, masking):
                    result.add(trial.run.seed, *evaluated)
            if jax.process_index() == 0:
                _write([*results.values()], config.output)
        else:
            if all(result.diverged and not result.figures for result in results.values()):
                raise Failure("every run diverged: try a lower --learning-rate")
            if jax.process_index() == 0:
                print(report([*results.values()]))
    return [*results.values()]


@dataclasses.dataclass(kw_only=True)
class Result(Repeats):
    """What is known of a setting.

    Attributes:
      labels: the setting, by name of the axis.
      diverged: seeds of the runs that diverged.
    """

    labels: Mapping[str, str]
    diverged: list[int] = dataclasses.field(default_factory=list)


def _check(ablation: Ablation) -> None:
    if not any(ablation.over):
        raise ValueError("nothing to compare: ttame ablate --over variant")
    for name in ("seeds", "evaluation_images"):
        if (value := getattr(ablation, name)) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    ablation.options()  # checks the metrics


def _axes(config: TrainConfig, ablation: Ablation) -> tuple[list[Axis], list[Masking | None]]:
    """The axes of training, with that of the seeds, and the maskings of the evaluation.

    These are not an axis: one run serves them all.
    """
    axes: list[Axis] = []
    maskings: list[Masking | None] = [None]
    for name, *words in filter(None, ablation.over):
        field = name.replace("-", "_")
        if field == "loss" and not words:
            axes.append(_loss_axis(config))
        elif field == EVALUATION_MASKING:
            axis = field_axis(name, words)
            maskings = [setting.values[field] for setting in axis.settings]
        else:
            axes.append(field_axis(name, words))
            if field == "variant" and not words:
                axes = [*_features_axis(config), *axes]
            if field == "masking" and not words and maskings == [None]:
                maskings = list(get_args(Masking))
    names = [axis.name for axis in axes]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(
            f"--over {twice[0].replace('_', '-')} is given twice: list its values once"
        )
    if ablation.seeds > 1 or SEED not in names:
        seeds = range(config.seed, config.seed + ablation.seeds)
        if SEED in names:
            raise ValueError("give either --seeds or --over seed")
        axes.append(Axis(SEED, tuple(Setting(str(seed), {SEED: seed}) for seed in seeds)))
    return axes, maskings


def _loss_axis(config: TrainConfig) -> Axis:
    """All recipes, and half and twice each weight of the configured one that is not 0."""
    own = config.loss.recipe
    recipes = [own, *(recipe for recipe in RECIPES if recipe != own)]
    settings = [Setting(f"recipe {recipe}", {"loss.recipe": recipe}) for recipe in recipes]
    weights: dict[str, Any] = dataclasses.asdict(config.loss.resolved())
    del weights["recipe"]
    for name, value in weights.items():
        for changed in (value * factor for factor in FACTORS if value):
            settings.append(Setting(f"{name} {changed:g}", {f"loss.{name}": changed}))
    return Axis("loss", tuple(settings))


def _features_axis(config: TrainConfig) -> list[Axis]:
    """The feature maps that Table VI compares, unless the configuration has chosen among them."""
    options: dict[str, Any] = config.backbone_config
    if "features" in options or module_files.parse(config.backbone):
        return []
    backbone: Backbone = abstract_backbone(config.backbone, **options)
    kinds = backbone.compared_features
    return [field_axis("backbone-config.features", kinds)] if kinds else []


def _load(trial: Trial) -> Run:
    code = trial.run.backbone if module_files.parse(trial.run.backbone) else None
    return load_run(trial.run.output, code)


def _evaluate(
    run: Run, ablation: Ablation, masking: Masking | None
) -> tuple[dict[str, Any], Rows] | None:
    """The figures of a run, from its file if that has the same settings, and their rows.

    None in processes other than the first.
    """
    options = ablation.options(masking=masking, batch_size=run.config.batch_size)
    setup = EvaluationSetup(options, run)
    path = run.config.output / f"evaluation_{setup.masking}.json"
    settings = dataclasses.asdict(options) | {"inputs": setup.inputs_of(run.attention)}
    settings = json.loads(to_json(settings))
    if not (figures := known_figures(path, settings)):
        method = load_method(run.config.variant, run.backbone, run.attention)
        figures = setup.evaluate(method, path, settings)
    return (figures, read_rows(path)) if figures else None


def _write(results: Sequence[Result], output: Path) -> None:
    content = [
        {
            "settings": result.labels,
            "diverged": result.diverged,
            "runs": [{"seed": seed, **figures} for seed, figures in result.figures.items()],
        }
        for result in results
    ]
    write_atomically(output / "ablation.json", to_json(content, indent=2) + "\n")
    measured = [result for result in results if result.figures]
    if not measured:
        return
    write_atomically(output / "ablation.csv", comma_separated(measured))
    write_atomically(output / "ablation.tex", latex(measured))
    write_atomically(output / "ablation.md", report(results))
    figure = draw(measured)
    for suffix in ("png", "svg"):
        save_figure(figure, output / f"ablation.{suffix}")


def _lines(results: Sequence[Result], mark: tables.Cell) -> list[list[str]]:
    """The head of a table, and a line for each setting that has been measured."""
    rows = tables.all_rows([result.mean() for result in results])
    columns = []
    for row in rows:
        ranks = row.ranks([True] * len(results))
        columns.append(map(mark, row.texts(), ranks, row.within_chance))
    head = [*(_title(name) for name in results[0].labels), "runs", *(row.title for row in rows)]
    settings = [[*result.labels.values(), str(len(result.figures))] for result in results]
    return [head, *([*setting, *cells] for setting, *cells in zip(settings, *columns))]


def _title(name: str) -> str:
    return name.replace("_", " ").replace("backbone config.", "")


def report(results: Sequence[Result]) -> str:
    """The tables `markdown` and `differences`, of at least one setting that has been measured."""
    text = markdown(results)
    if changes := differences([x for x in results if x.figures]):
        text += f"\nDifferences from the first setting:\n\n{changes}"
    return text


def markdown(results: Sequence[Result]) -> str:
    """A line for each setting, with means and standard deviations over its runs.

    The best value of a column is bold, the second best underlined. Runs that diverged are listed
    below.
    """
    head, *body = _lines([x for x in results if x.figures], tables.marked_in_markdown)
    lost = [
        f"\ndiverged: {', '.join(result.labels.values())} (seed {seed})\n"
        for result in results
        for seed in result.diverged
    ]
    return tables.markdown_table([head, ["---"] * len(head), *body]) + "".join(lost)


def differences(results: Sequence[Result]) -> str:
    """A line for each setting with its differences from the first, in percentage points.

    The cells are those of `tables.differences`, with intervals of a paired bootstrap over the images
    and seeds. Settings that are evaluated with several maskings are compared with the first of the
    same masking. Settings that are evaluated on other images are left out. Empty if there is
    nothing to compare.
    """
    labels, figures = [], []
    for result in results:
        masking = result.labels.get(EVALUATION_MASKING)
        first = next(x for x in results if x.labels.get(EVALUATION_MASKING) == masking)
        if result is not first and result.source == first.source:
            labels.append([*result.labels.values()])
            figures.append(result.minus(first))
    if not labels:
        return ""
    head = [*map(_title, results[0].labels)]
    return tables.differences(head, labels, tables.all_rows(figures))


def latex(results: Sequence[Result]) -> str:
    """A LaTeX table, which needs the package booktabs, as `markdown`."""
    head, *body = _lines(results, tables.marked_in_latex)
    means = [result.mean() for result in results]
    backbones = ", ".join(dict.fromkeys(one["backbone"] for one in means))
    caption = f"{backbones}, {max(one['images'] for one in means)} images."
    if any(len(result.figures) > 1 for result in results):
        caption = f"Means and standard deviations over runs. {caption}"
    labels = len(results[0].labels)
    return tables.latex_table(caption, "l" * labels + "r" * (len(head) - labels), head, body)


def comma_separated(results: Sequence[Result]) -> str:
    """One line for each run."""
    runs = [(result, seed) for result in results for seed in result.figures]
    rows = tables.all_rows([result.figures[seed] for result, seed in runs])
    lines = [[*results[0].labels, SEED, *(row.title for row in rows)]]
    for i, (result, seed) in enumerate(runs):
        values = (f"{row.values[i]:.3f}" for row in rows)
        lines.append([*result.labels.values(), str(seed), *values])
    return tables.csv_table(lines)


def draw(results: Sequence[Result]) -> Figure:
    """A panel for each metric, with a line for each setting.

    Bars are 95 % intervals, small dots single runs. The dashed line is the mean of the first
    setting.
    """
    rows = tables.all_rows([result.mean() for result in results])
    names = [", ".join(result.labels.values()) for result in results]
    columns = (len(rows) + 1) // 2
    figure = Figure(figsize=(1.5 + 2.6 * columns, 2 * (0.7 + 0.25 * len(results))))
    figure.set_layout_engine("constrained")
    grid = figure.subplots(2, columns, sharey=True, squeeze=False)
    single = [tables.all_rows([*result.figures.values()]) for result in results]
    for j, (axes, row) in enumerate(zip(grid.T.flat, rows)):
        for i, (mean, (low, high)) in enumerate(zip(row.values, row.intervals)):
            axes.plot([low, high], [i, i], color=COLOURS[0], linewidth=1.5)
            axes.plot(mean, i, "o", color=COLOURS[0], markersize=5)
            runs = single[i][j].values
            if len(runs) > 1:
                axes.plot(runs, [i] * len(runs), "o", color=COLOURS[1], markersize=2)
        axes.axvline(row.values[0], color="grey", linewidth=0.8, linestyle="--")
        axes.set(title=row.title, yticks=range(len(names)))
        axes.set_yticklabels(names, fontsize=8, parse_math=False)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(axis="x", alpha=0.3)
    for axes in grid.T.flat[len(rows) :]:
        axes.remove()
    for axes in grid[-1]:
        axes.set_xlabel("%")
    return figure

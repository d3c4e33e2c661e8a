"""`ttame report`: a run as one HTML file, with its curves, figures and maps."""

import base64
import dataclasses
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jinja2
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict
from matplotlib.figure import Figure
from PIL import Image

from ttame_jax import pictures
from ttame_jax.config import CONFIG_FILE, INPUTS
from ttame_jax.data import evaluation_batches, thin
from ttame_jax.experiments import curves
from ttame_jax.experiments.evaluate import EvaluationOptions, EvaluationSetup, MetricNames
from ttame_jax.experiments.resumable import ResumableRows
from ttame_jax.experiments.tables import comparison_tables
from ttame_jax.explainer import Explainer
from ttame_jax.files import check_output_file, locked, write_atomically
from ttame_jax.labels import label
from ttame_jax.losses import EXTRA_TERMS
from ttame_jax.methods import load_method
from ttame_jax.metrics import summarise
from ttame_jax.metrics.base import Rows
from ttame_jax.metrics.confidence import PERCENTAGES
from ttame_jax.plots import inline_svg, line_style
from ttame_jax.preprocessing import to_float
from ttame_jax.runs import Run, load_class_names, load_run
from ttame_jax.training.log import read_lines

NAME = "report.html"
EXAMPLES = 12  # pictures, evenly spaced
EXTREMES = 6  # pictures that are explained best, and as many that are explained worst
SMALL = 96  # pixels; smaller pictures are enlarged without smoothing
MARKED = 20  # points of a curve, above which they have no markers
LOSS_TERMS = ("loss", "cross_entropy", "area", "variation", *EXTRA_TERMS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig(EvaluationOptions):
    """A run, and the images of its report."""

    run: Path
    """Folder of a run, as ttame train wrote it."""
    output: Path | None = None
    """HTML file for the report. The default is report.html in the run's folder."""
    limit: int | None = 200
    """The largest number of images; they are evenly spaced in the split."""
    measures: MetricNames = ("ad", "ic", "road")

    def __post_init__(self):
        super().__post_init__()
        if "ad" not in self.measures:
            raise ValueError("a report orders its images by AD: --measures must include ad")


def report(config: ReportConfig, note: str = "") -> dict[str, Any]:
    """Evaluates a run and writes its report. An interrupted evaluation resumes.

    Args:
      config: the run and the images.
      note: a paragraph at the top of the page.

    Returns:
      The figures: means in % and their intervals, as `ttame evaluate` writes them.

    Raises:
      ValueError: the source has no image of the list, or a metric does not apply.
      FileNotFoundError: the run, the images or the weights are missing.
      Failure: another process writes to the output.
    """
    output = config.output or config.run / NAME
    check_output_file(output)
    run = load_run(config.run, config.weights)
    setup = EvaluationSetup(config, run)
    method = load_method(run.attention.variant, run.backbone, run.attention)
    explainer = Explainer(method, load_class_names(config.run))
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key != "output"}
    settings |= {"inputs": setup.inputs_of(run.attention)}
    with locked(output, folder=False):
        resumable = ResumableRows(output, settings)
        rows, _ = resumable.collect(setup.evaluator(method).batches, setup.indices)
        figures = setup.summarise(method, rows)
        write_atomically(output, _page(config, run, setup, explainer, rows, figures, note))
        resumable.remove()
    print(output)
    return figures


def _page(
    config: ReportConfig,
    run: Run,
    setup: EvaluationSetup,
    explainer: Explainer,
    rows: Rows,
    figures: Mapping[str, Any],
    note: str,
) -> str:
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("ttame_jax.experiments", "."), autoescape=True
    )
    settings = json.loads((config.run / CONFIG_FILE).read_text())
    order = _order(rows)
    extremes = min(EXTREMES, len(order) // 2)
    chosen = {
        "Examples": thin(np.arange(len(order)), EXAMPLES),
        "Best explained": order[:extremes],
        "Worst explained": order[::-1][:extremes],
    }
    places = np.unique(np.concatenate([*chosen.values()]))
    items = dict(zip(places.tolist(), _gallery(setup, explainer, rows, places)))
    return templates.get_template("report.html").render(
        method=explainer.method.title,
        backbone=run.backbone.name,
        note=note,
        facts=_facts(config, run, settings, figures),
        tables=comparison_tables([figures]),
        road=inline_svg(curves.draw({"": figures})) if "ROAD" in figures else "",
        training=[(text, inline_svg(figure)) for text, figure in _training_curves(config.run)],
        gallery={
            name: [items[place] for place in of_section.tolist()]
            for name, of_section in chosen.items()
            if len(of_section)
        },
        percentages=PERCENTAGES,
        small=run.backbone.preprocessing.image_size < SMALL,
        classes=_classes(rows, explainer.class_names),
        settings=flatten_dict(
            {k: v for k, v in settings.items() if k not in (INPUTS, "output")}, sep="."
        ),
    )


def _facts(config: ReportConfig, run: Run, settings: Mapping, figures: Mapping) -> dict[str, Any]:
    """What the report is about, by name."""
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(run.attention, nnx.Param)))
    return {
        "Classifier": f"{run.backbone.name}, {run.backbone.num_classes} classes, frozen",
        "Trained parameters": f"{parameters:,} of the attention mechanism ({run.config.variant})",
        "Training images": settings["dataset"],
        "Epochs": f"{run.config.epochs}; checkpoint of step {run.step:,}",
        "Evaluation": f"{figures['images']:,} images of {config.dataset or settings['dataset']} "
        f"({config.split}), {figures['masking']} masking",
    }


def _training_curves(folder: Path) -> Iterator[tuple[str, Figure]]:
    """The curves of a run, each with its values in words. None for logs that are missing."""
    steps, epochs = (read_lines(folder / f"{name}.jsonl") for name in ("metrics", "validation"))
    plots = [
        (
            "Loss and its terms",
            steps,
            "step",
            {name: name.replace("_", " ") for name in LOSS_TERMS},
        ),
        ("Learning rate", steps, "step", {"learning_rate": "learning rate"}),
    ]
    for key in ("AD", "IC"):
        names = {f"{key}_{percent}": f"{key}({percent}%)" for percent in PERCENTAGES}
        plots.append((f"{key} of the validation images, %", epochs, "epoch", names))
    for title, lines, x, names in plots:
        if lines:
            yield _plot(title, lines, x, names)


def _plot(
    title: str, lines: Sequence[Mapping[str, Any]], x: str, names: Mapping[str, str]
) -> tuple[str, Figure]:
    """A plot of some columns of a log, and its first and last values in words."""
    figure = Figure(figsize=(4.8, 3), layout="constrained")
    axes, ends = figure.subplots(), []
    for i, (key, name) in enumerate(names.items()):
        points = [(line[x], line[key]) for line in lines if line.get(key) is not None]
        if points:
            style: dict[str, Any] = line_style(i) | ({"marker": ""} if len(points) > MARKED else {})
            axes.plot(*zip(*points), **style, markersize=4, label=name)
            ends.append(f"{name} from {points[0][1]:.3g} to {points[-1][1]:.3g}")
    axes.set(title=title, xlabel=x)
    axes.grid(alpha=0.3)
    axes.locator_params("x", integer=True)
    if len(names) > 1:
        figure.legend(loc="outside lower center", ncols=len(names), fontsize=8)
    return f"{title} by {x}: {', '.join(ends)}.", figure


def _order(rows: Rows) -> np.ndarray:
    """The places of the rows, best explained first: by the mean drop, then by the mean increase."""
    change = (rows["masked"] / rows["confidence"][:, None]).mean(axis=1)
    return np.lexsort((-change, _drops(rows).mean(axis=1)))


def _drops(rows: Rows) -> np.ndarray:
    """The drop in confidence at each percentage, in %: ``[N, P]``."""
    before = rows["confidence"][:, None]
    return 100 * np.maximum(0, before - rows["masked"]) / before


def _gallery(
    setup: EvaluationSetup, explainer: Explainer, rows: Rows, places: np.ndarray
) -> Iterator[dict[str, Any]]:
    """Pictures, the maps of their two most probable classes and their drops."""
    (batch,) = evaluation_batches(
        setup.source,
        explainer.backbone.preprocessing,
        len(places),
        indices=rows["index"][places],
    )
    explained = jax.device_get(explainer(to_float(batch["image"]), "top2"))
    drops = _drops(rows)
    for i, place in enumerate(places):
        image = batch["image"][i]
        yield {
            "name": setup.source.name(int(rows["index"][place])),
            "image": _data_uri(image),
            "true": setup.source.label_name(int(batch["label"][i])),
            "drops": drops[place].tolist(),
            "maps": [
                {
                    "label": label(int(class_id), explainer.class_names),
                    "probability": float(probability),
                    "where": _where(values),
                    "map": _data_uri(pictures.heatmap(values, image.shape[:2])),
                }
                for class_id, probability, values in zip(
                    explained.classes[i], explained.probabilities[i], explained.maps[i]
                )
            ],
        }


def _data_uri(image: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=90, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _where(values: np.ndarray) -> str:
    """The part of a picture in which a map ``[h, w]`` has its maximum."""
    row, column = np.unravel_index(values.argmax(), values.shape)
    vertical = ("top", "middle", "bottom")[3 * int(row) // values.shape[0]]
    horizontal = ("left", "centre", "right")[3 * int(column) // values.shape[1]]
    return f"{vertical} {horizontal}"


def _classes(rows: Rows, names: Sequence[str] | None) -> list[dict[str, Any]]:
    """AD and IC of each predicted class, the most frequent first."""
    summaries = []
    for class_id in np.unique(rows["class"]):
        of_class = {name: values[rows["class"] == class_id] for name, values in rows.items()}
        summaries.append(
            {
                "name": label(int(class_id), names),
                "images": len(of_class["index"]),
                "confidence": 100 * float(of_class["confidence"].mean()),
                **summarise(of_class, ("ad", "ic")),
            }
        )
    return sorted(summaries, key=lambda one: -one["images"])

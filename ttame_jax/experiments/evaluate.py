"""`ttame evaluate`: measures a method's maps and writes the figures as JSON."""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from jax.experimental import multihost_utils
from tqdm import tqdm

from ttame_jax.data import Source, load_source, select
from ttame_jax.explainer import Explainer, load_explainer
from ttame_jax.files import write_atomically
from ttame_jax.masking import MaskingKind
from ttame_jax.methods import Method, load_method
from ttame_jax.metrics.evaluation import MEASURES, Evaluator, Rows, intervals, summarise
from ttame_jax.training.config import TrainConfig, load_config

MaskingChoice = Literal["backbone", "pixel", "standardised"]


def listed(kind: Callable[[str], Any], metavar: str):
    """How several values are given on the command line, with commas or spaces between them."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar=metavar,
        instance_from_str=lambda words: tuple(map(kind, " ".join(words).replace(",", " ").split())),
        is_instance=lambda values: isinstance(values, tuple),
        str_from_instance=lambda values: [",".join(map(str, values))],
    )


Names = Annotated[tuple[str, ...], listed(str, "NAME,...")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """Which images to measure on, and how."""

    dataset: str | None = None
    """A TFDS data set, folder:DIR or digits; by default the run's."""
    data_dir: str | None = None
    """Where TFDS keeps its data sets; by default the run's."""
    split: str = "validation"
    """Split to measure on, in TFDS's syntax."""
    limit: int | None = None
    """At most so many images, evenly spread."""
    list: Path | None = None
    """Only the images that this file names, FILENAME LABEL a line as the authors' lists."""
    measures: Names = ("ad", "ic")
    """Any of ad,ic,road,road_reference,insertion,deletion,pointing: average drop, increase in
    confidence, ROAD (road_reference is the authors' variant) and so on."""
    masking: MaskingChoice | None = None
    """How a map masks an image for AD and IC; by default as the run's configuration says, else the
    backbone's own way. The authors' code masks pixels for every backbone."""
    batch_size: int = 32
    """Images at a time, over all devices."""
    seed: int = 0
    """Of ROAD's noise."""
    weights: str | None = None
    """Of the backbone, where they are no longer where the run found them."""

    def __post_init__(self):
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit must be at least 1, not {self.limit}")
        if unknown := [name for name in self.measures if name not in MEASURES]:
            raise ValueError(
                f"unknown measure {', '.join(unknown)}; there are {', '.join(MEASURES)}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(MeasureConfig):
    """What to measure, and on which images."""

    run: Path
    """The run's folder, as ttame train wrote it."""
    output: Path
    """JSON file for the figures; what is measured so far is kept beside it until it is done."""
    method: str | None = None
    """The run's own by default, or another that explains its backbone: gradcam, gradcam++,
    scorecam, ablationcam, rise, iia or transformer_lrp."""
    method_config: dict[str, int | str] = dataclasses.field(default_factory=dict)
    """Options of the method, as name and value: masks 1000, or layer blocks.10."""


def evaluate(config: EvaluateConfig) -> dict:
    """Measures a method's maps on images, prints a table and writes the figures.

    An interrupted evaluation resumes from the images it has measured.

    Returns:
      What the JSON file holds (empty in all processes of a run but the first).

    Raises:
      ValueError: if none of the images of the list is there, or the method does not apply.
      FileNotFoundError: if the run, the images or the weights are missing.
    """
    explainer = load_explainer(config.run, config.weights)
    name = config.method or explainer.attention.variant
    method = load_method(name, explainer.backbone, explainer.attention, **config.method_config)
    measuring = Measuring(config, explainer, load_config(config.run))
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key != "output"}
    figures = measuring.measure(method, config.output, settings)
    if figures:
        print(table(figures))
    return figures


class Measuring:
    """The images and the way that all methods of a backbone are measured on.

    Args:
      config: as on the command line.
      explainer: of the run; its backbone says how to mask by default.
      trained: the run's configuration.
    """

    def __init__(self, config: MeasureConfig, explainer: Explainer, trained: TrainConfig):
        self.config = config
        self.source: Source = load_source(
            config.dataset or trained.dataset, config.split, config.data_dir or trained.data_dir
        )
        self.indices = select(self.source, config.list, config.limit)
        own = explainer.backbone.masking
        choice = config.masking or trained.evaluation_masking or own
        self.masking: MaskingKind = own if choice == "backbone" else choice

    def measure(
        self,
        method: Method,
        output: Path,
        settings: Mapping[str, Any],
        indices: Sequence[int] | None = None,
    ) -> dict:
        """Measures a method on these images (or some of them) and writes its figures.

        What `settings` say must be the same for a file of measurements to be resumed.
        """
        config = self.config
        evaluator = Evaluator(
            method,
            self.source,
            masking=self.masking,
            measures=config.measures,
            batch_size=config.batch_size,
            seed=config.seed,
        )
        partial = Partial(output, settings)
        rows, seconds = partial.measure(evaluator, self.indices if indices is None else indices)
        if jax.process_index() > 0:
            return {}
        figures = {
            "images": len(rows["index"]),
            "method": method.name,
            "backbone": method.backbone.name,
            "masking": self.masking,
            **summarise(rows, config.measures),
            "intervals": intervals(rows, config.measures),
            "forward_passes": method.forward_passes,
            "seconds_per_image": seconds / len(rows["index"]),
            "settings": json.loads(json.dumps(settings, default=str)),
        }
        write_atomically(output, json.dumps(figures, indent=2) + "\n")
        partial.remove()
        return figures


class Partial:
    """Rows measured so far, beside the output: a line of settings, then one an image.

    The first of several processes keeps them; it tells the others what is left.

    Args:
      output: the file of the figures.
      settings: a file left by a run of other settings is not used.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any]):
        self.path = output.with_name(output.name + ".partial")
        self.header = json.dumps({"settings": settings}, default=str)

    def measure(self, evaluator: Evaluator, indices: Sequence[int]) -> tuple[Rows, float]:
        """Measures what is left of the images; all rows, and the seconds it took in all."""
        first = jax.process_index() == 0
        records = self._read() if first else []
        done = np.isin(indices, [record["index"] for record in records])
        left = np.asarray(indices)[~multihost_utils.broadcast_one_to_all(done)]
        bar = tqdm(
            total=len(indices), initial=len(indices) - len(left), unit="image", disable=not first
        )
        start = time.perf_counter()
        with bar:
            for rows in evaluator.batches(indices=left) if len(left) else ():
                seconds, start = time.perf_counter() - start, time.perf_counter()
                count = len(rows["index"])
                new = [
                    {name: values[i].tolist() for name, values in rows.items()}
                    | {"seconds": seconds / count}
                    for i in range(count)
                ]
                records += new
                if first:
                    self._append(new)
                bar.update(count)
        records.sort(key=lambda record: record["index"])
        rows = {name: np.array([record[name] for record in records]) for name in records[0]}
        return rows, float(rows.pop("seconds").sum())

    def remove(self) -> None:
        self.path.unlink()

    def _append(self, records: Sequence[dict]) -> None:
        with self.path.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)

    def _read(self) -> list[dict]:
        """Whole lines of a file with these settings; starts a new file otherwise."""
        lines = self.path.read_text().split("\n")[:-1] if self.path.exists() else []
        if not lines or lines[0] != self.header:
            lines = [self.header]
        write_atomically(self.path, "".join(line + "\n" for line in lines))
        return [json.loads(line) for line in lines[1:]]


def table(figures: dict) -> str:
    """The figures as lines of text."""
    lines = [
        "{method} on {backbone}, {masking} masking, {images} images, "
        "{seconds_per_image:.2f} s an image".format(**figures)
    ]
    for name, interval in figures["intervals"].items():
        curves = interval if "MoRF" in interval else {"": interval}
        for order, low_high in curves.items():
            means = figures[name][order] if order else figures[name]
            cells = [
                f"{key}: {mean:.1f} [{low_high[key][0]:.1f}, {low_high[key][1]:.1f}]"
                for key, mean in means.items()
            ]
            lines.append(f"{name} {order}".strip() + "  " + "  ".join(cells))
    return "\n".join(lines)

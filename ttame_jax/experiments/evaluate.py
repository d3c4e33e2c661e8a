"""`ttame evaluate`: measures a run's maps and writes the figures as JSON."""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from ttame_jax.data import load_source, select
from ttame_jax.explainer import load_explainer
from ttame_jax.files import write_atomically
from ttame_jax.methods import TTAME
from ttame_jax.metrics.evaluation import Evaluator, Measure, Rows, intervals, summarise
from ttame_jax.training.config import load_config

MaskingChoice = Literal["backbone", "pixel", "standardised"]


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What to measure, and on which images."""

    run: Path
    """The run's folder, as ttame train wrote it."""
    output: Path
    """JSON file for the figures; what is measured so far is kept beside it until it is done."""
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
    measures: tuple[Measure, ...] = ("ad", "ic")
    """Average drop, increase in confidence, ROAD (road_reference is the authors' variant)."""
    masking: MaskingChoice | None = None
    """How a map masks an image for AD and IC; by default as the run's configuration says, else the
    backbone's own way. The authors' code masks pixels for every backbone."""
    batch_size: int = 32
    """Images at a time, over all devices."""
    seed: int = 0
    """Of ROAD's noise."""
    weights: str | None = None
    """Of the backbone, where they are no longer where the run found them."""


def evaluate(config: EvaluateConfig) -> dict:
    """Measures a run's maps on images, prints a table and writes the figures.

    An interrupted evaluation resumes from the images it has measured.

    Returns:
      What the JSON file holds.

    Raises:
      ValueError: if none of the images of the list is there.
      FileNotFoundError: if the run, the images or the weights are missing.
    """
    explainer = load_explainer(config.run, config.weights)
    trained = load_config(config.run)
    source = load_source(
        config.dataset or trained.dataset, config.split, config.data_dir or trained.data_dir
    )
    method = TTAME(explainer.backbone, explainer.attention)
    own = method.backbone.masking
    choice = config.masking or trained.evaluation_masking or own
    masking = own if choice == "backbone" else choice
    evaluator = Evaluator(
        method,
        source,
        masking=masking,
        measures=config.measures,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    partial = Partial(config.output, dataclasses.asdict(config))
    rows, seconds = partial.measure(evaluator, select(source, config.list, config.limit))
    figures = {
        "images": len(rows["index"]),
        "method": method.name,
        "backbone": method.backbone.name,
        "masking": masking,
        **summarise(rows, config.measures),
        "intervals": intervals(rows, config.measures),
        "forward_passes": method.forward_passes,
        "seconds_per_image": seconds / len(rows["index"]),
    }
    write_atomically(config.output, json.dumps(figures, indent=2) + "\n")
    partial.remove()
    print(table(figures))
    return figures


class Partial:
    """Rows measured so far, beside the output: a line of settings, then one an image.

    Args:
      output: the file of the figures.
      settings: a file left by a run of other settings is not used.
    """

    def __init__(self, output: Path, settings: dict):
        self.path = output.with_name(output.name + ".partial")
        self.header = json.dumps({"settings": settings}, default=str)

    def measure(self, evaluator: Evaluator, indices: Sequence[int]) -> tuple[Rows, float]:
        """Measures what is left of the images; all rows, and the seconds it took in all."""
        records = self._read()
        done = {record["index"] for record in records}
        left = [index for index in indices if index not in done]
        start = time.perf_counter()
        with (
            self.path.open("a") as file,
            tqdm(total=len(indices), initial=len(indices) - len(left), unit="image") as bar,
        ):
            for rows in evaluator.batches(indices=left) if left else ():
                seconds, start = time.perf_counter() - start, time.perf_counter()
                count = len(rows["index"])
                for i in range(count):
                    record = {name: values[i].tolist() for name, values in rows.items()}
                    records.append({**record, "seconds": seconds / count})
                    file.write(json.dumps(records[-1]) + "\n")
                file.flush()
                bar.update(count)
        records.sort(key=lambda record: record["index"])
        rows = {name: np.array([record[name] for record in records]) for name in records[0]}
        return rows, float(rows.pop("seconds").sum())

    def remove(self) -> None:
        self.path.unlink()

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

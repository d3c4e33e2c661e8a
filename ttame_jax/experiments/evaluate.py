"""`ttame evaluate`: evaluates the maps of an explanation method and writes the figures as JSON."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro

from ttame_jax import files
from ttame_jax.attention import AttentionMechanism
from ttame_jax.backbones import Backbone
from ttame_jax.config import FOLDER, TrainConfig
from ttame_jax.data import BoxedSource, Source, load_source, read_boxes, select
from ttame_jax.data.transforms import MAX_PIXELS
from ttame_jax.errors import Damaged
from ttame_jax.experiments.arguments import Names
from ttame_jax.experiments.cost import images_per_batch
from ttame_jax.experiments.resumable import ResumableRows
from ttame_jax.files import (
    check_seal,
    locked,
    read_arrays,
    save_arrays,
    seal,
    to_json,
    write_atomically,
)
from ttame_jax.methods import Method, list_methods, load_method
from ttame_jax.metrics import Evaluator, intervals, list_metrics, load_metrics, summarise
from ttame_jax.metrics.base import Rows
from ttame_jax.preprocessing import Masking
from ttame_jax.runs import Run, load_run
from ttame_jax.weights.transfer import digest

MaskingChoice = Literal["backbone"] | Masking

MetricNames = Annotated[
    Names, tyro.conf.arg(help=f"Metrics to compute; any of {', '.join(list_metrics())}.")
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """Images of a data set."""

    dataset: str | None = None
    """A TFDS data set, folder:DIR or digits. The default is the run's data set."""
    data_dir: str | None = None
    """The folder of TFDS data sets. The default is the one that the run was trained with."""
    split: str = "validation"
    """The split to evaluate on, in TFDS's syntax."""
    limit: int | None = None
    """The largest number of images; they are evenly spaced in the split."""
    list: Path | None = None
    """A file that selects images, with one FILENAME LABEL per line like the authors' lists."""

    def __post_init__(self):
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit must be at least 1, not {self.limit}")
        if self.dataset == "":
            raise ValueError("--dataset is empty: give a TFDS name, folder:DIR or digits")

    def source(self, run: TrainConfig | None, max_pixels: int) -> Source:
        """The data set.

        Args:
          run: supplies the defaults.
          max_pixels: images with more pixels count as unreadable.
        """
        dataset = self.dataset or (run.dataset if run else "")
        data_dir = self.data_dir
        if run and not dataset.startswith(FOLDER):  # which needs none
            data_dir = data_dir or run.data_dir
        return load_source(dataset, self.split, data_dir, max_pixels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageOptions(Selection):
    """Images to explain with a run."""

    max_pixels: int = MAX_PIXELS
    """Images with more pixels count as unreadable."""
    seed: int = 0
    """Seed of ROAD's noise, or of the randomisation of ttame sanity."""
    weights: str | None = None
    """The backbone's weights, if they have moved since the run. FILE.py:FUNCTION for a run on a
    function of yours, whose code runs only if you name it."""

    def __post_init__(self):
        super().__post_init__()
        if self.max_pixels < 1:
            raise ValueError(f"--max-pixels must be at least 1, not {self.max_pixels}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed must be at least 0 and below 2**63, not {self.seed}")

    def load(self, run: Run) -> tuple[Source, np.ndarray]:
        """The source, and the indices (int64 [N]) of the images in it.

        Args:
          run: supplies the defaults.
        """
        source = self.source(run.config, self.max_pixels)
        return source, select(source, self.list, self.limit)


def image_inputs(backbone: Backbone, source: Source, indices: np.ndarray) -> dict[str, str]:
    """Fingerprints of weights and images."""
    selected = files.digest([np.asarray(indices, np.int64)])
    return {
        "weights": digest(backbone),
        "images": f"{source.fingerprint}, selection {selected}",
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationOptions(ImageOptions):
    """Images and metrics of an evaluation."""

    batch_size: int = 32
    """Images per batch, over all devices. Methods with many forward passes use smaller batches."""
    boxes: Path | None = None
    """A CSV file of the objects' boxes: file_name,xmin,ymin,xmax,ymax, in fractions of the image.
    Metrics of localisation leave out images without a box."""
    measures: MetricNames = ("ad", "ic")
    masking: MaskingChoice | None = None
    """How a map masks an image for AD and IC. The default is the setting in the run's
    configuration, or else the backbone's own masking. The authors' code masks pixels for every
    backbone."""

    def __post_init__(self):
        super().__post_init__()
        if self.batch_size < 1:
            raise ValueError(f"--batch-size must be at least 1, not {self.batch_size}")
        if not self.measures:
            raise ValueError(f"no metric given: --measures takes {', '.join(list_metrics())}")
        load_metrics(self.measures)  # fails before anything is loaded


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(EvaluationOptions):
    """A method to evaluate, with images and metrics."""

    run: Path
    """The folder of a run, as written by ttame train."""
    output: Path
    """JSON file for the figures. The values of each image are written beside it, as .npz."""
    method: Annotated[
        str | None,
        tyro.conf.arg(
            help=f"The method to evaluate; any of {', '.join(list_methods())}. "
            "The default is the run's own method."
        ),
    ] = None
    method_config: dict[str, int | float | str] = dataclasses.field(default_factory=dict)
    """Options of the method as name and value, such as masks 1000 or layer blocks.10."""

    def __post_init__(self):
        super().__post_init__()
        if self.output.suffix == ".npz":
            raise ValueError(f"--output is a JSON file, not {self.output}: rows are beside it")


def evaluate(config: EvaluateConfig) -> dict:
    """Evaluates a method's maps, prints a table and writes the figures.

    An interrupted evaluation resumes with the images that are left.

    Returns:
      The contents of the JSON file. Empty in all processes but the first.

    Raises:
      ValueError: the source has no image of the list, or the method does not apply.
      FileNotFoundError: the run, the images or the weights are missing.
      Failure: another process writes to the output.
    """
    files.check_output_file(config.output)
    run = load_run(config.run, config.weights)
    name = config.method or run.attention.variant
    method = load_method(name, run.backbone, run.attention, **config.method_config)
    setup = EvaluationSetup(config, run)
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key != "output"}
    settings |= {"inputs": setup.inputs_of(getattr(method, "attention", None))}
    figures = setup.evaluate(method, config.output, settings)
    if figures:
        print(table(figures))
    return figures


class EvaluationSetup:
    """The images, metrics and masking that all methods of a backbone are evaluated with.

    Args:
      options: from the command line.
      run: supplies the defaults of the options.
    """

    def __init__(self, options: EvaluationOptions, run: Run):
        self.options = options
        self.source, self.indices = options.load(run)
        if options.boxes is not None:
            self.source = self._with_boxes(options.boxes)
        self.inputs = image_inputs(run.backbone, self.source, self.indices)
        own = run.backbone.masking
        choice = options.masking or run.config.evaluation_masking or own
        self.masking: Masking = own if choice == "backbone" else choice

    def _with_boxes(self, path: Path) -> BoxedSource:
        source = BoxedSource(self.source, read_boxes(path))
        count = source.count(self.indices)
        if jax.process_index() == 0:
            print(f"{count} of {len(self.indices)} images of {source} have boxes in {path}")
        if not count:
            raise ValueError(f"no image of {source} has a box in {path}: names must be file names")
        return source

    def inputs_of(self, attention: AttentionMechanism | None) -> dict[str, str]:
        """Fingerprints of what a method's figures depend on: weights, images and its attention."""
        return self.inputs | ({"attention": digest(attention)} if attention else {})

    def evaluate(
        self,
        method: Method,
        output: Path,
        settings: Mapping[str, Any],
        indices: Sequence[int] | np.ndarray | None = None,
    ) -> dict:
        """Evaluates a method and writes its figures to `output`.

        Args:
          method: the method.
          output: JSON file for the figures.
          settings: what the figures depend on. Only rows with the same settings are resumed.
          indices: the images to evaluate; by default all of the setup.

        Returns:
          The contents of the file. Empty in all processes but the first.
        """
        with locked(output, folder=False):
            resumable = ResumableRows(output, settings)
            wanted = self.indices if indices is None else indices
            rows, seconds = resumable.collect(self.evaluator(method).batches, wanted)
            if jax.process_index() > 0:
                return {}
            figures = {
                **self.summarise(method, rows),
                "rows": digest_of_rows(rows),
                "seconds_per_image": seconds / len(rows["index"]),
                "settings": settings,
            }
            save_arrays(rows_file(output), **rows)
            write_atomically(output, to_json(seal(figures), indent=2) + "\n")
            resumable.remove()
        return read_figures(output)

    def evaluator(self, method: Method) -> Evaluator:
        """Measures a method on the images of the setup."""
        return Evaluator(
            method,
            self.source,
            masking=self.masking,
            metrics=self.options.measures,
            batch_size=images_per_batch(method, self.options.batch_size, jax.device_count()),
            seed=self.options.seed,
        )

    def summarise(self, method: Method, rows: Rows) -> dict[str, Any]:
        """The figures of a method: means over the rows in %, and their intervals."""
        return {
            "images": len(rows["index"]),
            "method": method.name,
            "backbone": method.backbone.name,
            "masking": self.masking,
            **summarise(rows, self.options.measures),
            "intervals": intervals(rows, self.options.measures),
            "forward_passes": method.forward_passes,
        }


def read_figures(path: Path) -> dict[str, Any]:
    """The figures in a file of `ttame evaluate` or `ttame compare`.

    Raises:
      Damaged: the file holds something else, or not what was written.
    """
    try:
        return _with_nan(check_seal(json.loads(path.read_text())))
    except (ValueError, AttributeError) as error:
        raise Damaged(f"{path} is not a file of figures: {error}") from error


def _with_nan(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures from JSON, which has null in place of NaN. In the settings null is None."""

    def restored(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: restored(item) for key, item in value.items()}
        if isinstance(value, list):
            return [restored(item) for item in value]
        return np.nan if value is None else value

    return {key: x if key == "settings" else restored(x) for key, x in figures.items()}


def rows_file(path: Path) -> Path:
    """The file of the rows of a file of figures: the values of each image."""
    return path.with_name(path.name.removesuffix(".json") + ".npz")


def digest_of_rows(rows: Rows) -> str:
    return files.digest(part for name in sorted(rows) for part in (name, rows[name]))


def read_rows(path: Path) -> Rows:
    """The rows that the figures in a file are means of.

    Raises:
      Damaged: they are others, or one of the files is damaged.
      FileNotFoundError: one of the files does not exist.
    """
    rows = read_arrays(rows_file(path))
    if digest_of_rows(rows) != read_figures(path).get("rows"):
        raise Damaged(f"{rows_file(path)} has other rows than those of {path}")
    return rows


def known_figures(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The figures in a file; empty if it or its rows are missing or damaged, or of other settings."""
    try:
        figures = read_figures(path)
        if "rows" in figures:
            read_rows(path)
    except (Damaged, FileNotFoundError):
        return {}
    return figures if figures.get("settings") == settings else {}


def table(figures: Mapping[str, Any]) -> str:
    """Returns the figures and their intervals as lines of text."""
    head = (
        "{method} on {backbone}, {masking} masking, {images} images, "
        "{seconds_per_image:.2f} s per image"
    )
    return "\n".join([head.format(**figures), *_lines(figures, figures["intervals"])])


def _lines(means: Mapping[str, Any], intervals: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Returns one line per group of means, named by the keys that lead to it."""
    lines = []
    for name, below in intervals.items():
        if isinstance(next(iter(below.values())), Mapping):
            lines += _lines(means[name], below, f"{prefix}{name} ")
        else:
            cells = (
                f"{key}: {mean:.1f} [{below[key][0]:.1f}, {below[key][1]:.1f}]"
                for key, mean in means[name].items()
            )
            lines.append(f"{prefix}{name}  " + "  ".join(cells))
    return lines

"""`ttame sanity`: maps of randomised networks compared with the original ones (Fig. 16).

The sanity check of Adebayo et al., "Sanity Checks for Saliency Maps" (NeurIPS 2018): a map that
explains a classifier must change when the classifier's parameters are randomised, layer by layer
from the logits down to the images. Similarity is measured as they do: by the rank correlation, SSIM
and the correlation of histograms of oriented gradients (HOG).
"""

import dataclasses
import functools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure
from scipy.stats import rankdata

from ttame_jax.backbones.dependencies import layer_parameters
from ttame_jax.data import evaluation_batches, thin
from ttame_jax.errors import Failure
from ttame_jax.experiments.arguments import Names
from ttame_jax.experiments.cost import estimate, is_slow
from ttame_jax.experiments.evaluate import (
    ImageOptions,
    image_inputs,
    known_figures,
    read_figures,
)
from ttame_jax.experiments.resumable import ResumableRows
from ttame_jax.experiments.tables import csv_table
from ttame_jax.files import (
    check_output_folder,
    locked,
    seal,
    to_json,
    write_atomically,
)
from ttame_jax.methods import Method, list_methods, load_method, method_title
from ttame_jax.methods.ttame import TrainedMethod
from ttame_jax.metrics import bootstrap
from ttame_jax.metrics.base import Rows
from ttame_jax.pictures import overlay, resize_map
from ttame_jax.plots import Panel, line_style, picture_grid, save_figure
from ttame_jax.preprocessing import to_float
from ttame_jax.runs import Run, load_run
from ttame_jax.weights import transfer

Explained = Literal["original", "predicted"]
"""The explained class: the one that the original classifier predicts, or the randomised one."""

Part = Literal["backbone", "attention"]
PARTS: dict[Part, str] = {
    "backbone": "randomised backbone, from the logits to the images",
    "attention": "randomised attention mechanism, from the fusion to the earliest branch",
}
"""What is randomised, and the title of its plots."""

MEASURES = {
    "spearman": "rank correlation",
    "ssim": "SSIM",
    "hog": "correlation of HOG",
}
"""The similarities of two maps, and their titles. All are 1 for equal maps."""

HOG_CELLS = 14
"""Cells of histograms along a side: of 16 pixels each at 224 pixels."""
LEAST_CELL = 8
"""Smallest side of a cell in pixels."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SanityConfig(ImageOptions):
    """A run, the methods to check, and the images."""

    run: Path
    """Folder of a T-TAME run."""
    output: Path
    """Folder for the figures, the curves and the pictures."""
    methods: Names | None = None
    """Methods to check. The default is the run's own method and gradcam."""
    explain: Explained = "original"
    """The class to explain: the one that the original classifier predicts, as in Adebayo et al., or
    the one that the randomised classifier predicts."""
    steps: int = 12
    """Largest number of steps of a cascade. If there are more layers, a step randomises several."""
    limit: int | None = 50
    """The largest number of images; they are evenly spaced in the split."""
    pictures: int = 2
    """Number of images in the pictures of maps; 0 disables them."""

    def __post_init__(self):
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"--steps must be at least 1, not {self.steps}")
        if self.pictures < 0:
            raise ValueError(f"--pictures must be at least 0, not {self.pictures}")
        if self.methods == ():
            raise ValueError(f"no method given: --methods takes {', '.join(list_methods())}")


def sanity(config: SanityConfig) -> list[dict]:
    """Compares the maps of randomised networks with the original ones.

    The backbone is randomised for every method, and the attention mechanism for trained methods.
    Writes METHOD_PART.json for each, ``sanity.csv``, ``sanity.png`` and ``.svg`` with the curves,
    and ``maps_PART.png`` and ``.svg``. Figures with the same settings are not computed again, and an
    interrupted command resumes with the images that are left.

    Returns:
      The contents of the JSON files.

    Raises:
      ValueError: a method does not exist or does not apply, or the source has no image of the list.
      FileNotFoundError: the run, the images or the weights are missing.
      Failure: all original maps of a method are constant, or another process writes to the output.
    """
    check_output_folder(config.output)
    import skimage  # noqa: F401  named before any work if it is missing

    check = Check(config)
    with locked(config.output):
        figures = [check.evaluate(cascade) for cascade in check.cascades]
        write_atomically(config.output / "sanity.csv", comma_separated(figures))
        save(draw(figures), config.output / "sanity")
        if config.pictures:
            check.draw_maps()
    print(table(figures))
    return figures


class Cascade(NamedTuple):
    """A method, and what is randomised of it step by step.

    Attributes:
      method: the original one.
      part: what is randomised.
      steps: the last layer that each step randomises, and the dotted paths of all arrays that are
        random after it.
    """

    method: Method
    part: Part
    steps: dict[str, list[str]]

    def states(self, seeds: Sequence[int]) -> Iterator[nnx.State]:
        """The states of the method: the original one, and that after each step."""
        *_, all_paths = self.steps.values()
        flat = {".".join(map(str, p)): (p, x) for p, x in nnx.to_flat_state(nnx.state(self.method))}
        random = {}
        for name in all_paths:
            path, variable = flat[name]
            random[name] = path, variable.replace(permuted(variable.get_value(), name, seeds))
        for changed in ((), *self.steps.values()):
            yield nnx.from_flat_state((flat | {name: random[name] for name in changed}).values())


def permuted(tensor: jax.Array, path: str, seeds: Sequence[int]) -> jax.Array:
    """A tensor with its values in random order, which depends on its path and the seeds.

    This destroys what the tensor has learned, and keeps the distribution of its values. Activations
    therefore stay in their range, and maps do not change merely because they saturate. It needs no
    knowledge of how a tensor was initialised, which an imported classifier does not have. Adebayo et
    al. draw new values from the initialiser, whose scale differs from that after training.
    """
    rng = np.random.default_rng([*seeds, zlib.crc32(path.encode())])
    values = np.asarray(tensor)
    return jnp.asarray(rng.permutation(values.ravel()).reshape(values.shape))


def cascade(method: Method, part: Part, most: int) -> Cascade:
    """The cascade over the layers of a part, from its output to its input.

    Args:
      method: the method.
      part: what is randomised of it.
      most: the largest number of steps.
    """
    layers = _backbone_layers(method) if part == "backbone" else _attention_layers(method)
    names = [*layers][::-1]
    kept = len(names) - 1 - thin(np.arange(len(names)), most)[::-1]  # the last one is among them
    steps = {names[i]: [x for name in names[: i + 1] for x in layers[name]] for i in kept}
    return Cascade(method, part, steps)


def _backbone_layers(method: Method) -> dict[str, list[str]]:
    layers = layer_parameters(method.backbone)
    return {name: [f"backbone.{path}" for path in paths] for name, paths in layers.items()}


def _attention_layers(method: Method) -> dict[str, list[str]]:
    layers: dict[str, list[str]] = {}
    for path in sorted(transfer.parameters(method)):  # branches, earliest first, and fusion
        if path.startswith("attention."):
            _, first, second, *_ = path.split(".")
            name = first if first == "fusion" else f"{first}.{second}"
            layers.setdefault(name, []).append(path)
    return layers


@functools.partial(jax.jit, static_argnums=0)
def _explain(
    graph: nnx.GraphDef[Method], state: nnx.State, image: jax.Array, class_id: jax.Array
) -> jax.Array:
    return nnx.merge(graph, state)(image[None], class_id[None, None])[0, 0]


@functools.partial(jax.jit, static_argnums=0)
def _predict(graph: nnx.GraphDef[Method], state: nnx.State, image: jax.Array) -> jax.Array:
    backbone = nnx.merge(graph, state).backbone
    return backbone(backbone.preprocessing.standardise(image[None]))[0][0].argmax()


def cascade_maps(
    cascade: Cascade, image: np.ndarray, explain: Explained, seeds: Sequence[int]
) -> np.ndarray:
    """The original map of an image, and those after each step.

    Args:
      cascade: what is randomised.
      image: ``[H, W, 3]`` in [0, 1].
      explain: the class to explain.
      seeds: of the randomisation.

    Returns:
      ``[steps + 1, h, w]`` in [0, 1].
    """
    graph, maps, class_id = nnx.graphdef(cascade.method), [], None
    pixels = jnp.asarray(image)
    for state in cascade.states(seeds):
        if class_id is None or explain == "predicted":
            class_id = _predict(graph, state, pixels)
        maps.append(np.asarray(_explain(graph, state, pixels, class_id)))
    return np.stack(maps)


def similarities(one: np.ndarray, other: np.ndarray, size: tuple[int, int]) -> dict[str, float]:
    """How similar two maps are: 1 if they are equal.

    The rank correlation is computed at the maps' own resolution, SSIM and HOG at that of the image.
    A correlation with a constant map, which ranks nothing, is 0.

    Args:
      one: ``[h, w]`` in [0, 1].
      other: a map of the same shape.
      size: height and width of the image.

    Returns:
      The `MEASURES` by name, each at most 1.
    """
    from skimage.feature import hog
    from skimage.metrics import structural_similarity

    if np.array_equal(one, other):
        return dict.fromkeys(MEASURES, 1.0)
    resized = [resize_map(values, size) for values in (one, other)]
    cell = max(min(size) // HOG_CELLS, LEAST_CELL)
    histograms = [hog(values, pixels_per_cell=(cell, cell)) for values in resized]
    return {
        "spearman": _correlation(rankdata(one), rankdata(other)),
        "ssim": float(structural_similarity(*resized, data_range=1, gaussian_weights=True)),
        "hog": _correlation(*histograms),
    }


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's correlation; 0 if one of the arrays is constant."""
    a, b = one - one.mean(), other - other.mean()
    norm = np.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / norm) if norm > 0 else 0.0


class Check:
    """The images and cascades of a sanity check."""

    def __init__(self, config: SanityConfig):
        self.config = config
        self.run: Run = load_run(config.run, config.weights)
        self.source, self.indices = config.load(self.run)
        own = self.run.config.variant
        names = config.methods or dict.fromkeys([own, "gradcam"])
        methods = [
            load_method(name, self.run.backbone, self.run.attention if name == own else None)
            for name in dict.fromkeys(names)
        ]
        self.cascades = [
            cascade(method, part, config.steps)
            for part in PARTS
            for method in methods
            if part == "backbone" or isinstance(method, TrainedMethod)
        ]
        self.inputs = image_inputs(self.run.backbone, self.source, self.indices)
        self.inputs["attention"] = transfer.digest(self.run.attention)

    def evaluate(self, cascade: Cascade) -> dict:
        """The figures of a cascade, from its file if that has the same settings."""
        config, name = self.config, f"{cascade.method.name}_{cascade.part}"
        path = config.output / f"{name}.json"
        settings = {
            "method": cascade.method.name,
            "part": cascade.part,
            "explain": config.explain,
            "steps": [*cascade.steps],
            "seed": config.seed,
            "inputs": self.inputs,
        }
        if figures := known_figures(path, settings):
            return figures
        if is_slow(cascade.method):
            print(estimate(cascade.method, len(self.indices) * (len(cascade.steps) + 1)))
        else:
            print(f"{name}: {len(cascade.steps)} steps, {len(self.indices)} images")
        resumable = ResumableRows(path, settings)
        rows, _ = resumable.collect(functools.partial(self._rows, cascade), self.indices)
        explained = ~np.isnan(rows["spearman"][:, 0])
        if not explained.any():
            raise Failure(f"all maps of {cascade.method.name} are constant: choose other images")
        rows = {name: values[explained] for name, values in rows.items()}
        figures = {
            "method": cascade.method.name,
            "part": cascade.part,
            "steps": [*cascade.steps],
            "images": len(rows["index"]),
            "mean": summarise(rows),
            "intervals": bootstrap(rows, summarise),
            "settings": settings,
        }
        write_atomically(path, to_json(seal(figures), indent=2) + "\n")
        resumable.remove()
        return read_figures(path)

    def _rows(self, cascade: Cascade, indices: np.ndarray, done: int) -> Iterator[Rows]:
        """The similarities of the images ``[1, steps]``, one image at a time.

        Each image has a random network of its own, so that means and intervals are those over
        images and networks. The similarities of an image whose original map is constant, as a map
        of Grad-CAM can be, are NaN.
        """
        explain, seed = self.config.explain, self.config.seed
        preprocessing = self.run.backbone.preprocessing
        for batch in evaluation_batches(
            self.source, preprocessing, 1, indices=indices, before=(done, 0)
        ):
            if not batch["valid"][0]:
                continue
            image, index = to_float(batch["image"][0]), batch["index"]
            original, *after = cascade_maps(cascade, image, explain, [seed, *index.tolist()])
            compared = [similarities(original, one, image.shape[:2]) for one in after]
            columns = {name: np.array([[step[name] for step in compared]]) for name in MEASURES}
            if np.ptp(original) == 0:
                columns = {name: np.full_like(x, np.nan) for name, x in columns.items()}
            yield {"index": index, **columns}

    def draw_maps(self) -> None:
        """Draws the maps of some images, with the random networks that they are evaluated with."""
        chosen = thin(self.indices, self.config.pictures)
        batches = evaluation_batches(
            self.source, self.run.backbone.preprocessing, 1, indices=chosen
        )
        images = {int(b["index"][0]): b["image"][0] for b in batches if b["valid"][0]}
        for part in PARTS if images else ():
            cascades = [cascade for cascade in self.cascades if cascade.part == part]
            if cascades:
                strips = [self._strip(x, i, image) for i, image in images.items() for x in cascades]
                (label, first), *rest = strips
                titles = ["image", "original", *cascades[0].steps]
                titled = [panel._replace(title=title) for panel, title in zip(first, titles)]
                figure = picture_grid([(label, titled), *rest])
                save(figure, self.config.output / f"maps_{part}")

    def _strip(self, cascade: Cascade, index: int, image: np.ndarray) -> tuple[str, list[Panel]]:
        """A strip of Fig. 16: the image, its original map and that after each step."""
        seeds = [self.config.seed, index]
        maps = cascade_maps(cascade, to_float(image), self.config.explain, seeds)
        title = method_title(cascade.method.name)
        return title, [Panel(image), *(Panel(overlay(image, one)) for one in maps)]


def summarise(rows: Rows) -> dict[str, list[float]]:
    """The means over the images after each step."""
    return {name: rows[name].mean(axis=0).tolist() for name in MEASURES}


def comma_separated(figures: Sequence[Mapping[str, Any]]) -> str:
    """One line for each method, part, step and measure."""
    lines = [["method", "part", "step", "measure", "mean", "low", "high"]]
    for one in figures:
        for name in MEASURES:
            means, intervals = one["mean"][name], one["intervals"][name]
            for step, mean, interval in zip(one["steps"], means, intervals, strict=True):
                values = (f"{value:.4f}" for value in (mean, *interval))
                lines.append([one["method"], one["part"], step, name, *values])
    return csv_table(lines)


def table(figures: Sequence[Mapping[str, Any]]) -> str:
    """The similarities after the last step, with 95 % intervals, as lines of text."""
    lines = []
    for one in figures:
        values = (
            f"{name} {one['mean'][name][-1]:.2f} [{low:.2f}, {high:.2f}]"
            for name in MEASURES
            for low, high in [one["intervals"][name][-1]]
        )
        lines.append(f"{method_title(one['method'])}, random {one['part']}: {', '.join(values)}")
    return "\n".join(lines)


def draw(figures: Sequence[Mapping[str, Any]]) -> Figure:
    """The similarities over the steps, with 95 % intervals: a row for each part."""
    parts = [part for part in PARTS if any(one["part"] == part for one in figures)]
    figure = Figure(figsize=(11, 3.6 * len(parts)), layout="constrained")
    grid = figure.subplots(len(parts), len(MEASURES), squeeze=False, sharey=True)
    for axes_row, part in zip(grid, parts):
        lines = [one for one in figures if one["part"] == part]
        steps = ["original", *lines[0]["steps"]]
        for axes, (name, title) in zip(axes_row, MEASURES.items()):
            for i, one in enumerate(lines):
                low, high = np.transpose([[1, 1], *one["intervals"][name]])
                style, label = line_style(i), method_title(one["method"])
                axes.plot([1, *one["mean"][name]], **style, markersize=4, label=label)
                axes.fill_between(range(len(steps)), low, high, color=style["color"], alpha=0.2)
            axes.axhline(0, color="grey", linewidth=0.8)
            axes.set(title=title, xticks=range(len(steps)))
            axes.set_xticklabels(steps, rotation=60, ha="right", fontsize=8, parse_math=False)
            axes.grid(alpha=0.3)
        axes_row[0].set_ylabel(PARTS[part].replace(", ", ",\n"), fontsize=9)
        for text in axes_row[-1].legend(fontsize=8).get_texts():
            text.set_parse_math(False)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Saves a figure as PNG and SVG."""
    for suffix in ("png", "svg"):
        save_figure(figure, path.with_name(f"{path.name}.{suffix}"))

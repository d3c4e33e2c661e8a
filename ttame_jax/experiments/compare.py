"""`ttame compare`: explanation methods side by side on one backbone (Tables II to V, Fig. 15)."""

import dataclasses
import itertools
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from ttame_jax.attention import AttentionMechanism
from ttame_jax.backbones import Backbone
from ttame_jax.config import resolved
from ttame_jax.data import evaluation_batches, thin
from ttame_jax.errors import Failure
from ttame_jax.experiments import tables
from ttame_jax.experiments.arguments import Names
from ttame_jax.experiments.cost import estimate, is_slow
from ttame_jax.experiments.curves import save_curves
from ttame_jax.experiments.evaluate import (
    EvaluationOptions,
    EvaluationSetup,
    MetricNames,
    known_figures,
    read_rows,
)
from ttame_jax.experiments.repeats import Repeats
from ttame_jax.files import (
    below_common,
    check_output_folder,
    locked,
    to_json,
    write_atomically,
)
from ttame_jax.labels import label
from ttame_jax.methods import Method, compute_maps, list_methods, load_method, method_title
from ttame_jax.metrics import list_metrics, load_metrics
from ttame_jax.plots import explanation_grid, save_figure
from ttame_jax.preprocessing import to_float
from ttame_jax.runs import load_class_names, load_run
from ttame_jax.weights.backbones import unmoved
from ttame_jax.weights.transfer import digest

ALL = ("all",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig(EvaluationOptions):
    """The methods to compare, with images and metrics."""

    run: tuple[Path, ...]
    """Folder of a T-TAME run. More runs of the same backbone are compared with it. The method of a run
    is its variant, such as ttame or lcam, or VARIANT-FOLDER if several runs have that variant. Runs
    that differ only in the seed share a column of the tables."""
    output: Path
    """Folder for METHOD.json, the tables, the curves and the picture. Tables and curves of an earlier
    comparison are replaced."""
    methods: Annotated[
        Names, tyro.conf.arg(help=f"Methods to compare, or all: {', '.join(list_methods())}.")
    ] = ALL
    quick: bool = False
    """Whether to leave out methods that need more than 100 forward passes for an image."""
    method_config: dict[str, int | float | str] = dataclasses.field(default_factory=dict)
    """Options of methods, as METHOD.OPTION and value: rise.masks 1000 gradcam.layer blocks.10."""
    limits: dict[str, int] = dataclasses.field(default_factory=dict)
    """Fewer images for slow methods, as METHOD and number: rise 20. These methods are excluded from
    the ranking."""
    measures: MetricNames = ("ad", "ic", "road")
    pictures: int = 6
    """Number of images in the picture of maps; 0 disables it."""

    def __post_init__(self):
        super().__post_init__()
        if not self.run:
            raise ValueError("no run given: ttame compare --run DIR --output DIR")
        if not self.methods:
            raise ValueError(f"no method given: --methods takes {', '.join(list_methods())}")
        if self.pictures < 0:
            raise ValueError(f"--pictures must be at least 0, not {self.pictures}")
        if (fewest := min(self.limits.values(), default=1)) < 1:
            raise ValueError(f"--limits must be at least 1, not {fewest}")


def compare(config: CompareConfig) -> dict[str, dict]:
    """Evaluates methods one after the other and writes their figures side by side.

    Methods that have figures with the same settings are not evaluated again. A method that fails
    is reported, and the others continue.

    Returns:
      ``{method: figures}`` of the evaluated methods.

    Raises:
      ValueError: the runs are of different backbones, or two have the same name.
      Failure: every method fails, or another process writes to the output.
      FileNotFoundError: a run, the images or the weights are missing.
    """
    check_output_folder(config.output)
    comparison = Comparison(config)
    with locked(config.output):
        return _evaluate_and_write(comparison)


def _evaluate_and_write(comparison: "Comparison") -> dict[str, dict]:
    figures, failures = {}, {}
    for name in comparison.names:
        try:
            figures[name] = comparison.evaluate(name)
        except Exception as error:  # noqa: BLE001  the other methods continue
            failures[name] = (str(error) or type(error).__name__).splitlines()[0]
            _say(f"{name} is left out: {failures[name]}")
    if not figures:
        raise Failure("no method could be evaluated: see the lines above")
    if jax.process_index() == 0:
        comparison.write(figures)
    for name, reason in failures.items():
        _say(f"left out: {name} ({reason})")
    return figures


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line)


class Comparison:
    """The backbone, the images and the output of a comparison."""

    def __init__(self, config: CompareConfig):
        self.config = config
        runs = [load_run(run, config.weights) for run in config.run]
        self.backbone: Backbone = runs[0].backbone
        for folder, run in zip(config.run[1:], runs[1:]):
            if different := _different(self.backbone, run.backbone):
                raise ValueError(
                    f"{config.run[0]} and {folder} explain different backbones: {different}"
                )
        self.attentions = _by_name(config.run, [run.attention for run in runs])
        self.configs = dict(zip(self.attentions, (run.config for run in runs)))
        self.setup = EvaluationSetup(config, runs[0])
        self.names = self._names()

    def _names(self) -> list[str]:
        trained = [attention.variant for attention in self.attentions.values()]
        known = self._methods_of([*list_methods(), *trained])
        options = {option.partition(".")[0] for option in self.config.method_config}
        for flag, names in (("--limits", self.config.limits), ("--method-config", options)):
            if unknown := sorted(name for name in names if name not in known):
                raise ValueError(
                    f"{flag} has unknown method {', '.join(unknown)}; there are {', '.join(known)}"
                )
        names = known if self.config.methods == ALL else self._methods_of(self.config.methods)
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"unknown method {', '.join(unknown)}; there are {', '.join(known)}")
        return [name for name in names if not (self.config.quick and self._is_slow(name))]

    def _methods_of(self, names: Iterable[str]) -> list[str]:
        """The methods that names stand for, each once. A variant stands for all of its runs."""
        runs = {one.variant: [] for one in self.attentions.values()}
        for method, attention in self.attentions.items():
            runs[attention.variant].append(method)
        return list(dict.fromkeys(method for name in names for method in runs.get(name, [name])))

    def _is_slow(self, name: str) -> bool:
        try:
            return is_slow(self.method(name))
        except ValueError:  # it does not apply, which is reported when its turn comes
            return False

    def method(self, name: str) -> Method:
        """The method of that name, with its options."""
        options = {
            option.partition(".")[2]: value
            for option, value in self.config.method_config.items()
            if option.partition(".")[0] == name
        }
        attention = self.attentions.get(name)
        kind = attention.variant if attention else name
        method = load_method(kind, self.backbone, attention, **options)
        method.name = name
        return method

    def evaluate(self, name: str) -> dict:
        """The figures of a method, from its file if that has the same settings."""
        path = self.config.output / f"{name}.json"
        settings = self._settings(name)
        if figures := known_figures(path, settings):
            return figures
        method = self.method(name)
        indices = thin(self.setup.indices, self.config.limits.get(name))
        if is_slow(method):
            _say(estimate(method, len(indices)))
        else:
            passes = "pass" if method.forward_passes == 1 else "passes"
            _say(f"{name}: {len(indices)} images, {method.forward_passes} forward {passes} each")
        return self.setup.evaluate(method, path, settings, indices)

    def _settings(self, name: str) -> dict:
        """The settings on which the figures of a method depend, as read back from JSON."""
        settings: dict[str, Any] = dataclasses.asdict(self.config)
        for field in (
            "output",
            "methods",
            "quick",
            "limits",
            "method_config",
            "pictures",
            "batch_size",
        ):
            del settings[field]
        own = {k: v for k, v in self.config.method_config.items() if k.startswith(f"{name}.")}
        settings |= {
            "run": self.config.run[0],
            "method": name,
            "limit_of_method": self.config.limits.get(name),
            "own": own,
            "inputs": self.setup.inputs_of(self.attentions.get(name)),
        }
        return json.loads(to_json(settings))

    def write(self, figures: Mapping[str, dict]) -> None:
        """Tables, differences, curves and the picture."""
        output, shared = self.config.output, self._shared_columns(figures)
        columns: dict[str, Repeats] = {}
        drawn: dict[str, str] = {}  # the first method of each column
        for name, one in figures.items():
            drawn.setdefault(shared[name], name)
            column = columns.setdefault(shared[name], Repeats(metrics=self.config.measures))
            column.add(self._seed(name), one, read_rows(output / f"{name}.json"))
        means = [column.mean() | {"method": name} for name, column in columns.items()]
        replicates = [column.replicates() for column in columns.values()]
        written = tables.comparison_tables(means, replicates)
        _remove_results(output)
        for name, rows in written.items():
            for extension, text in tables.FORMATS.items():
                write_atomically(output / f"table_{name}.{extension}", text(means, rows))
            print(tables.markdown(means, rows))
        if first := shared.get(next(iter(self.attentions))):
            self._write_differences(columns, first)
        if "road" in self.config.measures:
            save_curves({one["method"]: one for one in means}, output)
        if self.config.pictures:
            self._draw(drawn, max((column.images for column in columns.values()), key=len))

    def _seed(self, name: str) -> int:
        """The seed of a method's run; 0 for a method that is not trained."""
        return self.configs[name].seed if name in self.configs else 0

    def _shared_columns(self, names: Iterable[str]) -> dict[str, str]:
        """The column of each method: runs that differ only in the seed and the folder share one."""
        alike = defaultdict(list)
        for name in names:
            config, limit = self.configs.get(name), self.config.limits.get(name)
            own = dataclasses.replace(resolved(config), seed=0, output=Path()) if config else name
            alike[repr((own, limit))].append(name)
        columns = {}
        for group in alike.values():
            seeds = {self._seed(name) for name in group}
            shared = self._column(group) if len(seeds) == len(group) > 1 else None
            columns |= {name: shared or name for name in group}
        return columns

    def _column(self, group: Sequence[str]) -> str:
        """The name of the column of runs: what their names have in common and others do not."""
        variant = self.attentions[group[0]].variant
        if len(self._methods_of([variant])) == len(group):
            return variant
        common = re.sub(r"[-_.]*(seed)?[-_.]*\d*$", "", os.path.commonprefix(list(group)))
        others = (name for name in self.attentions if name not in group)
        return group[0] if any(name.startswith(common) for name in others) else common

    def _write_differences(self, columns: Mapping[str, Repeats], first: str) -> None:
        """The columns minus that of the first run, on the images of both."""
        changes = [
            column.minus(columns[first]) | {"method": name}
            for name, column in columns.items()
            if name != first and np.isin(column.images, columns[first].images).any()
        ]
        if not changes:
            return
        rows, titles = tables.all_rows(changes), tables.titles(changes)
        text = tables.differences([f"minus {method_title(first)}"], [[x] for x in titles], rows)
        write_atomically(self.config.output / "differences.md", text)
        lines = [
            [title, row.title, *(f"{x:.3f}" for x in (row.values[i], *row.intervals[i]))]
            for i, title in enumerate(titles)
            for row in rows
        ]
        head = ["method", "measure", "difference", "low", "high"]
        write_atomically(self.config.output / "differences.csv", tables.csv_table([head, *lines]))
        print(text)

    def _draw(self, names: Mapping[str, str], measured: np.ndarray) -> None:
        """Images in columns, methods in rows. Each map explains the predicted class of its image.

        Args:
          names: the method of each row.
          measured: the indices of the images that were measured, which are readable.
        """
        chosen = thin(measured, self.config.pictures)
        (batch,) = evaluation_batches(
            self.setup.source, self.backbone.preprocessing, len(chosen), indices=chosen
        )
        pictures = batch["image"]
        images = jnp.asarray(to_float(pictures))
        classes = _predicted(self.backbone, images)
        rows = {}
        for row, name in names.items():
            print(f"{name}: maps of {len(images)} images")
            maps = compute_maps(self.method(name), images, classes[:, None])
            rows[method_title(row)] = np.asarray(maps[:, 0])
        class_names = load_class_names(self.config.run[0]) or self.backbone.class_names
        titles = [label(class_id, class_names) for class_id in classes.tolist()]
        path = self.config.output / "maps.png"
        save_figure(explanation_grid(pictures, rows, titles), path)
        print(path)


def _different(one: Backbone, other: Backbone) -> str | None:
    """In what two backbones differ; None if they are the same classifier with the same features."""
    if unmoved(one.name) != unmoved(other.name):
        return f"{one.name} and {other.name}"
    sizes = [dataclasses.replace(b.architecture, class_names=None) for b in (one, other)]
    if sizes[0] != sizes[1] or one.feature_layers != other.feature_layers:
        return f"{one.name} with other options"
    return None if digest(one) == digest(other) else f"{one.name} with other weights"


def _remove_results(output: Path) -> None:
    """Removes the tables, differences and curves of an earlier comparison.

    It may have measured what this one does not.
    """
    names = {"differences", "road", *(f"table_{m.table}" for m in load_metrics(list_metrics()))}
    for name, extension in itertools.product(names, [*tables.FORMATS, "png", "svg"]):
        (output / f"{name}.{extension}").unlink(missing_ok=True)


def _by_name(
    folders: Sequence[Path], attentions: Sequence[AttentionMechanism]
) -> dict[str, AttentionMechanism]:
    """The attention mechanisms of runs by the names of their methods."""
    variants = [attention.variant for attention in attentions]
    names = [
        variant if variants.count(variant) == 1 else f"{variant}-{'_'.join(path.parts)}"
        for variant, path in zip(variants, below_common(folders))
    ]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(
            f"two runs would be named {twice[0]}: give each run once, or rename a folder"
        )
    return dict(zip(names, attentions))


@nnx.jit
def _predicted(backbone: Backbone, images: jax.Array) -> jax.Array:
    return backbone(backbone.preprocessing.standardise(images))[0].argmax(-1)

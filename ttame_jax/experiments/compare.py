"""`ttame compare`: explanation methods side by side on one backbone (Tables II to V, Fig. 15)."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from ttame_jax.attention import AttentionMechanism
from ttame_jax.backbones import Backbone
from ttame_jax.data import evaluation_batches, thin
from ttame_jax.experiments import tables
from ttame_jax.experiments.curves import curves
from ttame_jax.experiments.evaluate import MeasureConfig, Measuring, Names
from ttame_jax.explainer import load_explainer
from ttame_jax.files import write_atomically
from ttame_jax.methods import Method, explain, list_methods, load_method
from ttame_jax.plots import explanation_grid, save_figure
from ttame_jax.training.config import load_config

ALL = ("all",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig(MeasureConfig):
    """Which methods to compare, and on which images."""

    run: tuple[Path, ...]
    """Folder of a T-TAME run. More runs on the same backbone add their variants, such as lcam."""
    output: Path
    """Folder for METHOD.json, the tables, the curves and the picture."""
    methods: Names = ALL
    """Which methods, or all."""
    method_config: dict[str, int | str] = dataclasses.field(default_factory=dict)
    """Options of methods, as METHOD.OPTION and value: rise.masks 1000 gradcam.layer blocks.10."""
    limits: dict[str, int] = dataclasses.field(default_factory=dict)
    """Fewer images for slow methods, as METHOD and number: rise 20. They stand unranked."""
    measures: Names = ("ad", "ic", "road")
    """As of ttame evaluate; the tables need ad, ic and road."""
    pictures: int = 6
    """Images in the picture of maps; 0 draws none."""


def compare(config: CompareConfig) -> dict[str, dict]:
    """Measures methods one after the other and writes what they measure, side by side.

    Methods already measured with the same settings are not measured again; one that fails is
    reported and the rest goes on.

    Returns:
      ``{method: figures}`` of the methods that were measured.

    Raises:
      ValueError: if the runs are of different backbones, or every method fails.
      FileNotFoundError: if a run, the images or the weights are missing.
    """
    comparison = Comparison(config)
    figures, failures = {}, {}
    for name in comparison.names:
        try:
            figures[name] = comparison.measure(name)
        except Exception as error:  # noqa: BLE001, whatever it is, the other methods are not lost
            failures[name] = (str(error) or type(error).__name__).splitlines()[0]
            _say(f"{name} is left out: {failures[name]}")
    if not figures:
        raise ValueError("no method could be measured: see the lines above")
    if jax.process_index() == 0:
        comparison.write(figures)
    for name, reason in failures.items():
        _say(f"left out: {name} ({reason})")
    return figures


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line)


class Comparison:
    """The backbone that the methods explain, the images, and where the results go."""

    def __init__(self, config: CompareConfig):
        self.config = config
        if not config.run:
            raise ValueError("no run given: ttame compare --run DIR --output DIR")
        explainers = [load_explainer(run, config.weights) for run in config.run]
        backbones = {explainer.backbone.name for explainer in explainers}
        if len(backbones) > 1:
            raise ValueError(
                f"the runs explain different backbones: {', '.join(sorted(backbones))}"
            )
        self.backbone: Backbone = explainers[0].backbone
        self.attentions: dict[str, AttentionMechanism] = {
            explainer.attention.variant: explainer.attention for explainer in explainers
        }
        self.measuring = Measuring(config, explainers[0], load_config(config.run[0]))
        self.names = self._names()

    def _names(self) -> list[str]:
        own = [name for name in self.attentions if name not in list_methods()]
        if self.config.methods == ALL:
            return [*list_methods(), *own]
        known = [*list_methods(), *own]
        if unknown := [name for name in self.config.methods if name not in known]:
            raise ValueError(f"unknown method {', '.join(unknown)}; there are {', '.join(known)}")
        return list(self.config.methods)

    def method(self, name: str) -> Method:
        """The method of that name, with its options."""
        options = {
            option.partition(".")[2]: value
            for option, value in self.config.method_config.items()
            if option.partition(".")[0] == name
        }
        return load_method(name, self.backbone, self.attentions.get(name), **options)

    def measure(self, name: str) -> dict:
        """The method's figures: those in its file where that has the same settings."""
        path = self.config.output / f"{name}.json"
        settings = self._settings(name)
        if path.is_file():
            figures = json.loads(path.read_text())
            if figures["settings"] == settings:
                return figures
        method = self.method(name)
        indices = thin(self.measuring.indices, self.config.limits.get(name))
        _say(f"{name}: {len(indices)} images, {method.forward_passes} forward passes each")
        return self.measuring.measure(method, path, settings, indices)

    def _settings(self, name: str) -> dict:
        """What the figures of a method depend on, as JSON gives it back."""
        settings = dataclasses.asdict(self.config)
        for field in ("output", "methods", "limits", "method_config", "pictures", "batch_size"):
            del settings[field]
        own = {k: v for k, v in self.config.method_config.items() if k.startswith(f"{name}.")}
        settings |= {"method": name, "limit_of_method": self.config.limits.get(name), "own": own}
        return json.loads(json.dumps(settings, default=str))

    def write(self, figures: Mapping[str, dict]) -> None:
        """Tables, curves and the picture."""
        output, columns = self.config.output, list(figures.values())
        for kind, rows in (
            ("ad_ic", tables.ad_ic_rows(columns)),
            ("road", tables.road_rows(columns)),
        ):
            for ending, write in tables.FORMATS.items():
                if rows:
                    text = write(columns, rows)
                    write_atomically(output / f"table_{kind}.{ending}", text)
            if rows:
                print(tables.markdown(columns, rows))
        if "road" in self.config.measures:
            curves([output / f"{name}.json" for name in figures], output)
        if self.config.pictures:
            self._draw(list(figures))

    def _draw(self, names: Sequence[str]) -> None:
        """Images in columns, methods in rows; each map explains its image's predicted class."""
        chosen = thin(self.measuring.indices, self.config.pictures)
        batches = evaluation_batches(
            self.measuring.source, self.backbone.preprocessing, len(chosen), indices=chosen
        )
        pictures = next(batches)["image"]
        images = pictures.astype(np.float32) / 255
        classes = np.asarray(_predicted(self.backbone, images))
        rows = {}
        for name in names:
            print(f"{name}: maps of {len(images)} images")
            maps = explain(self.method(name), images, classes[:, None])
            rows[tables.TITLES.get(name, name)] = np.asarray(maps[:, 0])
        titles = [self._class_name(label) for label in classes]
        path = self.config.output / "maps.png"
        save_figure(explanation_grid(pictures, rows, titles), path)
        print(path)

    def _class_name(self, label: int) -> str:
        names = self.measuring.source.class_names
        return names[label] if names and len(names) == self.backbone.num_classes else str(label)


@nnx.jit
def _predicted(backbone: Backbone, images: np.ndarray) -> jax.Array:
    return backbone(backbone.preprocessing.standardise(images))[0].argmax(-1)

"""Training runs over a grid of settings. `ttame ablate` and `ttame lr-find` are uses of it."""

import dataclasses
import difflib
import functools
import itertools
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from etils import epath
from flax import nnx

from ttame_jax.checks import accepts
from ttame_jax.config import CONFIG_FILE, TrainConfig, preset
from ttame_jax.data import load_source
from ttame_jax.experiments.train import train
from ttame_jax.runs import CHECKPOINT_FOLDER, build_attention, load_config
from ttame_jax.training.log import say
from ttame_jax.training.loop import UNRELATED, Diverged, count_steps, settle
from ttame_jax.weights import abstract_backbone, module_files
from ttame_jax.weights.backbones import is_file


class Setting(NamedTuple):
    """Values of fields of a configuration.

    Attributes:
      label: names the setting in tables and folders.
      values: by dotted name of the field, such as ``{"loss.recipe": "reference"}``.
    """

    label: str
    values: Mapping[str, Any]


class Axis(NamedTuple):
    """A dimension of a grid."""

    name: str
    settings: tuple[Setting, ...]


class Trial(NamedTuple):
    """A point of a grid, and its run.

    Attributes:
      labels: of its settings, by name of the axis.
      values: of its settings, by dotted name of the field.
      run: the configuration of its run.
    """

    labels: Mapping[str, str]
    values: Mapping[str, Any]
    run: TrainConfig


def grid(config: TrainConfig, axes: Sequence[Axis]) -> list[Trial]:
    """All combinations of the settings of several axes; the last axis varies fastest.

    The run of a trial is in ``OUTPUT/AXIS_LABEL/AXIS_LABEL``, one folder for each axis.

    Raises:
      ValueError: a value is not allowed, or two trials have the same folder.
    """
    trials = []
    for settings in itertools.product(*(axis.settings for axis in axes)):
        labels = {axis.name: setting.label for axis, setting in zip(axes, settings)}
        values = {name: x for setting in settings for name, x in setting.values.items()}
        folders = [re.sub(r"[^\w.+-]+", "_", f"{name}_{label}") for name, label in labels.items()]
        run = dataclasses.replace(
            _configured(config, values), output=config.output.joinpath(*folders)
        )
        trials.append(Trial(labels, values, run))
    outputs = [trial.run.output for trial in trials]
    if twice := [output for output in outputs if outputs.count(output) > 1]:
        raise ValueError(f"two settings would be trained in {twice[0]}: give each of them once")
    return trials


def field_axis(name: str, words: Sequence[str]) -> Axis:
    """The axis of a field, from the command line.

    Args:
      name: of the field, such as ``learning-rate`` or ``loss.area-exponent``.
      words: its values. If there are none, all choices of a field that has named ones.

    Raises:
      ValueError: there is no such field, it cannot be swept, or cannot have such a value.
    """
    field = name.replace("-", "_")
    hint = _hint(field)
    if field in UNRELATED:
        raise ValueError(f"--over {name}: the results of a run do not depend on it")
    values = [_parsed(word, hint, name) for word in words] if words else _choices(hint)
    if not values:
        raise ValueError(f"--over {name} needs values, as in --over learning-rate 1e-3 2e-3")
    settings = (Setting(str(value), {field: value}) for value in dict.fromkeys(values))
    return Axis(field, tuple(settings))


@functools.cache
def _hints(kind: type = TrainConfig, prefix: str = "") -> dict[str, Any]:
    """The types of all fields of a configuration, by dotted name."""
    hints = {}
    for name, hint in typing.get_type_hints(kind).items():
        nested = dataclasses.is_dataclass(hint)
        hints |= _hints(hint, f"{prefix}{name}.") if nested else {prefix + name: hint}
    return hints


def _hint(field: str) -> Any:
    hints = _hints()
    first, _, option = field.partition(".")
    if option and typing.get_origin(hints.get(first)) is dict:
        return typing.get_args(hints[first])[1]
    if field in hints and typing.get_origin(hints[field]) is not dict:
        return hints[field]
    similar = difflib.get_close_matches(field, hints, n=3, cutoff=0)
    names = ", ".join(one.replace("_", "-") for one in similar)
    raise ValueError(f"--over {field.replace('_', '-')}: no such field; similar ones are {names}")


def _choices(hint: Any) -> list[Any]:
    """The named values of a type."""
    if typing.get_origin(hint) is Literal:
        return list(typing.get_args(hint))
    if hint is bool:
        return [True, False]
    parts = typing.get_args(hint)
    rest = [part for part in parts if part is not type(None)]
    return _choices(rest[0]) if len(rest) == 1 else []


_CONSTANTS = {"None": None, "True": True, "False": False}


def _parsed(word: str, hint: Any, name: str) -> Any:
    """A word of the command line as a value of a type."""
    for read in (_CONSTANTS.__getitem__, int, float, str, Path):
        try:
            value = read(word)
        except (KeyError, ValueError):
            continue
        if accepts(hint, value):
            return value
    choices = ", ".join(map(str, _choices(hint)))
    raise ValueError(
        f"--over {name} cannot be {word!r}"
        + (f"; it can be {choices}" if choices else f": it is of type {_type_name(hint)}")
    )


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _configured(config: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """A configuration with other values of some fields.

    Another backbone comes with its preset, of which only what `config` has changed is changed.
    """
    if "backbone" in values:
        usual, other = preset(config.backbone), preset(values["backbone"])
        fields = [field.name for field in dataclasses.fields(config)]
        given = {x: getattr(config, x) for x in fields if getattr(config, x) != getattr(usual, x)}
        config = dataclasses.replace(other, **given)
    for name, value in values.items():
        config = _replaced(config, name, value)
    return config


def _replaced(config: Any, name: str, value: Any) -> Any:
    first, _, rest = name.partition(".")
    if rest:
        inner = getattr(config, first)
        value = inner | {rest: value} if isinstance(inner, dict) else _replaced(inner, rest, value)
    return dataclasses.replace(config, **{first: value})


Outcome = Literal["finished", "diverged", "stopped"]


def train_each(trials: Sequence[Trial]) -> Iterator[tuple[Trial, Outcome]]:
    """Trains the runs of trials one after the other.

    Finished runs are not trained again, and interrupted ones resume. A run that diverges is
    reported, and the others continue. If the batch size is auto, all runs have that of the first.

    Yields:
      Each trial, its run as it was trained, and what became of it. "stopped", by SIGTERM, is the
      last.

    Raises:
      ValueError: a run cannot be trained (raised before any training).
      FileNotFoundError: images or weights are missing (raised before any training).
    """
    count = functools.cache(_count_images)  # listing a large folder takes seconds

    def steps(run: TrainConfig) -> int | None:
        if run.batch_size == "auto":
            return None
        images = count(run.dataset, run.train_split, run.data_dir, run.max_pixels)
        return run.epochs * count_steps(run, images, run.batch_size)

    runs = [trial.run for trial in trials]
    for run in runs:
        _check(run)
        steps(run)  # raises if there are too few images
    for i, trial in enumerate(trials, start=1):
        run = settle(_with_batch_size(trial.run, runs))
        if not _has_checkpoint(run, steps(run)):
            flags = (f"--{name.replace('_', '-')} {value}" for name, value in trial.values.items())
            say(f"run {i} of {len(trials)}: {' '.join(flags)}")
            try:
                finished = train(run)
            except Diverged as error:
                say(str(error))
                yield trial, "diverged"
                continue
            if not finished:
                say("stopped: the same command resumes the search")
                yield trial, "stopped"
                return
        yield trial._replace(run=load_config(run.output)), "finished"


def _count_images(*arguments) -> int:
    return len(load_source(*arguments))


def _check(run: TrainConfig) -> None:
    """Refuses a run whose settings do not fit together, without loading its weights."""
    settle(run)
    weights = run.weights
    if weights and is_file(weights) and not epath.Path(weights).is_file():
        raise FileNotFoundError(f"no weights file {weights}")
    if module_files.parse(run.backbone):  # its code runs when it is trained
        return
    options: dict[str, Any] = run.backbone_config
    backbone = abstract_backbone(run.backbone, **options)
    nnx.eval_shape(lambda backbone: build_attention(run, backbone), backbone)


def _with_batch_size(run: TrainConfig, runs: Sequence[TrainConfig]) -> TrainConfig:
    """The run with the batch size of all runs: if it is auto, what the first run has chosen."""
    for other in runs if run.batch_size == "auto" else ():
        if other.batch_size == "auto" and (epath.Path(other.output) / CONFIG_FILE).is_file():
            return dataclasses.replace(run, batch_size=load_config(other.output).batch_size)
    return run


def _has_checkpoint(run: TrainConfig, step: int | None) -> bool:
    """Whether a run has the checkpoint of a step."""
    return (epath.Path(run.output) / CHECKPOINT_FOLDER / str(step)).is_dir()

"""The configuration of a run. Every field is a flag of ``ttame train``."""

import dataclasses
import importlib
import importlib.util
import math
import os
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import tyro

from ttame_jax.attention import VariantName
from ttame_jax.data.transforms import MAX_PIXELS
from ttame_jax.files import in_bucket, to_json, write_atomically
from ttame_jax.losses import LossConfig
from ttame_jax.preprocessing import Masking
from ttame_jax.weights.backbones import default_weights, is_file, parts_of

CONFIG_FILE = "config.json"
Precision = Literal["float32", "bfloat16"]
INPUTS = "inputs"
"""Key of ``config.json`` for the fingerprints of what the run reads."""
PRESETS = "ttame_jax.configs"
REFERENCE_BATCH_SIZE = 32
"""The paper's batch size, for which --learning-rate is given."""
Scaling = Literal["none", "sqrt", "linear"]
_EXPONENTS: dict[Scaling, float] = {"none": 0, "sqrt": 0.5, "linear": 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
    """What most runs set."""

    backbone: str
    """Name of the frozen classifier, such as vgg16, resnet50, vit_b16, timm:MODEL, hf:OWNER/NAME,
    FILE.py:FUNCTION for a function of yours that returns one, or a file of ttame convert import."""
    weights: str | None = "torchvision"
    """Weights of the backbone: a .safetensors, .pth, .pt or .ckpt file, torchvision, timm,
    timm:MODEL, or hf for the backbone hf:OWNER/NAME."""
    dataset: str = "imagenet2012"
    """A TFDS data set prepared in --data-dir, folder:DIR, or digits. Labels are not used."""
    epochs: int = 8
    """Passes over the training images."""
    output: Path
    """Folder of the run. Running the same command again resumes it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """The training images."""

    data_dir: str | None = None
    """Folder of the prepared TFDS data sets; None is the default of TFDS."""
    train_split: str = "train"
    """Split to train on, in TFDS's syntax."""
    flip: bool = True
    """Whether to mirror half of the training images."""
    workers: int = 2
    """Worker processes that decode images for each training process; 0 uses threads instead."""
    max_pixels: int = MAX_PIXELS
    """Images with more pixels count as unreadable."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Validation:
    """AD and IC before the first step and after each epoch."""

    validation_split: str = "validation"
    """Split to validate on."""
    validation_images: int = 500
    """Number of images to validate on, evenly spread; 0 disables validation."""
    validation_list: Path | None = None
    """File that names the images to validate on, one FILENAME LABEL per line."""
    evaluation_masking: Masking | None = None
    """How a map masks an image in later evaluations of the run; None is the backbone's default."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """The classifier and its attention mechanism."""

    backbone_config: dict[str, int | str] = dataclasses.field(default_factory=dict)
    """Options of the backbone, as name and value: num_classes 10 features conv."""
    variant: VariantName = "ttame"
    """Architecture of the attention mechanism (Table VI), or lcam."""
    start: Literal["random", "head"] = "random"
    """Initial weights of the fusion: random as in the paper, or those of the classifier's head, so
    that the first maps are the classifier's class activation maps. This needs a head that is linear
    in the mean of the last feature map, such as ResNet's."""
    scale_features: bool = False
    """Whether each feature map is divided by its root mean square, which is measured on the first
    training images. For classifiers whose activations are much larger or smaller than 1."""
    masking: Masking | None = None
    """How a map masks an image: pixel |E*I|, standardised E*|I|; None is the backbone's default."""
    precision: Precision = "float32"
    """Precision of the computation. Parameters and loss are float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimization:
    """Stochastic gradient descent with a one-cycle schedule."""

    batch_size: int | Literal["auto"] = REFERENCE_BATCH_SIZE
    """Images per step, over all devices of all processes. auto is the largest power of two times
    the number of devices that fits into their memory, up to 1024. A resumed run keeps its own."""
    learning_rate: float = 1e-3
    """Peak learning rate of the one-cycle schedule."""
    scale_learning_rate: Scaling = "none"
    """How the peak rate scales with the batch size: not at all, or relative to a batch of 32 with
    its square root or linearly."""
    synchronise: bool = False
    """Whether Psi and BatchNorm use the whole batch, so that results do not depend on the number of
    devices. Otherwise each device uses its own part of the batch, as in the authors' code."""
    seed: int = 0
    """Seed of the initial parameters, the order of the images and their crops."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logging:
    """Logs and checkpoints."""

    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int = 500
    """Steps between checkpoints. Each epoch also ends with one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Logging, Optimization, Model, Validation, Data, Common):
    """The configuration of a run. The defaults are the paper's."""

    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    """The training loss."""

    def __post_init__(self):
        for name in ("epochs", "batch_size", "log_every", "checkpoint_every", "max_pixels"):
            value = getattr(self, name)
            if value != "auto" and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        for name in ("workers", "validation_images"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"{name} must be at least 0, not {value}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be at least 0 and below 2**63, not {self.seed}")
        if not self.dataset:
            raise ValueError("dataset is empty: give a TFDS name, folder:DIR or digits")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive, not {self.learning_rate}")

    def peak_learning_rate(self, batch_size: int) -> float:
        """`learning_rate`, scaled to a batch size by `scale_learning_rate`."""
        larger = batch_size / REFERENCE_BATCH_SIZE
        return self.learning_rate * larger ** _EXPONENTS[self.scale_learning_rate]

    def save(self, folder: Path | None = None, inputs: Mapping[str, str] | None = None) -> None:
        """Writes ``config.json`` into the run's folder, or into the given one.

        It has all weights of the loss, since those of a recipe may change in a later version.

        Args:
          folder: the folder.
          inputs: fingerprints of what the run reads, by name.
        """
        folder = folder or self.output
        saved = dataclasses.replace(relative_to(folder, self), loss=self.loss.resolved())
        fields = dataclasses.asdict(saved) | ({INPUTS: inputs} if inputs else {})
        text = to_json(fields, indent=2) + "\n"
        write_atomically(folder / CONFIG_FILE, text)


FOLDER = "folder:"
"""Prefix of a data set that is a folder of images."""


def relative_to(folder: str | Path, config: TrainConfig) -> TrainConfig:
    """The configuration with relative local paths as seen from the run's folder.

    A run can be moved together with what it reads. Absolute paths stay as they are, and all paths
    become absolute if the run is in a bucket.
    """

    def moved(path: str) -> str:
        if in_bucket(path) or os.path.isabs(path) or not os.path.exists(path):
            return path
        return os.path.abspath(path) if in_bucket(folder) else os.path.relpath(path, folder)

    return _with_paths(config, moved)


def located(folder: str | Path, config: TrainConfig) -> TrainConfig:
    """The inverse of `relative_to`. Paths of earlier versions are relative to the current folder."""

    def found(path: str) -> str:
        if in_bucket(path) or in_bucket(folder) or os.path.isabs(path):
            return path
        there = os.path.normpath(os.path.join(folder, path))
        return there if os.path.exists(there) else path

    return _with_paths(config, found)


def resolved(config: TrainConfig) -> TrainConfig:
    """The configuration with absolute paths and all weights, to be compared with another one."""
    config = dataclasses.replace(config, loss=config.loss.resolved())
    return _with_paths(config, lambda path: path if in_bucket(path) else os.path.abspath(path))


def _with_paths(config: TrainConfig, change: Callable[[str], str]) -> TrainConfig:
    """The configuration with changed paths of its inputs."""
    weights, data_dir, listed = config.weights, config.data_dir, config.validation_list
    folder = config.dataset.removeprefix(FOLDER)
    parts = parts_of(config.backbone)
    return dataclasses.replace(
        config,
        backbone="".join(parts._replace(path=change(parts.path))) if parts else config.backbone,
        weights=change(weights) if weights and is_file(weights) else weights,
        data_dir=change(data_dir) if data_dir else data_dir,
        validation_list=type(listed)(change(os.fspath(listed))) if listed else listed,
        dataset=FOLDER + change(folder) if folder != config.dataset else config.dataset,
    )


def preset(backbone: str) -> TrainConfig:
    """The configuration of that name in ``configs``, or the defaults."""
    if backbone is tyro.MISSING:
        return TrainConfig(backbone=backbone, output=tyro.MISSING)
    parts = parts_of(backbone)
    name = Path(parts.path).stem + parts.rest if parts and not parts.prefix else backbone
    output = Path("runs") / re.sub(r"\W+", "_", name)
    public = backbone.isidentifier() and not backbone.startswith("_")
    if public and importlib.util.find_spec(f"{PRESETS}.{backbone}"):
        return importlib.import_module(f"{PRESETS}.{backbone}").CONFIG
    return TrainConfig(backbone=backbone, output=output, weights=default_weights(backbone))


def command(config: TrainConfig) -> str:
    """The command line of a run: ``ttame train`` and the differences from the backbone's preset."""
    usual = preset(config.backbone)
    weights = dataclasses.replace(usual.loss, recipe=config.loss.recipe).resolved()
    usual = dataclasses.replace(usual, loss=dataclasses.replace(weights, recipe=usual.loss.recipe))
    flags = _flags(dataclasses.replace(config, loss=config.loss.resolved()), usual)
    return shlex.join(["ttame", "train", "--backbone", config.backbone, *flags])


def _flags(config, default, prefix: str = "") -> list[str]:
    words = []
    for field in dataclasses.fields(config):
        value, usual = getattr(config, field.name), getattr(default, field.name)
        name = prefix + field.name.replace("_", "-")
        if value == usual:
            continue
        if dataclasses.is_dataclass(value):
            words += _flags(value, usual, f"{name}.")
        elif isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, dict):
            words += [f"--{name}", *(str(word) for pair in value.items() for word in pair)]
        else:
            words += [f"--{name}", str(value)]
    return words

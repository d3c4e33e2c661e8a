"""What a training run is made of: every field is a flag of ``ttame train``."""

import dataclasses
import importlib
import importlib.util
import json
import math
import shlex
from pathlib import Path
from typing import Literal

import tyro
from etils import epath

from ttame_jax.attention import VariantName
from ttame_jax.files import write_atomically
from ttame_jax.losses import LossConfig
from ttame_jax.masking import MaskingKind

CONFIG_FILE = "config.json"
REFERENCE_BATCH_SIZE = 32
"""The paper's, which --learning-rate is for."""
Scaling = Literal["none", "sqrt", "linear"]
_EXPONENTS: dict[Scaling, float] = {"none": 0, "sqrt": 0.5, "linear": 1}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A run. The defaults are the paper's setting."""

    backbone: str
    """Name of the frozen classifier, such as vgg16, resnet50, vit_b16 or timm:MODEL."""
    output: Path
    """Folder of the run; the same command again resumes it."""
    weights: str | None = "torchvision"
    """Of the backbone: a .safetensors, .pth, .pt or .ckpt file, torchvision, timm or timm:MODEL."""
    backbone_config: dict[str, int | str] = dataclasses.field(default_factory=dict)
    """More about the backbone, as name and value: num_classes 10 features conv."""
    dataset: str = "imagenet2012"
    """A TFDS data set prepared in --data-dir, folder:DIR, or digits. Labels are not used."""
    data_dir: str | None = None
    """Where TFDS keeps its data sets; None is its usual folder."""
    train_split: str = "train"
    """Split to train on, in TFDS's syntax."""
    validation_split: str = "validation"
    """Split to measure on at the end of each epoch."""
    validation_images: int = 500
    """How many of its images (evenly spread); 0 measures nothing."""
    validation_list: Path | None = None
    """Only those of them that this file names, FILENAME LABEL a line."""
    variant: VariantName = "ttame"
    """Architecture of the attention mechanism (Table VI), or lcam."""
    start: Literal["random", "head"] = "random"
    """Of the fusion's weights: random as in the paper, or those of the classifier's head, so that
    the first maps are the classifier's class activation maps (ResNet and SqueezeNet)."""
    masking: MaskingKind | None = None
    """How a map masks an image: pixel |E*I|, standardised E*|I|; None is the backbone's own."""
    evaluation_masking: MaskingKind | None = None
    """The same where the run is evaluated afterwards; None is the backbone's own."""
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    """The training loss."""
    epochs: int = 8
    """Passes over the training images."""
    batch_size: int | Literal["auto"] = REFERENCE_BATCH_SIZE
    """Images a step, over all devices of all processes; auto is the largest power of two times the
    number of devices that fits into their memory, up to 1024 (of a run that exists, its own)."""
    synchronise: bool = False
    """Whether Psi and BatchNorm are those of the whole batch, so that the number of devices changes
    nothing; otherwise each device takes its part of the batch by itself, as in the authors' code."""
    learning_rate: float = 1e-3
    """Peak of the one-cycle schedule."""
    scale_learning_rate: Scaling = "none"
    """Whether that is the peak as it is, or for a batch of 32: others then have it times
    (batch size / 32), or times the square root of that."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; parameters and loss are float32."""
    seed: int = 0
    """Of the initial parameters, the order of the images and their crops."""
    flip: bool = True
    """Whether to mirror half of the training images."""
    workers: int = 2
    """Processes that read and decode images for each training process; 0 does it in that one."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int = 500
    """Steps between checkpoints, besides those at the end of each epoch."""

    def __post_init__(self):
        for name in ("epochs", "batch_size", "log_every", "checkpoint_every"):
            value = getattr(self, name)
            if value != "auto" and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be above 0, not {self.learning_rate}")

    @property
    def peak_learning_rate(self) -> float:
        """`learning_rate` for this batch size, by the rule of `scale_learning_rate`."""
        larger = self.batch_size / REFERENCE_BATCH_SIZE
        return self.learning_rate * larger ** _EXPONENTS[self.scale_learning_rate]

    def save(self, folder: Path | None = None) -> None:
        """Writes ``config.json`` into the run's folder, or into one that will become it."""
        text = json.dumps(dataclasses.asdict(self), indent=2, default=str) + "\n"
        write_atomically((folder or self.output) / CONFIG_FILE, text)


def load_config(run_dir: str | Path) -> TrainConfig:
    """Reads the configuration of a run.

    Raises:
      FileNotFoundError: if the folder holds none.
    """
    path = epath.Path(run_dir) / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{run_dir} is no run: {CONFIG_FILE} is missing; make one with ttame train"
        )
    fields = json.loads(path.read_text())
    fields["output"] = epath.Path(run_dir)
    fields["loss"] = LossConfig(**fields["loss"])
    if fields.get("validation_list") is not None:
        fields["validation_list"] = epath.Path(fields["validation_list"])
    return TrainConfig(**fields)


def preset(backbone: str) -> TrainConfig:
    """The configuration in ``configs/`` of that name, else the defaults."""
    if backbone is tyro.MISSING:
        return TrainConfig(backbone=backbone, output=tyro.MISSING)
    output = Path("runs") / backbone.replace(":", "_")
    if backbone.startswith("timm:"):
        return TrainConfig(backbone=backbone, output=output, weights="timm")
    if backbone.isidentifier() and importlib.util.find_spec(f"configs.{backbone}"):
        return importlib.import_module(f"configs.{backbone}").CONFIG
    return TrainConfig(backbone=backbone, output=output)


def command(config: TrainConfig) -> str:
    """The command line of a run: ``ttame train`` and what differs from the backbone's preset."""
    flags = _flags(config, preset(config.backbone))
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

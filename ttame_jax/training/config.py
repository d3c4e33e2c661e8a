"""What a training run is made of: every field is a flag of ``ttame train``."""

import dataclasses
import importlib
import importlib.util
import json
from pathlib import Path
from typing import Literal

import tyro
from etils import epath

from ttame_jax.attention import VariantName
from ttame_jax.files import write_atomically
from ttame_jax.losses import LossConfig
from ttame_jax.masking import MaskingKind

CONFIG_FILE = "config.json"


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
    batch_size: int = 32
    """Images a step, over all devices of all processes."""
    synchronise: bool = False
    """Whether Psi and BatchNorm are those of the whole batch, so that the number of devices changes
    nothing; otherwise each device takes its part of the batch by itself, as in the authors' code."""
    learning_rate: float = 1e-3
    """Peak of the one-cycle schedule."""
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
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0, not {self.learning_rate}")

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

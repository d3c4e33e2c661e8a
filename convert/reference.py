"""Checkpoints of the authors' PyTorch code (IDT-ITI/T-TAME), to and from runs.

Such a `.ckpt` is a Lightning checkpoint: `state_dict` has the backbone under `generic.body.` and
the attention under `generic.attn_mech.` (`generic.attn_mech.1.` for a ViT); `hyper_parameters`
say what it was trained with.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from ttame_jax.attention import VARIANTS, AttentionMechanism
from ttame_jax.backbones import Backbone, load_backbone, save_backbone
from ttame_jax.losses import LossConfig
from ttame_jax.masking import MaskingKind
from ttame_jax.training.checkpoints import save_attention
from ttame_jax.training.config import TrainConfig
from ttame_jax.training.models import build_attention

from .files import (
    Tensors,
    checked_state,
    numpy_state,
    read_safetensors,
    read_torch,
    torch_state,
    whole_folder,
)
from .layouts import attention_table
from .modules import reference_nodes
from .pretrained import TORCHVISION
from .weights import BODY, complete, export, fill, to_flax, to_torch

ATTENTION = "generic.attn_mech."
COUNTER = "num_batches_tracked"

VERSIONS = {
    "TAME": "ttame",
    "TTAME": "ttame",
    "Noskipconnection": "no_skip_reference",
    "NoskipNobatchnorm": "no_skip_no_batch_norm",
    "Sigmoidinfeaturebranch": "sigmoid",
    "lcam": "lcam",
}
"""Our name of an `attention_version`; fewer layers make two_layers and one_layer of TAME."""

VERSIONS_BY_VARIANT = {variant: version for version, variant in reversed(VERSIONS.items())}
VERSIONS_BY_VARIANT |= {"two_layers": "TAME", "one_layer": "TAME"}

FEATURES = {"VGG": ("pool", "conv"), "ViT": ("norm", "block")}

MASKING: dict[str, MaskingKind] = {
    "new": "standardised",
    "renormalize": "pixel",
    "raw_normalize": "pixel",
}
"""How a `train_method` masks."""

BACKBONE_FILE = "backbone.safetensors"


@dataclasses.dataclass(frozen=True)
class Reference:
    """What a checkpoint holds: the attention's tensors without prefix, the backbone's with."""

    path: Path
    attention: Tensors
    body: Tensors
    hyper_parameters: dict[str, Any]
    step: int


def read_reference(path: Path) -> Reference:
    """Reads a `.ckpt` of the authors' code, or a `.safetensors` that `to-torch` wrote.

    Raises:
      ValueError: it is no such file; the line says what is missing.
      FileNotFoundError: it is not there.
      ImportError: PyTorch is not installed (for a .ckpt).
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    if path.suffix == ".safetensors":
        state, metadata = read_safetensors(path)
        content = {"hyper_parameters": json.loads(metadata.get("hyper_parameters", "null"))}
    else:
        content = read_torch(path)
        if not isinstance(content, dict):
            raise ValueError(f"{path} is no Lightning checkpoint: it holds no dict")
        state = numpy_state(checked_state(content.get("state_dict"), path))
    attention = {
        key.partition(ATTENTION)[2].removeprefix("1."): value
        for key, value in state.items()
        if ATTENTION in key
    }
    if not attention:
        raise ValueError(f"{path} is no checkpoint of the authors' code: it has no {ATTENTION}*")
    hyper_parameters = content.get("hyper_parameters")
    if not isinstance(hyper_parameters, dict) or "model_name" not in hyper_parameters:
        raise ValueError(f"{path} has no hyper_parameters with a model_name: it names no backbone")
    body = {key: value for key, value in state.items() if key.startswith(BODY)}
    counters = [int(value) for key, value in attention.items() if key.endswith(COUNTER)]
    step = max(counters, default=content.get("global_step", 0))
    return Reference(path, attention, body, hyper_parameters, step)


def from_reference(path: Path, output: Path, weights: str = "torchvision") -> TrainConfig:
    """Makes a run of a checkpoint of the authors' code.

    Args:
      path: the checkpoint.
      output: the run's folder, made here.
      weights: the backbone's, as `load_backbone` takes them; or "checkpoint", the backbone that
        the checkpoint holds (its BatchNorm statistics drifted during training).

    Returns:
      the run's configuration.

    Raises:
      ValueError: naming what does not fit.
    """
    reference = read_reference(path)
    config = run_config(reference, output, weights)
    backbone = _abstract_backbone(config)
    attention = nnx.eval_shape(lambda: build_attention(config, backbone))
    misfit = f"{path} does not fit {config.variant} on {config.backbone}"
    tensors = complete(attention, attention_table(attention), reference.attention, misfit)
    fill(attention, tensors)
    with whole_folder(output) as folder:
        if weights == "checkpoint":
            if not reference.body:
                raise ValueError(f"{path} holds no backbone ({BODY}*): choose other weights")
            fill(backbone, to_flax(backbone, reference.body, str(path)))
            save_backbone(backbone, folder / BACKBONE_FILE)
            config = dataclasses.replace(config, weights=str(output / BACKBONE_FILE))
        save_attention(folder, attention, reference.step)
        config.save(folder)
    return config


def run_config(reference: Reference, output: Path, weights: str) -> TrainConfig:
    """The authors' settings as a run's configuration.

    Raises:
      ValueError: naming a hyper-parameter that has no counterpart here.
    """
    given = reference.hyper_parameters
    names = {theirs: ours for ours, theirs in TORCHVISION.items()}
    model = _known(reference, "model_name", names)
    backbone_config: dict[str, int | str] = {}
    classes = len(next(v for k, v in reference.attention.items() if k in _LAST))
    if classes != 1000:
        backbone_config["num_classes"] = classes
    features, count = _layers(reference, model, backbone_config)
    if features is not None:
        backbone_config["features"] = features
    return TrainConfig(
        backbone=model,
        output=output,
        weights=weights,
        backbone_config=backbone_config,
        variant=_variant(reference, model, count),
        masking=_known(reference, "train_method", MASKING, "new"),
        evaluation_masking="pixel",
        loss=LossConfig(recipe="reference"),
        epochs=given.get("epochs", 8),
        learning_rate=given.get("lr", 1e-3),
    )


_LAST = ("fuser.bias", "op.bias")


def _known(reference: Reference, name: str, table: dict[str, Any], default: str = "") -> Any:
    value = reference.hyper_parameters.get(name, default)
    if not isinstance(value, str) or value not in table:
        raise ValueError(
            f"{reference.path} has {name} {value!r}, which is not supported; "
            f"there are {', '.join(table)}"
        )
    return table[value]


def _layers(reference: Reference, model: str, config: dict) -> tuple[str | None, int]:
    """The backbone's option `features` and the number of feature maps, from `layers`."""
    layers = reference.hyper_parameters.get("layers")
    known = []
    family = type(_abstract(model, config)).__name__
    for features in FEATURES.get(family, (None,)):
        nodes = reference_nodes(_abstract(model, {**config, "features": features}))
        if isinstance(layers, list) and layers and layers == nodes[-len(layers) :]:
            return features, len(layers)
        known.append(", ".join(nodes))
    raise ValueError(
        f"{reference.path} reads layers {layers}; of {model} the last of these are supported: "
        + "; or ".join(known)
    )


def _variant(reference: Reference, model: str, layers: int) -> str:
    version = reference.hyper_parameters.get("attention_version", "TAME")
    if version == "TTAME" and model.startswith("vit"):
        raise ValueError(
            f"{reference.path} is of attention_version 'TTAME', which is not supported for a ViT: "
            "it multiplies the patch tokens by the class token"
        )
    variant = _known(reference, "attention_version", VERSIONS, "TAME")
    if variant == "ttame":
        variant = {1: "one_layer", 2: "two_layers"}.get(layers, variant)
    needed = VARIANTS[variant].layers or 3
    if layers != needed:
        raise ValueError(
            f"{reference.path} has {layers} layers; attention_version {version!r} is supported "
            f"with {needed}"
        )
    return variant


def obstacle(config: TrainConfig, backbone: Backbone) -> str | None:
    """Why the authors' code could not load this run, or None: then a `.ckpt` can be written."""
    model = TORCHVISION.get(backbone.name)
    if model is None:
        return f"torchvision has no {backbone.name}"
    if type(backbone).__name__ == "ViT" and model != "vit_b_16":
        return f"of the ViTs it knows vit_b_16 alone, not {model}"
    if config.variant not in VERSIONS_BY_VARIANT:
        return f"it has no variant {config.variant}"
    if backbone.num_classes != 1000 or backbone.preprocessing.image_size != 224:
        return "it takes 1000 classes and 224x224 pixels"
    return None


def reference_hyper_parameters(config: TrainConfig, backbone: Backbone) -> dict[str, Any]:
    """What the authors' code saves of a run's settings."""
    variant = VARIANTS[config.variant]
    nodes = reference_nodes(backbone)
    masking = config.masking or backbone.masking
    train_method = "raw_normalize" if masking == "pixel" else "new"
    return {
        "model_name": TORCHVISION.get(backbone.name, backbone.name),
        "layers": nodes[-(variant.layers or len(nodes)) :],
        "attention_version": VERSIONS_BY_VARIANT.get(config.variant, config.variant),
        "train_method": train_method,
        "normalized_data": train_method != "raw_normalize",
        "epochs": config.epochs,
        "lr": config.learning_rate,
        "num_classes": backbone.num_classes,
        "img_size": backbone.preprocessing.image_size,
    }


def reference_attention(backbone: Backbone, attention: AttentionMechanism, step: int) -> Tensors:
    """The attention's state dict under the authors' names, after so many training steps."""
    prefix = ATTENTION + ("1." if type(backbone).__name__ == "ViT" else "")
    state = export(attention, attention_table(attention))
    counters = {key: np.asarray(step, np.int64) for key in state if key.endswith(COUNTER)}
    return {prefix + key: value for key, value in (state | counters).items()}


def lightning_checkpoint(
    hyper_parameters: dict[str, Any], backbone: Backbone, attention: Tensors, step: int
) -> dict[str, Any]:
    """What `torch.save` writes for `load_from_checkpoint` of the authors' code."""
    body = torch_state(to_torch(backbone, "torchvision"))
    state = {BODY + key: tensor for key, tensor in body.items()} | torch_state(attention)
    # Their training policy is a module that holds the backbone too; files hold it once.
    state |= {f"generic.arrangement.body.{key}": tensor for key, tensor in body.items()}
    return {
        "epoch": hyper_parameters["epochs"],
        "global_step": step,
        "pytorch-lightning_version": "2.1.2",
        "hparams_name": "kwargs",
        "hyper_parameters": hyper_parameters,
        "state_dict": state,
    }


def _abstract(model: str, config: dict[str, Any]) -> Backbone:
    return nnx.eval_shape(lambda: load_backbone(model, **config))


def _abstract_backbone(config: TrainConfig) -> Backbone:
    return _abstract(config.backbone, config.backbone_config)

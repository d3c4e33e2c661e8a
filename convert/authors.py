"""Import and export of checkpoints of the authors' PyTorch code (IDT-ITI/T-TAME).

Such a `.ckpt` is a Lightning checkpoint. Its `state_dict` has the backbone under `generic.body.`
and the attention mechanism under `generic.attn_mech.` (`generic.attn_mech.1.` for a ViT). Its
`hyper_parameters` are the settings of the training.
"""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from ttame_jax.attention import VARIANTS, AttentionMechanism
from ttame_jax.backbones import FAMILIES, Backbone, family_of
from ttame_jax.backbones.tensors import LINEAR_AS_CONV, Table, batch_norm, weights
from ttame_jax.checks import accepts
from ttame_jax.config import TrainConfig
from ttame_jax.files import Tensors, new_folder, read_safetensors
from ttame_jax.losses import RECIPES, LossConfig
from ttame_jax.preprocessing import Masking
from ttame_jax.runs import build_attention, load_config, save_attention
from ttame_jax.weights import abstract_backbone, save_backbone
from ttame_jax.weights.backbones import published
from ttame_jax.weights.transfer import BODY, complete, export, fill, to_flax, to_torch

from .pytorch.checkpoints import checked_state, numpy_state, read_torch, torch_state

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
"""Our variant of an `attention_version`. TAME with fewer layers is two_layers or one_layer."""

VERSIONS_BY_VARIANT = {variant: version for version, variant in reversed(VERSIONS.items())}
VERSIONS_BY_VARIANT |= {"two_layers": "TAME", "one_layer": "TAME"}

MASKING: dict[str, Masking] = {
    "new": "standardised",
    "renormalize": "pixel",
    "raw_normalize": "pixel",
}
"""The masking of a `train_method`."""

BACKBONE_FILE = "backbone.safetensors"

REFERENCE = "reference"
"""The loss recipe of the authors' code."""

LOSS_RECIPE = "loss_recipe"
"""The metadata of a `.safetensors` that `to-torch` wrote: what the authors' code does not have."""


def attention_table(attention: AttentionMechanism) -> Table:
    """The tensors of the attention mechanism in the authors' code, without their prefix.

    Its BatchNorms count the training steps, which a run knows by itself.
    """
    if not attention.branches:
        return weights("op", "fusion", LINEAR_AS_CONV)
    table = []
    for i, branch in enumerate(attention.branches):
        table += weights(f"convs.{i}", f"branches.{i}.conv", LINEAR_AS_CONV)
        if branch.norm is not None:
            *norm, count = batch_norm(f"bns.{i}", f"branches.{i}.norm")
            table += [*norm, count._replace(flax_path=None)]
    return table + weights("fuser", "fusion", LINEAR_AS_CONV)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint: the attention's tensors without prefix, the backbone's with.

    The loss recipe is that of the authors' code, except in a file that `to-torch` wrote.
    """

    path: Path
    attention: Tensors
    body: Tensors
    hyper_parameters: dict[str, Any]
    step: int
    recipe: str = REFERENCE


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a `.ckpt` of the authors' code, or a `.safetensors` that `to-torch` wrote.

    Raises:
      ValueError: it is not such a file; the message says what is missing.
      FileNotFoundError: it does not exist.
      ImportError: PyTorch is not installed (for a .ckpt).
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    if path.suffix == ".safetensors":
        state, metadata = read_safetensors(path)
        content = {"hyper_parameters": json.loads(metadata.get("hyper_parameters", "null"))}
        recipe = metadata.get(LOSS_RECIPE, REFERENCE)
        if recipe not in RECIPES:
            known = ", ".join(RECIPES)
            raise ValueError(f"{path} has {LOSS_RECIPE} {recipe!r}; there are {known}")
    else:
        content = read_torch(path)
        if not isinstance(content, dict):
            raise ValueError(f"{path} is not a Lightning checkpoint: it holds no dict")
        state = numpy_state(checked_state(content.get("state_dict"), path))
        recipe = REFERENCE
    attention = {
        key.partition(ATTENTION)[2].removeprefix("1."): value
        for key, value in state.items()
        if ATTENTION in key
    }
    if not attention:
        raise ValueError(f"{path} is not a checkpoint of the authors' code: it has no {ATTENTION}*")
    hyper_parameters = content.get("hyper_parameters")
    if not isinstance(hyper_parameters, dict) or "model_name" not in hyper_parameters:
        raise ValueError(
            f"{path} has no hyper_parameters with a model_name, so its backbone is unknown"
        )
    body = {key: value for key, value in state.items() if key.startswith(BODY)}
    counters = [int(value) for key, value in attention.items() if key.endswith(COUNTER)]
    step = max(counters, default=content.get("global_step", 0))
    return Checkpoint(path, attention, body, hyper_parameters, step, recipe)


def from_reference(path: Path, output: Path, weights: str = "torchvision") -> TrainConfig:
    """Converts a checkpoint of the authors' code to a run.

    Args:
      path: the checkpoint.
      output: the run's folder, created here.
      weights: of the backbone, as for `load_backbone`, or "checkpoint" for those in the
        checkpoint (whose BatchNorm statistics drifted during training).

    Returns:
      The run's configuration.

    Raises:
      ValueError: the checkpoint does not fit; the message says why.
    """
    checkpoint = read_checkpoint(path)
    config = run_config(checkpoint, output, weights)
    backbone = abstract_backbone(config.backbone, **config.backbone_config)
    attention = nnx.eval_shape(lambda: build_attention(config, backbone))
    misfit = f"{path} does not fit {config.variant} on {config.backbone}"
    tensors = complete(attention, attention_table(attention), checkpoint.attention, misfit)
    fill(attention, tensors)
    with new_folder(output) as folder:
        if weights == "checkpoint":
            if not checkpoint.body:
                raise ValueError(f"{path} holds no backbone ({BODY}*): choose other weights")
            fill(backbone, to_flax(backbone, checkpoint.body, str(path)))
            save_backbone(backbone, folder / BACKBONE_FILE)
            # A path that exists is saved as seen from the folder, with which the file then moves.
            config = dataclasses.replace(config, weights=os.path.relpath(folder / BACKBONE_FILE))
        save_attention(folder, attention, checkpoint.step, config)
        config.save(folder)
    return load_config(output)


def run_config(checkpoint: Checkpoint, output: Path, weights: str) -> TrainConfig:
    """The authors' settings as a run's configuration.

    Raises:
      ValueError: a hyper-parameter has no counterpart here; the message names it.
    """
    names = {
        theirs: ours
        for family in FAMILIES
        if family.authors
        for ours, theirs in family.libraries["torchvision"].models.items()
    }
    model = _known(checkpoint, "model_name", names)
    backbone_config: dict[str, int | str] = {}
    classes = next((len(v) for k, v in checkpoint.attention.items() if k in _LAST), 0)
    if not classes:
        raise ValueError(f"{checkpoint.path} lacks {' or '.join(_LAST)} of the attention mechanism")
    if classes != 1000:
        backbone_config["num_classes"] = classes
    features, count = _layers(checkpoint, model, backbone_config)
    if features is not None:
        backbone_config["features"] = features
    return TrainConfig(
        backbone=model,
        output=output,
        weights=weights,
        backbone_config=backbone_config,
        variant=_variant(checkpoint, model, count),
        masking=_known(checkpoint, "train_method", MASKING, "new"),
        evaluation_masking="pixel",
        loss=LossConfig(recipe=checkpoint.recipe),
        epochs=_number(checkpoint, "epochs", int, 8),
        learning_rate=_number(checkpoint, "lr", float, 1e-3),
    )


_LAST = ("fuser.bias", "op.bias")


def _known(checkpoint: Checkpoint, name: str, table: dict[str, Any], default: str = "") -> Any:
    value = checkpoint.hyper_parameters.get(name, default)
    if not isinstance(value, str) or value not in table:
        raise ValueError(
            f"{checkpoint.path} has {name} {value!r}, which is not supported; "
            f"there are {', '.join(table)}"
        )
    return table[value]


def _number(checkpoint: Checkpoint, name: str, kind: type, default: float) -> Any:
    value = checkpoint.hyper_parameters.get(name, default)
    if not accepts(kind, value) or not 0 < value < math.inf:
        raise ValueError(
            f"{checkpoint.path} has {name} {value!r}, which is no positive {kind.__name__}"
        )
    return value


def _layers(checkpoint: Checkpoint, model: str, config: dict) -> tuple[str | None, int]:
    """The backbone's option `features` and the number of feature maps, from `layers`."""
    layers = checkpoint.hyper_parameters.get("layers")
    known = []
    for features in type(abstract_backbone(model, **config)).feature_kinds or (None,):
        nodes = authors_nodes(abstract_backbone(model, **config, features=features))
        if isinstance(layers, list) and layers and layers == nodes[-len(layers) :]:
            return features, len(layers)
        known.append(", ".join(nodes))
    raise ValueError(
        f"{checkpoint.path} reads layers {layers}; of {model} the last of these are supported: "
        + "; or ".join(known)
    )


def _variant(checkpoint: Checkpoint, model: str, layers: int) -> str:
    version = checkpoint.hyper_parameters.get("attention_version", "TAME")
    if version == "TTAME" and model.startswith("vit"):
        raise ValueError(
            f"{checkpoint.path} is of attention_version 'TTAME', which is not supported for a ViT: "
            "it multiplies the patch tokens by the class token"
        )
    variant = _known(checkpoint, "attention_version", VERSIONS, "TAME")
    if variant == "ttame":
        variant = {1: "one_layer", 2: "two_layers"}.get(layers, variant)
    needed = VARIANTS[variant].layers or 3
    if layers != needed:
        raise ValueError(
            f"{checkpoint.path} has {layers} layers; attention_version {version!r} is supported "
            f"with {needed}"
        )
    return variant


def obstacle(config: TrainConfig, backbone: Backbone) -> str | None:
    """Why the authors' code cannot load this run; None if it can."""
    family = family_of(backbone)
    model = published("torchvision").get(backbone.name)
    if model is None or family.authors is None:
        return f"torchvision has no {backbone.name}"
    if family.authors.models is not None and model not in family.authors.models:
        known = ", ".join(family.authors.models)
        return f"of the {family.backbone.__name__}s it has only {known}, not {model}"
    if config.variant not in VERSIONS_BY_VARIANT:
        return f"it has no variant {config.variant}"
    if RECIPES[config.loss.recipe].scaled:
        return f"it scales maps without a sigmoid, unlike the loss recipe {config.loss.recipe}"
    if backbone.num_classes != 1000 or backbone.preprocessing.image_size != 224:
        return "it takes 1000 classes and 224x224 pixels"
    return None


def authors_nodes(backbone: Backbone) -> list[str]:
    """Names of the feature maps in the authors' code; none for a family that it does not have."""
    authors = family_of(backbone).authors
    return authors.nodes(backbone) if authors else []


def hyper_parameters(config: TrainConfig, backbone: Backbone) -> dict[str, Any]:
    """The settings of a run as the authors' code saves them."""
    variant = VARIANTS[config.variant]
    nodes = authors_nodes(backbone)
    masking = config.masking or backbone.masking
    train_method = "raw_normalize" if masking == "pixel" else "new"
    return {
        "model_name": published("torchvision").get(backbone.name, backbone.name),
        "layers": nodes[-(variant.layers or len(nodes)) :],
        "attention_version": VERSIONS_BY_VARIANT.get(config.variant, config.variant),
        "train_method": train_method,
        "normalized_data": train_method != "raw_normalize",
        "epochs": config.epochs,
        "lr": config.learning_rate,
        "num_classes": backbone.num_classes,
        "img_size": backbone.preprocessing.image_size,
    }


def attention_state(backbone: Backbone, attention: AttentionMechanism, step: int) -> Tensors:
    """The attention's state dict under the authors' names, after `step` training steps."""
    authors = family_of(backbone).authors
    prefix = ATTENTION + (authors.prefix if authors else "")
    state = export(attention, attention_table(attention))
    counters = {key: np.asarray(step, np.int64) for key in state if key.endswith(COUNTER)}
    return {prefix + key: value for key, value in (state | counters).items()}


def lightning_checkpoint(
    hyper_parameters: dict[str, Any], backbone: Backbone, attention: Tensors, step: int
) -> dict[str, Any]:
    """The content of a checkpoint for `load_from_checkpoint` of the authors' code."""
    body = torch_state(to_torch(backbone, "torchvision"))
    state = {BODY + key: tensor for key, tensor in body.items()} | torch_state(attention)
    # Their training policy is a module that also holds the backbone. torch.save stores it once.
    state |= {f"generic.arrangement.body.{key}": tensor for key, tensor in body.items()}
    return {
        "epoch": hyper_parameters["epochs"],
        "global_step": step,
        "pytorch-lightning_version": "2.1.2",
        "hparams_name": "kwargs",
        "hyper_parameters": hyper_parameters,
        "state_dict": state,
    }

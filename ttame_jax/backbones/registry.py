"""Backbones by name, with or without weights."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from convert import files, pretrained, timm_models
from convert import weights as convert_weights

from . import resnet, squeezenet, vgg, vit
from .base import Backbone, Preprocessing

FORMAT = "ttame_jax"  # names our own layout in a safetensors file's metadata

_FAMILIES: dict[str, type[Backbone]] = {
    name: family
    for family, variants in (
        (vgg.VGG, vgg.VARIANTS),
        (resnet.ResNet, resnet.VARIANTS),
        (vit.ViT, vit.VARIANTS),
        (squeezenet.SqueezeNet, squeezenet.VARIANTS),
    )
    for name in variants
}


TIMM = "timm:"
"""Before the name of a model whose architecture timm gives."""

_ARCHITECTURES = {
    "VGG": (vgg.VGG, vgg.Variant),
    "ResNet": (resnet.ResNet, resnet.Variant),
    "ViT": (vit.ViT, vit.Variant),
}


def list_backbones() -> list[str]:
    """All names that `load_backbone` knows, besides "timm:MODEL"."""
    return list(_FAMILIES)


def load_backbone(
    name: str, weights: str | Path | None = None, *, seed: int = 0, **config: Any
) -> Backbone:
    """A frozen classifier.

    Args:
      name: one of `list_backbones()`, or "timm:MODEL" for a VGG, ResNet or plain ViT of timm's
        (timm tells the architecture, unless `weights` is a file of our own).
      weights: a file (`.safetensors`, `.pth`, `.pt`, `.ckpt`, in torchvision's, timm's or our
        own layout); "torchvision" (its IMAGENET1K_V1 weights); "timm" (its default weights) or
        "timm:MODEL"; None for random initialisation from `seed`.
      **config: num_classes, image_size, dtype (of computation and feature maps; "bfloat16"),
        preprocessing; features ("pool" or "conv" for VGG, "block" or "norm" for ViT); for the
        free "vit" also patch_size, width, depth, num_heads. None means the default: what
        the weights' source says of itself, or else the model's own.

    Raises:
      ValueError: unknown name or option, or weights that do not fit; the line says which.
      FileNotFoundError: weights that are not there or cannot be downloaded.
      ImportError: weights that need torch, where it is not installed.
    """
    if not name.startswith(TIMM) and name not in _FAMILIES:
        known = ", ".join(_FAMILIES)
        raise ValueError(f"unknown backbone {name!r}; there are {known}, and timm:MODEL")
    config = {key: value for key, value in config.items() if value is not None}
    if weights is None:
        return _build(name, seed, _described(name, config) | config)
    path, described = _locate(name, weights)
    tensors, metadata = files.read_safetensors(path)
    if metadata.get("format") == FORMAT:
        if metadata["name"] != name:
            raise ValueError(f"{weights} holds a {metadata['name']}, not a {name}")
        described = json.loads(metadata["config"])
    elif name.startswith(TIMM):
        described = _described(name, config) | described
    abstract = nnx.eval_shape(lambda: _build(name, seed, described | config))
    return convert_weights.fill(abstract, convert_weights.to_flax(abstract, tensors, str(weights)))


def save_backbone(backbone: Backbone, path: str | Path) -> None:
    """Writes a backbone as safetensors in our own layout: parameters by their dotted path, name
    and config in the metadata, so that `load_backbone(name, path)` needs nothing else."""
    values = convert_weights.parameters(backbone)
    metadata = {
        "format": FORMAT,
        "name": backbone.name,
        "config": json.dumps(backbone.config),
    }
    tensors = {key: np.asarray(value) for key, value in values.items()}
    files.write_safetensors(Path(path), tensors, metadata)


def _described(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config that timm gives a model of its own."""
    if not name.startswith(TIMM) or "architecture" in config:
        return {}
    return timm_models.describe(name.removeprefix(TIMM), config.get("num_classes"))


def _build(name: str, seed: int, config: Mapping[str, Any]) -> Backbone:
    config = dict(config)
    family = _family(name, config)
    options = inspect.signature(family.__init__).parameters.keys() - {"self", "name", "rngs"}
    if not name.startswith(TIMM):
        options -= {"architecture"}
    if unknown := config.keys() - options:
        raise ValueError(
            f"{name} has no option {', '.join(sorted(unknown))}; it has {', '.join(sorted(options))}"
        )
    if isinstance(fields := config.get("preprocessing"), Mapping):
        config["preprocessing"] = Preprocessing(**_hashable(fields))
    return family(name, rngs=nnx.Rngs(seed), **config)


def _family(name: str, config: dict[str, Any]) -> type[Backbone]:
    """The backbone's class; a description of its architecture becomes the class's variant."""
    if not name.startswith(TIMM):
        return _FAMILIES[name]
    architecture = dict(config["architecture"])
    family, variant = _ARCHITECTURES[architecture.pop("family")]
    config["architecture"] = variant(**_hashable(architecture))
    return family


def _hashable(fields: Mapping[str, Any]) -> dict[str, Any]:
    """JSON's lists as tuples, which static attributes of a module have to be."""
    return {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}


def _locate(name: str, weights: str | Path) -> tuple[Path, dict[str, Any]]:
    """A local safetensors file, and the config that its source describes."""
    if weights == "torchvision":
        return pretrained.torchvision_weights(name), {}
    source, _, model = str(weights).partition(":")
    if source == "timm":
        own = name.removeprefix(TIMM) if name.startswith(TIMM) else None
        return pretrained.timm_weights(name, model or own)
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights file {path}; weights are a file, torchvision, timm or timm:MODEL"
        )
    if path.suffix == ".safetensors":
        return path, {}
    if path.suffix in (".pth", ".pt", ".ckpt"):
        return files.converted_pth(path), {}
    raise ValueError(f"{path} is no weights file: .safetensors, .pth, .pt and .ckpt are read")

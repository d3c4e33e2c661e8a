"""Backbones by name, with or without weights."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert import files, pretrained
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


def list_backbones() -> list[str]:
    """All names that `load_backbone` knows."""
    return list(_FAMILIES)


def load_backbone(
    name: str, weights: str | Path | None = None, *, seed: int = 0, **config: Any
) -> Backbone:
    """A frozen classifier.

    Args:
      name: one of `list_backbones()`.
      weights: a file (`.safetensors`, `.pth`, `.pt`, in torchvision's, timm's or our own
        layout); "torchvision" (its IMAGENET1K_V1 weights); "timm" (its default weights) or
        "timm:MODEL"; None for random initialisation from `seed`.
      **config: num_classes, image_size, dtype (of computation and feature maps; "bfloat16"),
        preprocessing; features ("pool" or "conv" for VGG, "block" or "norm" for ViT); for the
        free "vit" also patch_size, width, depth, num_heads. None means the default: what
        the weights' source says of itself, or else the variant's own.

    Raises:
      ValueError: unknown name or option, or weights that do not fit; the line says which.
      FileNotFoundError: weights that are not there or cannot be downloaded.
      ImportError: weights that need torch, where it is not installed.
    """
    if name not in _FAMILIES:
        raise ValueError(f"unknown backbone {name!r}; there are {', '.join(_FAMILIES)}")
    config = {key: value for key, value in config.items() if value is not None}
    options = inspect.signature(_FAMILIES[name].__init__).parameters.keys()
    options -= {"self", "name", "rngs"}
    if unknown := config.keys() - options:
        raise ValueError(
            f"{name} has no option {', '.join(sorted(unknown))}; it has {', '.join(sorted(options))}"
        )
    if weights is None:
        return _build(name, seed, config)
    path, described = _locate(name, weights)
    tensors, metadata = files.read_safetensors(path)
    if metadata.get("format") == FORMAT:
        if metadata["name"] != name:
            raise ValueError(f"{weights} holds a {metadata['name']}, not a {name}")
        described = json.loads(metadata["config"])
    config = {**described, **config}
    abstract = nnx.eval_shape(lambda: _build(name, seed, config))
    return _fill(abstract, convert_weights.to_flax(abstract, tensors, str(weights)))


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


def _build(name: str, seed: int, config: Mapping[str, Any]) -> Backbone:
    config = dict(config)
    if isinstance(fields := config.get("preprocessing"), Mapping):
        mean, std = tuple(fields["mean"]), tuple(fields["std"])  # JSON has lists, which do not hash
        config["preprocessing"] = Preprocessing(**{**fields, "mean": mean, "std": std})
    return _FAMILIES[name](name, rngs=nnx.Rngs(seed), **config)


def _locate(name: str, weights: str | Path) -> tuple[Path, dict[str, Any]]:
    """A local safetensors file, and the config that its source describes."""
    if weights == "torchvision":
        return pretrained.torchvision_weights(name), {}
    source, _, model = str(weights).partition(":")
    if source == "timm":
        return pretrained.timm_weights(name, model or None)
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights file {path}; weights are a file, torchvision, timm or timm:MODEL"
        )
    if path.suffix == ".safetensors":
        return path, {}
    if path.suffix in (".pth", ".pt"):
        return files.converted_pth(path), {}
    raise ValueError(f"{path} is no weights file: .safetensors, .pth and .pt are read")


def _fill(abstract: Backbone, tensors: Mapping[str, Any]) -> Backbone:
    """The backbone, its parameters now the given arrays."""
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(abstract))]
    values = {path: jnp.asarray(tensors[".".join(map(str, path))]) for path in paths}
    nnx.update(abstract, nnx.from_flat_state(values))
    return abstract

"""Image classifiers of transformers on the Hugging Face hub, or in a local folder."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ttame_jax.backbones import FAMILIES
from ttame_jax.backbones.family import Family
from ttame_jax.convert.pytorch.hub import files_of
from ttame_jax.errors import Damaged

from .timm_models import UnsupportedModel

FILES = ("config.json", "preprocessor_config.json", "model.safetensors")
RESAMPLING = {2: "bilinear", 3: "bicubic"}


def describe(model: str) -> dict[str, Any]:
    """The configuration with which `load_backbone` builds a model.

    Args:
      model: OWNER/NAME on the hub, or a folder that `save_pretrained` wrote.

    Returns:
      num_classes, class_names, preprocessing and architecture, as `timm_models.describe` does.

    Raises:
      UnsupportedModel: the model cannot be built here.
      FileNotFoundError: it cannot be downloaded.
      Damaged: its configuration is not one of transformers.
    """
    config, processor = map(_read, files_of(model, FILES[:2]))
    family = _family(config.get("model_type"))
    if family is None or family.huggingface is None:
        raise UnsupportedModel(f"hf:{model}", [f"is a {config.get('model_type')}"])
    try:
        if reasons := [*family.huggingface.refusals(config), *_refusals(processor)]:
            raise UnsupportedModel(f"hf:{model}", reasons)
        names = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # transformers' default
        return {
            "num_classes": len(names),
            "class_names": _class_names(names),
            "preprocessing": _preprocessing(processor),
            "architecture": {"family": family.backbone.__name__} | family.huggingface.read(config),
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"the configuration of hf:{model} lacks {error}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise Damaged(f"{path} is not a JSON file: {error}") from error
    if not isinstance(content, dict):
        raise Damaged(f"{path} is not a configuration of transformers")
    return content


def weights(model: str) -> Path:
    """The path of a model's ``model.safetensors``.

    Raises:
      FileNotFoundError: it cannot be downloaded.
    """
    (path,) = files_of(model, FILES[2:])
    return path


def _family(model_type: str | None) -> Family | None:
    known = (f for f in FAMILIES if f.huggingface and model_type in f.huggingface.model_types)
    return next(known, None)


def _class_names(labels: Mapping[str, str]) -> tuple[str, ...] | None:
    """The names of the classes, unless they are placeholders.

    ImageNet's are None, since transformers has lists of synonyms where this project has names.
    """
    names = tuple(labels[str(i)] for i in range(len(labels)))
    imagenet = len(names) == 1000 and names[0].startswith("tench")
    return None if imagenet or names[0] == "LABEL_0" else names


def _refusals(processor: Mapping[str, Any]) -> Iterator[str]:
    """Why a preprocessing is not supported."""
    if processor["resample"] not in RESAMPLING:
        yield f"resizes images with Pillow's filter {processor['resample']}"
    for step in ("do_rescale", "do_normalize"):
        if not processor.get(step, True):
            yield f"has a preprocessing without {step}"


def _preprocessing(processor: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `Preprocessing`. Where transformers squashes an image, its centre is cut out."""
    side, crop = (_side(processor.get(name)) for name in ("size", "crop_size"))
    if crop and processor.get("do_center_crop"):
        sizes = {"image_size": crop, "resize_size": side}
    else:
        sizes = {"image_size": side, "resize_size": int(side / processor.get("crop_pct", 1))}
    return sizes | {
        "interpolation": RESAMPLING[processor["resample"]],
        "mean": processor["image_mean"],
        "std": processor["image_std"],
    }


def _side(size: Any) -> int:
    if isinstance(size, Mapping):
        return int(size.get("shortest_edge") or size["height"])
    return int(size or 0)

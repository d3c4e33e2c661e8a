"""timm: its models, and its weights on the Hugging Face hub."""

import json
from pathlib import Path
from typing import Any

from . import INSTALL
from .hub import files_of
from .torch_import import import_torchvision


def create(model: str, num_classes: int | None = None, device: str = "cpu", **options: Any):
    """timm's module of a model, without weights, in inference mode.

    On the device "meta" it has shapes and no values.

    Raises:
      ValueError: timm has no such model.
      ImportError: timm is not installed.
    """
    try:
        import_torchvision()
        import timm
        import torch
    except ImportError:
        raise ImportError(f"the architecture of timm:{model} needs timm: {INSTALL}") from None
    if num_classes is not None:
        options["num_classes"] = num_classes
    if not timm.is_model(model):
        raise ValueError(
            f"timm {timm.__version__} has no model {model!r}: timm.list_models() lists them"
        )
    with torch.device(device):
        return timm.create_model(model, **options).eval()


def preprocessing(pretrained: dict[str, Any]) -> dict[str, Any]:
    """Fields of `Preprocessing` from a pretrained configuration of timm's."""
    image_size = pretrained["input_size"][-1]
    return {
        "image_size": image_size,
        "resize_size": int(image_size / pretrained["crop_pct"]),
        "interpolation": pretrained["interpolation"],
        "mean": pretrained["mean"],
        "std": pretrained["std"],
    }


def weights(model: str) -> tuple[Path, dict[str, Any]]:
    """timm's weights from the hub, with the classes and preprocessing from the model card.

    Args:
      model: with its tag ("vit_base_patch16_224.dino"), or without it for the default tag, which
        is looked up in timm.

    Returns:
      The path of `model.safetensors` in the hub's own cache, and a dict of num_classes and
      preprocessing (fields of `Preprocessing`).

    Raises:
      ValueError: the model's tag is not known.
      FileNotFoundError: they cannot be downloaded.
    """
    card, path = files_of(f"timm/{_tagged(model)}", ("config.json", "model.safetensors"))
    return path, read_card(json.loads(card.read_text()))


def read_card(card: dict[str, Any]) -> dict[str, Any]:
    """Classes and preprocessing from the `config.json` of a timm model on the hub."""
    return {
        "num_classes": card["num_classes"],
        "preprocessing": preprocessing(card["pretrained_cfg"]),
    }


def _tagged(model: str) -> str:
    """A model with its tag, "architecture.tag"."""
    if "." in model:
        return model
    try:
        import_torchvision()
        from timm.models import get_pretrained_cfg
    except ImportError:
        raise ValueError(
            f"timm:{model} needs its tag, as in timm:vit_base_patch16_224.dino; to look up the "
            f"default tag: {INSTALL}"
        ) from None
    pretrained = get_pretrained_cfg(model)
    if pretrained is None or not pretrained.tag:
        raise ValueError(f"timm has no pretrained model {model!r}")
    return f"{model}.{pretrained.tag}"

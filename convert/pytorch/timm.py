"""timm: its models, and its weights on the Hugging Face hub."""

import contextlib
import json
from pathlib import Path
from typing import Any

from . import INSTALL
from .downloads import download
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
    repository = f"timm/{_tagged(model)}"
    try:
        card, path = (_from_hub(repository, file) for file in ("config.json", "model.safetensors"))
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"cannot download {repository} ({reason}); on a machine with access run "
            f"'hf download {repository}' and copy its Hugging Face cache folder here"
        ) from None
    return Path(path), read_card(json.loads(Path(card).read_text()))


def _from_hub(repository: str, file: str) -> str:
    """The path of a file in the hub's cache, where it is downloaded if it is missing."""
    from huggingface_hub import constants, errors, hf_hub_download

    with contextlib.suppress(errors.LocalEntryNotFoundError):
        return hf_hub_download(repository, file, local_files_only=True)
    with contextlib.nullcontext() if constants.HF_HUB_OFFLINE else download(constants.ENDPOINT):
        return hf_hub_download(repository, file)


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

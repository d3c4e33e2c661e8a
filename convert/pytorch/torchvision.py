"""torchvision's published ImageNet weights."""

import contextlib
from pathlib import Path
from typing import Any

from . import INSTALL
from .checkpoints import cached, numpy_state
from .downloads import download
from .torch_import import import_torchvision


def weights(model: str) -> Path:
    """torchvision's IMAGENET1K_V1 weights of a model, the paper's, as cached safetensors.

    Raises:
      ImportError: torchvision is not installed.
      FileNotFoundError: they cannot be downloaded.
    """
    return cached(f"torchvision/{model}.IMAGENET1K_V1", lambda: _download(model))


def _download(model: str) -> dict[str, Any]:
    try:
        models = import_torchvision().models
    except ImportError:
        raise ImportError(
            f"torchvision's weights of {model} need torchvision once: {INSTALL}"
        ) from None
    weights = models.get_model_weights(model).IMAGENET1K_V1
    try:
        with contextlib.nullcontext() if _has(weights.url) else download(weights.url):
            return numpy_state(weights.get_state_dict(check_hash=True))
    except OSError as error:
        raise FileNotFoundError(
            f"cannot download {weights.url} ({error}); download it on a machine with access and "
            "pass --weights FILE"
        ) from None


def _has(url: str) -> bool:
    """Whether torchvision has downloaded a file already."""
    import torch

    return (Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name).is_file()

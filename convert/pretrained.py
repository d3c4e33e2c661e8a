"""Published ImageNet weights: torchvision's, and timm's on the Hugging Face hub."""

import json
from pathlib import Path
from typing import Any

from . import timm_models
from .files import INSTALL, cached, numpy_state
from .torch_import import import_torchvision

TORCHVISION = {
    **{
        f"vgg{depth}{norm}": f"vgg{depth}{norm}"
        for depth in (11, 13, 16, 19)
        for norm in ("", "_bn")
    },
    **{f"resnet{depth}": f"resnet{depth}" for depth in (18, 34, 50, 101, 152)},
    **{f"squeezenet1_{minor}": f"squeezenet1_{minor}" for minor in (0, 1)},
    "vit_b16": "vit_b_16",
    "vit_b32": "vit_b_32",
    "vit_l16": "vit_l_16",
}
"""torchvision's name of a backbone."""

TIMM = {
    **{
        f"vgg{depth}{norm}": f"vgg{depth}{norm}.tv_in1k"
        for depth in (11, 13, 16, 19)
        for norm in ("", "_bn")
    },
    **{f"resnet{depth}": f"resnet{depth}.a1_in1k" for depth in (18, 34, 50)},
    **{f"resnet{depth}": f"resnet{depth}.a1h_in1k" for depth in (101, 152)},
    "vit_ti16": "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "vit_s16": "vit_small_patch16_224.augreg_in21k_ft_in1k",
    "vit_b16": "vit_base_patch16_224.augreg2_in21k_ft_in1k",
    "vit_b32": "vit_base_patch32_224.augreg_in21k_ft_in1k",
    "vit_l16": "vit_large_patch16_224.augreg_in21k_ft_in1k",
}
"""timm's default model of a backbone: architecture.tag."""


def torchvision_weights(name: str) -> Path:
    """torchvision's IMAGENET1K_V1 weights, the paper's, as cached safetensors.

    Raises:
      ValueError: torchvision has none for this backbone.
      ImportError: torchvision is not installed.
      FileNotFoundError: they cannot be downloaded.
    """
    model = _published(TORCHVISION, name, "torchvision")
    return cached(f"torchvision/{model}.IMAGENET1K_V1", lambda: _download_torchvision(model))


def _download_torchvision(model: str) -> dict[str, Any]:
    try:
        models = import_torchvision().models
    except ImportError:
        raise ImportError(
            f"torchvision's weights of {model} need torchvision once: {INSTALL}"
        ) from None
    weights = models.get_model_weights(model).IMAGENET1K_V1
    try:
        return numpy_state(weights.get_state_dict(check_hash=True))
    except OSError as error:
        raise FileNotFoundError(
            f"cannot download {weights.url} ({error}); fetch it on a machine with access and "
            "pass --weights FILE"
        ) from None


def timm_weights(name: str, model: str | None = None) -> tuple[Path, dict[str, Any]]:
    """timm's weights from the hub, and what its model card says: classes and preprocessing.

    Args:
      name: the backbone's name here, for timm's default model of it.
      model: another model of timm's, with its tag ("vit_base_patch16_224.dino") or, where timm
        is installed to look the default tag up, without.

    Returns:
      the path of `model.safetensors` in the hub's own cache, and a dict of num_classes and
      preprocessing (fields of `Preprocessing`).

    Raises:
      ValueError: timm has none for this backbone, or the model's tag is not known.
      FileNotFoundError: they cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download

    repository = f"timm/{_tagged(model) if model else _published(TIMM, name, 'timm')}"
    try:
        card, path = (
            hf_hub_download(repository, file) for file in ("config.json", "model.safetensors")
        )
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"cannot download {repository} ({reason}); on a machine with access run "
            f"'hf download {repository}' and copy its Hugging Face cache folder here"
        ) from None
    return Path(path), read_card(json.loads(Path(card).read_text()))


def read_card(card: dict[str, Any]) -> dict[str, Any]:
    """Classes and preprocessing from the `config.json` of a timm model on the hub."""
    return {
        "num_classes": card["num_classes"],
        "preprocessing": timm_models.preprocessing(card["pretrained_cfg"]),
    }


def _published(models: dict[str, str], name: str, library: str) -> str:
    if name not in models:
        raise ValueError(
            f"{library} has no weights for {name}; it has them for {', '.join(models)}"
        )
    return models[name]


def _tagged(model: str) -> str:
    """A timm model with its tag, "architecture.tag"."""
    if "." in model:
        return model
    try:
        import_torchvision()
        from timm.models import get_pretrained_cfg
    except ImportError:
        raise ValueError(
            f"timm:{model} needs its tag, as in timm:{TIMM['vit_b16']}; to look the default "
            f"tag up: {INSTALL}"
        ) from None
    pretrained = get_pretrained_cfg(model)
    if pretrained is None or not pretrained.tag:
        raise ValueError(f"timm has no pretrained model {model!r}")
    return f"{model}.{pretrained.tag}"

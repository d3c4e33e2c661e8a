"""The architecture of timm's models, read from the module that timm itself builds."""

from collections.abc import Iterator
from typing import Any

from ttame_jax.backbones import FAMILIES
from ttame_jax.backbones.family import Family, Timm
from ttame_jax.convert.pytorch import timm
from ttame_jax.preprocessing import Preprocessing

from .transfer import abstract, shapes

SHARED_LAYERS = frozenset(
    [
        "Sequential",
        "Identity",
        "Conv2d",
        "Linear",
        "BatchNorm2d",
        "ReLU",
        "SelectAdaptivePool2d",
        "AdaptiveAvgPool2d",
        "FastAdaptiveAvgPool2d",
        "Flatten",
    ]
)
"""Class names of the layers that a model of any family may consist of."""


class UnsupportedModel(ValueError):
    """A model of timm's that cannot be built here.

    Attributes:
      reasons: why, each as the rest of a sentence about the model.
    """

    def __init__(self, name: str, reasons: list[str]):
        families = ", ".join(family.backbone.__name__ for family in FAMILIES if family.timm)
        if name.startswith("timm:"):
            advice = f"; import it with ttame convert import {name} --output FILE.safetensors"
        else:
            advice = f" (supported families: {families})"
        super().__init__(f"{name} is not supported: it {', it '.join(reasons)}{advice}")
        self.reasons = reasons


def describe(model: str, num_classes: int | None = None) -> dict[str, Any]:
    """The configuration with which `load_backbone` builds a model of timm's.

    Args:
      model: its name, with or without its tag.
      num_classes: another number of classes than the model's own.

    Returns:
      num_classes, preprocessing (that of the pretrained configuration), architecture (the family
      and the fields of its `Architecture`) and, where it may differ, image_size.

    Raises:
      UnsupportedModel: the model cannot be built here.
      ValueError: timm has no such model.
      ImportError: timm is not installed.
    """
    return read(timm.create(model, num_classes, device="meta"), f"timm:{model}")


def read(module, name: str) -> dict[str, Any]:
    """What `describe` returns, from timm's module (also on the device "meta")."""
    family = _family(module)
    if family is None or family.timm is None:
        raise UnsupportedModel(name, [f"is a {type(module).__name__}"])
    if reasons := list(_refusals(module, family.timm)):
        raise UnsupportedModel(name, reasons)
    config = {
        "num_classes": module.num_classes,
        "preprocessing": timm.preprocessing(module.pretrained_cfg),
        "architecture": {"family": family.backbone.__name__, **family.timm.read(module)},
    }
    if (image_size := family.timm.image_size(module)) is not None:
        config["image_size"] = image_size
    if reasons := list(_differences(name, family, config, module)):
        raise UnsupportedModel(name, reasons)
    return config


def _family(module) -> Family | None:
    name = type(module).__name__
    known = (family for family in FAMILIES if family.timm and family.timm.module == name)
    return next(known, None)


def _refusals(module, record: Timm) -> Iterator[str]:
    known = {record.module, *record.layers, *SHARED_LAYERS}
    others = sorted({type(layer).__name__ for layer in module.modules()} - known)
    if others:
        yield f"has {', '.join(others)}"
    if not module.num_classes:
        yield "has no classifier (give it num_classes, and weights that have one)"
    yield from record.refusals(module)


def _differences(name: str, family: Family, config: dict[str, Any], module) -> Iterator[str]:
    """Tensors in which the module and the backbone built from its description differ."""
    fields = {key: value for key, value in config["architecture"].items() if key != "family"}
    preprocessing = Preprocessing(**config["preprocessing"])
    if "image_size" in config:
        preprocessing = preprocessing.resized(config["image_size"])
    architecture = family.architecture(
        num_classes=config["num_classes"], preprocessing=preprocessing, **fields
    )
    backbone = abstract(lambda rngs: family.backbone(name, architecture, rngs=rngs))
    ours = shapes(backbone, "timm")
    theirs = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    different = sorted(k for k in {*ours, *theirs} if ours.get(k) != theirs.get(k))
    if different:
        yield f"differs in {different[0]} and {len(different) - 1} other tensors"

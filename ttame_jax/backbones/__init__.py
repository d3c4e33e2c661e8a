"""The frozen classifiers, one file per family."""

from . import (
    convnext,
    densenet,
    efficientnet,
    mobilenetv3,
    regnet,
    resnet,
    squeezenet,
    swin,
    vgg,
    vit,
)
from .base import Architecture, Backbone
from .family import Family
from .function import FunctionBackbone

FAMILIES: tuple[Family, ...] = (
    vgg.FAMILY,
    resnet.FAMILY,
    vit.FAMILY,
    squeezenet.FAMILY,
    efficientnet.FAMILY,
    mobilenetv3.FAMILY,
    regnet.FAMILY,
    convnext.FAMILY,
    swin.FAMILY,
    densenet.FAMILY,
)


def family_of(backbone: Backbone) -> Family:
    """The record of a backbone's family.

    Raises:
      ValueError: the backbone belongs to none of `FAMILIES`.
    """
    for family in FAMILIES:
        if family.backbone is type(backbone):
            return family
    raise ValueError(f"{backbone.name} belongs to no family of this project")


__all__ = ["FAMILIES", "Architecture", "Backbone", "Family", "FunctionBackbone", "family_of"]

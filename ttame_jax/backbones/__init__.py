"""The frozen classifiers: VGG, ResNet, ViT and SqueezeNet."""

from .base import Backbone, Preprocessing
from .registry import list_backbones, load_backbone, save_backbone

__all__ = ["Backbone", "Preprocessing", "list_backbones", "load_backbone", "save_backbone"]

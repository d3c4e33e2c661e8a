"""Backbones by name, with weights from files, torchvision or timm."""

from .backbones import abstract_backbone, list_backbones, load_backbone, save_backbone

__all__ = ["abstract_backbone", "list_backbones", "load_backbone", "save_backbone"]

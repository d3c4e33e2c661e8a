"""Backbones by name, with weights from files, torchvision or timm."""

from .backbones import list_backbones, load_backbone, save_backbone

__all__ = ["list_backbones", "load_backbone", "save_backbone"]

"""Backbones by name, with weights from files, torchvision or timm, and from users' functions."""

from .backbones import abstract_backbone, list_backbones, load_backbone, save_backbone

__all__ = ["abstract_backbone", "list_backbones", "load_backbone", "save_backbone"]

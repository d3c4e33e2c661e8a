"""Imports torchvision, also with a PyTorch build that cannot load its compiled operators."""

from types import ModuleType
from typing import Any

_declared: list[Any] = []  # the operators live as long as the library object does


def import_torchvision() -> ModuleType:
    """Imports torchvision. Call this before importing timm as well.

    torchvision's Python code registers functions for operators of its compiled part. With a
    PyTorch build that cannot load that part, the import fails although nothing here needs the
    operators. Declaring their signatures is enough.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "nms does not exist" not in str(error) or _declared:
            raise
        import torch

        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        import torchvision
    return torchvision

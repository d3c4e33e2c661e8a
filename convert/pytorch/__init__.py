"""Reads PyTorch's files and its libraries' models. PyTorch is imported only when it is needed."""

from typing import Any

INSTALL = "pip install 'ttame-jax[convert]'"
"""The command that installs PyTorch and the libraries."""


def import_torch(purpose: str) -> Any:
    """PyTorch.

    Raises:
      ImportError: it is not installed. The message begins with the purpose.
    """
    try:
        import torch
    except ImportError:
        raise ImportError(f"{purpose} needs PyTorch: {INSTALL}") from None
    return torch

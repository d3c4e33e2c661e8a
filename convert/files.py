"""Tensors in files: safetensors, PyTorch's .pth, and the cache that spares torch a second time."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import ml_dtypes  # noqa: F401  makes bfloat16 known to NumPy, and so to safetensors
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

INSTALL = "pip install 'ttame-jax[convert]'"

Tensors = dict[str, np.ndarray]


def read_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
      ValueError: the file is not a safetensors file.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            keys = file.keys()
            return {key: file.get_tensor(key) for key in keys}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from None


def write_safetensors(path: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    """Writes the file whole or not at all."""
    # Here, because ttame_jax itself imports this module.
    from ttame_jax.files import write_atomically

    write_atomically(path, save(tensors, metadata))


def cache_dir() -> Path:
    """`TTAME_CACHE`, or `ttame_jax` in the user's cache folder."""
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TTAME_CACHE") or Path(user) / "ttame_jax")


def cached(key: str, make: Callable[[], Tensors]) -> Path:
    """Path of the cached safetensors file `key`, made by `make()` when it is not there yet."""
    path = cache_dir() / f"{key}.safetensors"
    if not path.exists():
        write_safetensors(path, make(), {"format": "pt"})
    return path


def converted_pth(path: Path) -> Path:
    """The state dict of a .pth or .pt file as cached safetensors, found again by its content."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return cached(f"pth/{digest}", lambda: _read_pth(path))


def _read_pth(path: Path) -> Tensors:
    try:
        import torch
    except ImportError:
        raise ImportError(f"reading {path} needs PyTorch once: {INSTALL}") from None
    try:
        # Only tensors and plain containers: whatever else a pickle asks for is refused, not run.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  torch raises many types
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path} is not a plain state dict of tensors: {reason}") from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
        raise ValueError(
            f"{path} is not a plain state dict of tensors, nor has it one under "
            "'state_dict' or 'model'"
        )
    return numpy_state(state)


def numpy_state(state: dict) -> Tensors:
    """PyTorch tensors as NumPy arrays, floating-point ones in float32."""
    return {
        key: (tensor.float() if tensor.is_floating_point() else tensor).contiguous().numpy()
        for key, tensor in state.items()
    }

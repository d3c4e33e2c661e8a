"""PyTorch's checkpoint files, read without running code from them, and the cache of what was read."""

import hashlib
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ttame_jax.files import Tensors, cache_dir, write_safetensors

from . import INSTALL


def cached(key: str, make: Callable[[], Tensors]) -> Path:
    """Path of the cached safetensors file `key`, made by `make()` if it does not exist yet."""
    path = cache_dir() / f"{key}.safetensors"
    if not path.exists():
        write_safetensors(path, make(), {"format": "pt"})
    return path


def converted(path: Path) -> Path:
    """The state dict of a .pth, .pt or .ckpt file as safetensors, cached by its content."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return cached(f"pth/{digest}", lambda: _read_pth(path))


def _read_pth(path: Path) -> Tensors:
    state = read_torch(path)
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    return numpy_state(checked_state(state, path))


def read_torch(path: Path) -> Any:
    """The content of a file that `torch.save` wrote. No code in it is run.

    Tensors and plain containers are returned as they are. Anything else that the pickle names,
    such as the classes of Lightning's callbacks, is neither imported nor called: an empty dict
    takes its place.

    Raises:
      ValueError: the file is not PyTorch's, is damaged, or cannot be read in this way.
      ImportError: PyTorch is not installed.
    """
    try:
        import torch
    except ImportError:
        raise ImportError(f"reading {path} needs PyTorch: {INSTALL}") from None
    _check_zip(path)
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # noqa: BLE001  an older format, or damaged: torch.load tells
        names = []
    try:
        with torch.serialization.safe_globals([(_Nothing, name) for name in names]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  torch raises many types
        raise ValueError(f"{path} is not a plain checkpoint: {_reason(error)}") from None


def _check_zip(path: Path) -> None:
    """Checks the checksums of a zip file, as `torch.save` writes it, which PyTorch does not do."""
    if not zipfile.is_zipfile(path):
        return  # an older format, or damaged: torch.load tells
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except Exception as error:  # noqa: BLE001  zipfile and zlib raise many types
        raise ValueError(f"{path} is not a plain checkpoint: {_reason(error)}") from None
    if damaged:
        raise ValueError(f"{path} is damaged: {damaged} does not match its checksum")


class _Nothing:
    """Stands in for a class or function that a pickle names. Calling it returns {}."""

    def __new__(cls, *args):
        return OrderedDict()  # which torch.load lets the pickle fill


def _reason(error: Exception) -> str:
    """torch's own reason, without its advice to load the file unsafely."""
    text = str(error)
    detail = text.partition("WeightsUnpickler error: ")[2] or text
    return (detail.strip() or type(error).__name__).partition("\n")[0]


def checked_state(state: Any, path: Path) -> dict:
    """Returns a state dict after checking that every value is a tensor.

    Raises:
      ValueError: it is not a state dict; the message names the first wrong entry.
    """
    import torch

    if not isinstance(state, dict) or not state:
        raise ValueError(
            f"{path} is not a plain state dict of tensors, nor has it one under "
            "'state_dict' or 'model'"
        )
    for key, value in state.items():
        if not torch.is_tensor(value):
            raise ValueError(f"{path} is not a plain state dict of tensors: {key} is none")
    return state


def numpy_state(state: dict) -> Tensors:
    """PyTorch tensors as NumPy arrays; floating-point ones become float32."""
    return {
        key: (tensor.float() if tensor.is_floating_point() else tensor).contiguous().numpy()
        for key, tensor in state.items()
    }


def torch_state(tensors: Tensors) -> dict:
    """NumPy arrays as PyTorch tensors, copied."""
    import torch

    return {key: torch.from_numpy(np.array(value)) for key, value in tensors.items()}

"""PyTorch's checkpoint files, read without running code from them, and the cache of what was read."""

import hashlib
import os
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ttame_jax.errors import Damaged
from ttame_jax.files import Tensors, cache_dir, write_safetensors

from . import import_torch


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
      Damaged: the file is not PyTorch's, is damaged, or cannot be read in this way.
      ImportError: PyTorch is not installed.
    """
    torch = import_torch(f"reading {path}")
    _check_zip(path)
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # noqa: BLE001  an older format, or damaged: torch.load tells
        names = []
    try:
        with torch.serialization.safe_globals([(_Nothing, name) for name in names]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  torch raises many types
        raise Damaged(f"{path} is not a plain checkpoint: {_reason(error)}") from None


def _check_zip(path: Path) -> None:
    """Checks sizes and checksums of a zip file, as `torch.save` writes it. PyTorch does not."""
    if not zipfile.is_zipfile(path):
        return  # an older format, or damaged: torch.load tells
    size = os.path.getsize(path)
    try:
        with zipfile.ZipFile(path) as file:
            declared = sum(entry.file_size for entry in file.infolist())
            # `torch.save` does not compress, so compressed or overlapping data are not its own.
            damaged = file.testzip() if declared <= size else None
    except Exception as error:  # noqa: BLE001  zipfile and zlib raise many types
        raise Damaged(f"{path} is not a plain checkpoint: {_reason(error)}") from None
    if declared > size:
        raise Damaged(
            f"{path} holds {size:,} bytes and declares {declared:,}: torch.save did not write it"
        )
    if damaged:
        raise Damaged(f"{path} is damaged: {damaged} does not match its checksum")


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
    """Returns a state dict after checking that every value is a tensor that NumPy can hold.

    Raises:
      Damaged: it is not such a state dict; the message names the first wrong entry.
    """
    import torch

    if not isinstance(state, dict) or not state:
        raise Damaged(
            f"{path} is not a plain state dict of tensors, nor has it one under "
            "'state_dict' or 'model'"
        )
    for key, value in state.items():
        if not isinstance(key, str):
            raise Damaged(
                f"{path} is not a plain state dict of tensors: its key {key!r} is no name"
            )
        if not torch.is_tensor(value):
            raise Damaged(f"{path} is not a plain state dict of tensors: {key} is none")
        if fault := _fault(value):
            raise Damaged(f"{path} cannot be read: {key} {fault}")
    declared = sum(value.numel() * value.element_size() for value in state.values())
    if declared > _MOST_SHARED * os.path.getsize(path):
        raise Damaged(f"{path} cannot be read: its tensors share memory, {declared:,} bytes in all")
    return state


_MOST_SHARED = 4
"""Size of the tensors of a file relative to the file. Tied weights share memory, but not more."""


def _fault(tensor) -> str | None:
    """Why NumPy cannot hold a tensor."""
    import torch

    if tensor.is_nested or tensor.layout != torch.strided:
        return "is not a dense tensor: convert it with to_dense()"
    if tensor.is_quantized:
        return "is quantised: convert it with dequantize()"
    if tensor.is_complex():
        return "is complex"
    if tensor.is_meta:
        return "has no values (device 'meta')"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return (
            f"repeats its values to a shape of {list(tensor.shape)}: convert it with contiguous()"
        )
    return None


def numpy_state(state: dict) -> Tensors:
    """PyTorch tensors as NumPy arrays; floating-point ones become float32."""
    return {
        key: (tensor.float() if tensor.is_floating_point() else tensor).contiguous().numpy()
        for key, tensor in ((key, parameter.detach()) for key, parameter in state.items())
    }


def torch_state(tensors: Tensors) -> dict:
    """NumPy arrays as PyTorch tensors, copied."""
    import torch

    return {key: torch.from_numpy(np.array(value)) for key, value in tensors.items()}

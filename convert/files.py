"""Tensors in files: safetensors, PyTorch's .pth, and the cache that spares torch a second time."""

import hashlib
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder to write into, which takes the name `path` only once all is written.

    Raises:
      ValueError: `path` is there already.
    """
    if path.exists():
        raise ValueError(f"{path} is there already: choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.mkdir()
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


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
    state = read_torch(path)
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    return numpy_state(checked_state(state, path))


def read_torch(path: Path) -> Any:
    """What a file of `torch.save` holds; nothing in it is run.

    Tensors and plain containers come as they are. Whatever else the pickle names, such as the
    classes of Lightning's callbacks, is neither imported nor called: an empty dict is put there.

    Raises:
      ValueError: the file is none of PyTorch's, is damaged, or cannot be read in this way.
      ImportError: PyTorch is not installed.
    """
    try:
        import torch
    except ImportError:
        raise ImportError(f"reading {path} needs PyTorch: {INSTALL}") from None
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # noqa: BLE001  not of today's format; torch.load says what is wrong, if it is
        names = []
    try:
        with torch.serialization.safe_globals([(_Nothing, name) for name in names]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  torch raises many types
        raise ValueError(f"{path} is not a plain checkpoint: {_reason(error)}") from None


class _Nothing:
    """Takes the place of a class or function that a pickle names: calling it gives {}."""

    def __new__(cls, *args):
        return OrderedDict()  # which torch.load lets the pickle fill


def _reason(error: Exception) -> str:
    """torch's own reason, without its advice to load the file unsafely."""
    text = str(error)
    detail = text.partition("WeightsUnpickler error: ")[2] or text
    return (detail.strip() or type(error).__name__).partition("\n")[0]


def checked_state(state: Any, path: Path) -> dict:
    """A state dict, whose every value is a tensor.

    Raises:
      ValueError: it is none; the first wrong entry is named.
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
    """PyTorch tensors as NumPy arrays, floating-point ones in float32."""
    return {
        key: (tensor.float() if tensor.is_floating_point() else tensor).contiguous().numpy()
        for key, tensor in state.items()
    }


def torch_state(tensors: Tensors) -> dict:
    """NumPy arrays as PyTorch tensors of their own."""
    import torch

    return {key: torch.from_numpy(np.array(value)) for key, value in tensors.items()}

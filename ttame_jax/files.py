"""Reads and writes files. They are written completely or not at all, on disks and in buckets."""

import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy, and so with safetensors
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

PathLike = str | os.PathLike

Tensors = dict[str, np.ndarray]
"""Arrays by name, as in a state dict."""


def in_bucket(path: PathLike) -> bool:
    """Whether a path is the address of an object, such as gs://bucket/folder."""
    return "://" in os.fspath(path)


def absolute(path: PathLike) -> epath.Path:
    """The absolute path. The address of an object is absolute already."""
    path = epath.Path(path)
    return path if in_bucket(path) else path.resolve()


def write_atomically(path: PathLike, content: str | bytes) -> None:
    """Writes a file under a temporary name and moves it into place. Creates its folder."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(path)


def digest(parts: Iterable[str | np.ndarray]) -> str:
    """A short SHA-256 digest of strings and arrays, with their types and shapes, in their order."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            total.update(f"{part.dtype} {part.shape}".encode())
            total.update(np.ascontiguousarray(part).view(np.uint8).data)
        else:
            total.update(f"{len(part)} {part}".encode())
    return total.hexdigest()[:16]


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text in which paths are strings and numbers that are not finite are null."""
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_arrays(path: PathLike, **arrays: np.ndarray) -> None:
    """Writes arrays as a compressed .npz file."""
    buffer = io.BytesIO()
    # pyrefly: ignore[bad-argument-type]  # an array may have the name of an option
    np.savez_compressed(buffer, **arrays)
    write_atomically(path, buffer.getvalue())


def read_safetensors(path: PathLike) -> tuple[Tensors, dict[str, str]]:
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


def write_safetensors(path: PathLike, tensors: Tensors, metadata: dict[str, str]) -> None:
    """Writes tensors and metadata as a safetensors file."""
    write_atomically(path, save(tensors, metadata))


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder that is renamed to `path` once the body has succeeded.

    Raises:
      ValueError: `path` exists already.
    """
    if path.exists():
        raise ValueError(f"{path} exists already: choose another folder")
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
    """The folder for converted weights: `TTAME_CACHE`, or `ttame_jax` in the user's cache folder."""
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TTAME_CACHE") or Path(user) / "ttame_jax")

"""Files are written whole or not at all, on disks and in buckets (gs://bucket/folder)."""

import io
import os
from pathlib import Path

import numpy as np
from etils import epath

PathLike = str | os.PathLike


def in_bucket(path: PathLike) -> bool:
    """Whether a path is an address like gs://bucket/folder rather than a file's on a disk."""
    return "://" in os.fspath(path)


def absolute(path: PathLike) -> Path:
    """The path from the root; an address in a bucket is one already."""
    path = epath.Path(path)
    return path if in_bucket(path) else path.resolve()


def write_atomically(path: PathLike, content: str | bytes) -> None:
    """Writes a file under a temporary name and moves it into place; makes its folder."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(path)


def save_arrays(path: PathLike, **arrays: np.ndarray) -> None:
    """Writes arrays as a compressed .npz."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomically(path, buffer.getvalue())

"""Files are written whole or not at all."""

import io
import os
from pathlib import Path

import numpy as np


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Writes a file under a temporary name and moves it into place; makes its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


def save_arrays(path: str | Path, **arrays: np.ndarray) -> None:
    """Writes arrays as a compressed .npz."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomically(path, buffer.getvalue())

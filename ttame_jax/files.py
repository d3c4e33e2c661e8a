"""Reads and writes files. They are written completely or not at all, on disks and in buckets."""

import errno
import functools
import hashlib
import io
import json
import math
import os
import shutil
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import jax
import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy, and so with safetensors
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ttame_jax.errors import Damaged, Failure

PathLike = str | os.PathLike

Tensors = dict[str, np.ndarray]
"""Arrays by name, as in a state dict."""


def below_common(paths: Sequence[Path]) -> list[Path]:
    """The paths relative to the folder that all of them are in."""
    absolute = [path.absolute() for path in paths]
    common = os.path.commonpath([path.parent for path in absolute])
    return [path.relative_to(common) for path in absolute]


def in_bucket(path: PathLike) -> bool:
    """Whether a path is the address of an object, such as gs://bucket/folder."""
    return "://" in os.fspath(path)


def absolute(path: PathLike) -> epath.Path:
    """The absolute path. The address of an object is absolute already."""
    path = epath.Path(path)
    return path if in_bucket(path) else path.resolve()


def write_atomically(path: PathLike, content: str | bytes) -> None:
    """Writes a file under a temporary name and moves it into place. Creates its folder.

    On a disk, the content is flushed before the move. A failure leaves the old file, if there was
    one, and no temporary file.
    """
    path, content = epath.Path(path), content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    if in_bucket(path):  # an object is written whole or not at all
        path.write_bytes(content)
        return
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(handle)
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp lets only the owner read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@functools.cache  # reading it changes it for a moment
def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_bucket(path: PathLike) -> None:
    """Checks that the bucket of an address answers. Other paths are not checked.

    Raises:
      ConnectionError: it does not.
    """
    if not in_bucket(path):
        return
    try:
        epath.Path(path).exists()
    except Exception as error:  # each backend raises its own types
        reason = " ".join(str(error).split())[:200]
        raise ConnectionError(f"cannot reach {path}: {reason}") from error


LEAST_SPACE = 2**24
"""Free bytes that the results of any command need."""


def check_output_folder(path: PathLike, space: int = LEAST_SPACE) -> None:
    """Checks, before any work, that files can be written into a folder, which may not exist yet.

    Args:
      path: the folder.
      space: bytes that must be free.

    Raises:
      OSError: they cannot.
    """
    if in_bucket(path):
        check_bucket(path)
        return
    existing = Path(path).absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise NotADirectoryError(f"{existing} is a file: --output needs a folder there")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{existing} is not writable: choose another --output")
    if (free := shutil.disk_usage(existing).free) < space:
        raise OSError(
            f"{existing} has {free / 2**20:.0f} MiB left, {space / 2**20:.0f} MiB are needed: "
            "make room, or choose another --output"
        )


def check_space(path: PathLike, space: int) -> None:
    """Checks that a number of bytes is free where a file will be written.

    Libraries that write in the background would fail there one after the other.

    Raises:
      OSError: ENOSPC, no space is left.
    """
    if not in_bucket(path) and shutil.disk_usage(Path(path).parent).free < space:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))


def check_output_file(path: PathLike) -> None:
    """Checks, before any work, that a file can be written.

    Raises:
      OSError: it cannot.
    """
    if not in_bucket(path) and Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder: --output must be a file")
    check_output_folder(epath.Path(path).parent)


LOCK = ".lock"
"""Name of a folder's lock file, and the ending of that of a file."""


@contextmanager
def locked(output: PathLike, folder: bool = True) -> Iterator[None]:
    """Keeps other processes from writing to the same output while the body runs.

    Of several processes of one run, the first one holds the lock. Objects in buckets have no locks.
    On a file system without locks, a message says so.

    Args:
      output: a folder or file; its folder is created.
      folder: whether it is a folder.

    Raises:
      Failure: another process writes to it.
    """
    if in_bucket(output) or jax.process_index() > 0:
        yield
        return
    output = Path(output)
    path = output / LOCK if folder else output.with_name(f".{output.name}{LOCK}")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path, blocking=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise Failure(
            f"another process is writing to {output}: wait until it has ended, or choose another "
            "--output"
        ) from None
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        print(
            f"{output} is on a file system without locks: let only one process write to it",
            file=sys.stderr,
        )
        yield
        return
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before the release: whoever opened it tries again
        lock.release()


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


SEAL = "digest"
"""Key of a JSON object for the digest of its other fields."""


def seal(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a JSON object, and a digest of them."""
    return {**fields, SEAL: digest([to_json(fields)])}


def check_seal(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields without their digest. Those of an earlier version, without a digest, are returned.

    Raises:
      Damaged: they are not those that `seal` was given.
    """
    rest = {key: value for key, value in fields.items() if key != SEAL}
    if fields.get(SEAL) not in (None, digest([to_json(rest)])):
        raise Damaged("its content is not what was written")
    return rest


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


FLUSH_SECONDS = 30
"""Interval of writing what cannot be appended to: files in a bucket, and TensorBoard's events."""


class LineFile:
    """A text file that grows by lines.

    An object in a bucket cannot be appended to. It is written anew at most every `FLUSH_SECONDS`,
    and when it is closed.

    Args:
      path: the file. The first new line replaces what is in it.
      lines: its lines so far, with line breaks.
    """

    def __init__(self, path: PathLike, lines: Iterable[str] = ()):
        self.path = epath.Path(path)
        self._lines = list(lines)
        self._appends = not in_bucket(path)
        self._written = -math.inf

    def append(self, *lines: str) -> None:
        """Adds lines, with line breaks."""
        self._lines += lines
        if self._appends and self._written > -math.inf:
            with self.path.open("a") as file:
                file.writelines(lines)
        elif time.monotonic() - self._written > FLUSH_SECONDS:
            self.flush()

    def close(self) -> None:
        """Writes what is missing in a bucket."""
        if not self._appends and self._written > -math.inf:
            self.flush()

    def flush(self) -> None:
        """Writes the whole file."""
        write_atomically(self.path, "".join(self._lines))
        self._written = time.monotonic()


# What NumPy, zipfile and zlib raise for damaged bytes.
_DAMAGED_ARRAYS = (
    ValueError,
    EOFError,
    AttributeError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


def read_arrays(path: PathLike) -> dict[str, np.ndarray]:
    """The arrays of an .npz file. No code in it is run.

    Raises:
      FileNotFoundError: the file does not exist.
      Damaged: it is something else.
    """
    try:
        with np.load(io.BytesIO(epath.Path(path).read_bytes())) as arrays:
            return dict(arrays)
    except _DAMAGED_ARRAYS as error:
        raise Damaged(f"{path} is not a file of arrays: {error}") from error


def read_safetensors(path: PathLike) -> tuple[Tensors, dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
      Damaged: the file is not a safetensors file, or its content is not what
        `write_safetensors` wrote.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise Damaged(f"{path} is not a safetensors file: {error}") from None
    written = metadata.pop(DIGEST, None)  # None in another program's file
    if written is not None and written != _digest_of(tensors, metadata):
        raise Damaged(f"{path} is damaged: its content is not what was written")
    return tensors, metadata


def write_safetensors(path: PathLike, tensors: Tensors, metadata: dict[str, str]) -> None:
    """Writes tensors and metadata as a safetensors file, with a digest of both."""
    write_atomically(path, save(tensors, metadata | {DIGEST: _digest_of(tensors, metadata)}))


DIGEST = "ttame_jax_digest"
"""Key of a safetensors file's metadata for the digest of its content."""


def _digest_of(tensors: Tensors, metadata: Mapping[str, str]) -> str:
    entries = [*sorted(metadata.items()), *sorted(tensors.items(), key=lambda entry: entry[0])]
    return digest(part for entry in entries for part in entry)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder that is renamed to `path` once the body has succeeded.

    Raises:
      ValueError: `path` exists already.
    """
    if path.exists():
        raise ValueError(f"{path} exists already: choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    temporary.chmod(0o777 & ~_umask())  # mkdtemp lets only the owner in
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

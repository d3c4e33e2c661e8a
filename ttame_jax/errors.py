"""Errors of the work itself, and how the command line reports all errors."""

import contextlib
import errno
import logging
import os
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn

import absl.logging
import jax

EXTRAS = {
    "grain": "train",
    "tensorflow_datasets": "train",
    "tensorboardX": "train",
    "pyarrow": "train",
    "matplotlib": "plots",
    "huggingface_hub": "hub",
    "gradio": "serve",
    "onnx": "onnx",
    "jinja2": "report",
    "sklearn": "demo",
    "skimage": "sanity",
}
"""The extra that has a module."""


class Failure(Exception):
    """The arguments are right, but the work cannot be done. The message says why."""


class Damaged(Failure, ValueError):
    """The content of a file is not what was written, or cannot be used."""


@contextlib.contextmanager
def no_word_of_closed_loops() -> Iterator[None]:
    """Suppresses messages of threads whose event loop has been closed.

    When Orbax fails to read or write an array it closes its event loop. TensorStore's threads,
    which work on the others, then print a traceback each, some of them after the failure.
    """
    before = sys.unraisablehook

    def hook(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook
    yield  # after a failure the hook stays
    sys.unraisablehook = before


@contextlib.contextmanager
def only_errors_logged() -> Iterator[None]:
    """Suppresses Orbax's warnings, such as that a checkpoint is read-only."""
    before = absl.logging.get_verbosity()
    absl.logging.set_verbosity(min(before, absl.logging.ERROR))
    try:
        yield
    finally:
        absl.logging.set_verbosity(before)


@contextlib.contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Prints a user error in one line and exits.

    The exit status is 2 for wrong arguments (ValueError), 1 for everything else, and 130 for
    Ctrl-C. If ``TTAME_TRACEBACK`` is set, the traceback is shown instead. What Orbax logs is
    suppressed: warnings about read-only checkpoints, and errors that it also raises.
    """
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    try:
        with no_word_of_closed_loops():
            yield
    except (ValueError, OSError, ImportError, Failure) as error:
        if os.environ.get("TTAME_TRACEBACK"):
            raise
        if full := _full_disk(error):
            _end_on_full_disk(program, full)
        wrong_arguments = isinstance(error, ValueError) and not isinstance(error, Failure)
        advice = _install(error) if isinstance(error, ModuleNotFoundError) else ""
        line = f"{program}: {error}{advice} (TTAME_TRACEBACK=1 shows where)"
        _exit(line, 2 if wrong_arguments else 1)
    except (RuntimeError, AssertionError):  # how JAX says that it has no such device
        if _has_devices() or os.environ.get("TTAME_TRACEBACK"):
            raise
        platforms = os.environ.get("JAX_PLATFORMS")
        _exit(f"{program}: JAX finds no device of JAX_PLATFORMS={platforms} on this machine", 1)
    except KeyboardInterrupt:
        if os.environ.get("TTAME_TRACEBACK"):
            raise
        _exit(f"{program}: interrupted", 128 + signal.SIGINT)


def _install(error: ModuleNotFoundError) -> str:
    """How to install a module that an extra has."""
    extra = EXTRAS.get((error.name or "").partition(".")[0])
    return f": run pip install 'ttame-jax[{extra}]'" if extra else ""


def _full_disk(error: BaseException | None) -> OSError | None:
    """The error of a full disk that an error is, or that it came from."""
    while error and getattr(error, "errno", None) != errno.ENOSPC:
        error = error.__cause__ or error.__context__
    return error if isinstance(error, OSError) else None


def _end_on_full_disk(program: str, error: OSError) -> NoReturn:
    where = f" for {error.filename}" if error.filename else ""
    line = f"{program}: no space is left on the disk{where}: make room, and run the command again"
    print(line, file=sys.stderr, flush=True)
    os._exit(1)  # what libraries still have to write would fail again, with a traceback each


def _has_devices() -> bool:
    try:
        return bool(jax.devices())
    except (RuntimeError, AssertionError):
        return False


def _exit(line: str, status: int) -> NoReturn:
    print(" ".join(line.split()), file=sys.stderr, flush=True)
    sys.exit(status)

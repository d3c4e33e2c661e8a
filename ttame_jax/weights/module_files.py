"""Backbones that a function in a user's Python file returns, named "FILE.py:FUNCTION".

The code of a file runs only when the user names it, in a call or on the command line. Loading a run
does not run the code that its ``config.json`` names.
"""

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from ttame_jax.backbones import Backbone


def parse(name: str) -> tuple[Path, str] | None:
    """The file and the function of a name; None for other names."""
    path, _, function = name.rpartition(":")
    return (Path(path), function) if path.endswith(".py") else None


def load(path: Path, function: str, options: Mapping[str, Any]) -> Backbone:
    """The backbone that a function of a Python file returns.

    Raises:
      FileNotFoundError: see `call`.
      ValueError: see `call`; or the function returns no `Backbone`.
    """
    backbone = call(path, function, options)
    if not isinstance(backbone, Backbone):
        raise ValueError(  # noqa: TRY004
            f"{path}: {function} must return a Backbone (see ttame_jax.from_nnx, from_linen, "
            f"from_equinox, from_keras and FunctionBackbone), not a {type(backbone).__name__}"
        )
    return backbone


def call(path: Path, function: str, options: Mapping[str, Any]) -> Any:
    """Calls a function of a Python file with options.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file or the function fails, in which case the message names the line; the file
        has no such function; or it does not take the options.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: FILE.py:FUNCTION names a Python file")
    with _imports_beside(path):
        return _call(path, function, options)


def _call(path: Path, function: str, options: Mapping[str, Any]) -> Any:
    module = _run(path)
    make = getattr(module, function, None)
    if not callable(make):
        defined = [n for n, v in vars(module).items() if inspect.isfunction(v)]
        raise ValueError(  # noqa: TRY004
            f"{path} has no function {function!r}; it has {', '.join(defined) or 'none'}"
        )
    try:
        bound = inspect.signature(make).bind(**options)
    except TypeError as error:
        raise ValueError(
            f"{path}: {function}{inspect.signature(make)} cannot be called with "
            f"{', '.join(options) or 'no options'}: {error}"
        ) from None
    with _one_line_errors(path):
        return make(*bound.args, **bound.kwargs)


def _run(path: Path) -> ModuleType:
    """The module of a file."""
    spec = importlib.util.spec_from_file_location(f"_ttame_jax_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # of a path that ends with .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # where dataclasses look their types up
    with _one_line_errors(path):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _imports_beside(path: Path) -> Iterator[None]:
    """Lets the file and its function import the files beside it."""
    before, sys.path = sys.path, [str(path.resolve().parent), *sys.path]
    try:
        yield
    finally:
        sys.path = before


@contextmanager
def _one_line_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of the user's code
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if _same(f, path)]
        if isinstance(error, SyntaxError):
            lines.append(error.lineno)
        line = f", line {lines[-1]}" if lines else ""
        text = " ".join(str(error).split())
        raise ValueError(f"{path}{line}: {type(error).__name__}: {text}") from error


def _same(frame: traceback.FrameSummary, path: Path) -> bool:
    return Path(frame.filename).resolve() == path.resolve()

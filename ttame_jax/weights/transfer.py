"""Transfers parameters between PyTorch state dicts and Flax modules, exactly and completely."""

import functools
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ttame_jax import files
from ttame_jax.backbones import Backbone, family_of
from ttame_jax.backbones.imported import ImportedBackbone
from ttame_jax.backbones.tensors import SAME, Entry, Table, Transform
from ttame_jax.errors import Damaged
from ttame_jax.files import Tensors

Module = TypeVar("Module", bound=nnx.Module)

BODY = "generic.body."
"""Prefix of the backbone's keys in a checkpoint of the authors' code."""


def parameters(module: nnx.Module) -> dict[str, jax.Array | jax.ShapeDtypeStruct]:
    """Parameters and statistics of a module (also an abstract one) by dotted path."""
    flat = nnx.to_flat_state(nnx.state(module))
    return {".".join(map(str, path)): variable.get_value() for path, variable in flat}


def digest(module: nnx.Module) -> str:
    """A digest of a module's parameters and statistics with their paths, and of its graph if it was
    imported."""
    parts = [
        part
        for path, value in sorted(parameters(module).items())
        for part in (path, np.asarray(value))
    ]
    if isinstance(module, ImportedBackbone):
        parts += [module.description.graph, *module.feature_layers]
    return files.digest(parts)


def tables(backbone: Backbone) -> dict[str, Table]:
    """The table of each library that has the family, by the library's name."""
    libraries = family_of(backbone).libraries
    return {name: library.tensors(backbone) for name, library in libraries.items()}


def layouts(backbone: Backbone) -> dict[str, Table]:
    """Those `tables` that hold every parameter: torchvision lacks what timm adds to a family."""
    paths = parameters(backbone).keys()
    return {
        name: table
        for name, table in tables(backbone).items()
        if {entry.flax_path for entry in table if entry.flax_path} == paths
    }


def to_torch(backbone: Backbone, layout: str) -> Tensors:
    """The backbone's state dict in the layout "torchvision" or "timm".

    Raises:
      ValueError: the backbone does not exist in that layout.
    """
    tables = layouts(backbone)
    if layout not in tables:
        raise ValueError(f"{backbone.name} has no layout {layout!r}, only {', '.join(tables)}")
    return export(backbone, tables[layout])


def shapes(backbone: Backbone, layout: str) -> dict[str, tuple[int, ...]]:
    """The shapes of the state dict of a backbone (also an abstract one) in a layout."""
    values = parameters(backbone)
    return {
        key: _torch_shape(transform, values[path].shape if path else ())
        for key, path, transform in tables(backbone)[layout]
    }


@functools.cache  # the layers of a backbone have few different shapes
def _torch_shape(transform: Transform, shape: tuple[int, ...]) -> tuple[int, ...]:
    return jax.eval_shape(transform.to_torch, jax.ShapeDtypeStruct(shape, np.float32)).shape


def export(module: nnx.Module, table: Table) -> Tensors:
    """A module's state dict by a table: float32, and int64 for integers."""
    values = parameters(module)
    return {
        key: _torch_type(transform.to_torch(np.asarray(values[path] if path else 0)))
        for key, path, transform in table
    }


def _torch_type(value: np.ndarray) -> np.ndarray:
    return np.asarray(value, np.int64 if value.dtype.kind == "i" else None, order="C")


def to_flax(
    backbone: Backbone, tensors: Mapping[str, np.ndarray], source: str = "weights"
) -> Tensors:
    """Converts a state dict to arrays by Flax path, complete for `backbone`.

    Args:
      backbone: gives structure and shapes; an abstract one (`nnx.eval_shape`) will do.
      tensors: in torchvision's, timm's or our own layout, which is recognised from the keys. A
        prefix `module.`, `model.` or `generic.body.` is dropped.
      source: what to call the tensors in an error.

    Raises:
      ValueError: naming the tensors that are missing, left over or of another shape.
    """
    tensors = _plain_keys(backbone, tensors, source)
    table = _recognise(backbone, tensors, source)
    return complete(backbone, table, tensors, f"{source} does not fit {backbone.name}")


def complete(module: nnx.Module, table: Table, tensors: Tensors, misfit: str) -> Tensors:
    """Converts a state dict to arrays by Flax path, complete for `module`, using a table.

    Floating-point tensors become float32. A missing counter is zero.

    Raises:
      ValueError: beginning with `misfit`, and naming the tensors that are missing, left over
        or of another shape.
    """
    needed = parameters(module)
    known = {entry.torch_key for entry in table}
    missing = [e.torch_key for e in table if e.torch_key not in tensors and not _counts(e, needed)]
    extra = [key for key in tensors if key not in known]
    if missing or extra:
        problems = [
            f"{kind} {_some(keys)}"
            for kind, keys in (("lacks", missing), ("has unknown", extra))
            if keys
        ]
        raise ValueError(f"{misfit}: it {' and '.join(problems)}")
    zero = np.zeros((), np.int32)
    return {
        entry.flax_path: _cross(
            module, entry, tensors.get(entry.torch_key, zero), needed[entry.flax_path], misfit
        )
        for entry in table
        if entry.flax_path
    }


def fill(module: Module, tensors: Mapping[str, np.ndarray]) -> Module:
    """Sets the parameters of a module (also an abstract one) to the given arrays by path."""
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(module))]
    values = {path: jnp.asarray(tensors[".".join(map(str, path))]) for path in paths}
    nnx.update(module, nnx.from_flat_state(values))
    return module


def abstract(build: Callable[[nnx.Rngs], Module]) -> Module:
    """The module that `build` returns, with shapes in place of values, as `nnx.eval_shape` gives."""
    return nnx.eval_shape(lambda: build(_SameKey()))


class _SameKey(nnx.Rngs):
    """Gives every parameter the same key. Counting keys would be traced, at twice the time."""

    def params(self) -> jax.Array:
        return jax.random.key(0)


def _counts(entry: Entry, needed: Mapping) -> bool:
    """Whether it is the number of batches of a BatchNorm, which older files lack."""
    return entry.flax_path is None or needed[entry.flax_path].dtype == np.int32


def _plain_keys(backbone: Backbone, tensors: Mapping[str, np.ndarray], source: str) -> Tensors:
    if any(key.startswith(BODY) for key in tensors):
        tensors = {key: value for key, value in tensors.items() if key.startswith(BODY)}
    for prefix in ("module.", "model.", BODY):
        if tensors and all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    if huggingface := family_of(backbone).huggingface:
        tensors = huggingface.renamed(dict(tensors))
    torchvision, timm = family_of(backbone).torchvision, family_of(backbone).timm
    if timm:
        tensors = {k: value for k, value in tensors.items() if not k.endswith(timm.derived)}
    renamed = torchvision.renamed if torchvision else str
    plain = {renamed(key): value for key, value in tensors.items()}
    if len(plain) < len(tensors):
        twice = [key for key in tensors if key != renamed(key) and renamed(key) in tensors]
        raise ValueError(f"{source} holds tensors under an old and a new name: {_some(twice)}")
    return plain


def _recognise(backbone: Backbone, tensors: Tensors, source: str) -> Table:
    """The table that shares the most keys with the tensors."""
    ours = [Entry(path, path, SAME) for path in parameters(backbone)]
    candidates = [*layouts(backbone).values(), ours]
    shared = [sum(entry.torch_key in tensors for entry in table) for table in candidates]
    if not any(shared):
        raise ValueError(
            f"{source} does not fit {backbone.name}: no tensor of it is known "
            f"({_some(list(tensors))})"
        )
    return candidates[int(np.argmax(shared))]


def _cross(module, entry: Entry, tensor: np.ndarray, needed, misfit: str) -> np.ndarray:
    key, path, transform = entry
    fit = getattr(module, "fit_tensor", lambda _, value: value)
    try:
        value = fit(path, transform.to_flax(tensor.astype(needed.dtype, copy=False)))
    except ValueError:  # a transform that cannot even be applied to this shape
        value = None
    if value is not None and value.shape == needed.shape:
        if fault := _fault(tensor, value):
            raise Damaged(f"{misfit}: {key} {fault}")
        return value
    shape = _torch_shape(transform, needed.shape)
    line = f"{misfit}: {key} has shape {list(tensor.shape)}, needed is {list(shape)}"
    classes = getattr(module, "num_classes", None)
    if shape and classes == shape[0] and tensor.shape[1:] == shape[1:]:
        line += f"; for a classifier of {len(tensor)} classes pass num_classes={len(tensor)}"
    raise ValueError(line)


def _fault(tensor: np.ndarray, value: np.ndarray) -> str | None:
    """What is wrong with the numbers of a tensor; `value` is what becomes of it."""
    if value.dtype == np.int32:  # the counter of a BatchNorm, which no output depends on
        return None
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        return f"must be floating-point numbers, not {tensor.dtype}"
    return None if np.isfinite(value).all() else "has values that are not finite"


def _some(keys: list[str], limit: int = 5) -> str:
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more

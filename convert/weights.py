"""Carrying a backbone's parameters across, exactly and completely, by the tables of layouts."""

from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx

from .layouts import LAYOUTS, SAME, Entry, Table, current_key

Tensors = dict[str, np.ndarray]


def parameters(backbone) -> dict[str, jax.Array | jax.ShapeDtypeStruct]:
    """Parameters and statistics of a backbone (abstract ones too) by dotted path."""
    flat = nnx.to_flat_state(nnx.state(backbone))
    return {".".join(map(str, path)): variable.get_value() for path, variable in flat}


def to_torch(backbone, layout: str) -> Tensors:
    """The backbone's state dict in the layout "torchvision" or "timm", float32.

    Raises:
      ValueError: the family does not exist in that layout.
    """
    layouts = LAYOUTS[type(backbone).__name__]
    if layout not in layouts:
        raise ValueError(f"{backbone.name} has no layout {layout!r}, only {', '.join(layouts)}")
    values = parameters(backbone)
    return {
        key: np.zeros((), np.int64)
        if path is None
        else np.ascontiguousarray(transform.to_torch(np.asarray(values[path])))
        for key, path, transform in layouts[layout](backbone)
    }


def to_flax(backbone, tensors: Mapping[str, np.ndarray], source: str = "weights") -> Tensors:
    """A state dict as float32 arrays by Flax path, complete for `backbone`.

    Args:
      backbone: gives structure and shapes; an abstract one (`nnx.eval_shape`) will do.
      tensors: in torchvision's, timm's or our own layout, which is recognised from the keys;
        a prefix `module.` or `model.` on every key is dropped.
      source: what to call the tensors in an error.

    Raises:
      ValueError: naming the tensors that are missing, left over or of another shape.
    """
    tensors = _plain_keys(tensors, source)
    needed = parameters(backbone)
    table = _recognise(backbone, needed, tensors, source)
    known = {entry.torch_key for entry in table}
    missing = [e.torch_key for e in table if e.flax_path and e.torch_key not in tensors]
    extra = [key for key in tensors if key not in known]
    if missing or extra:
        problems = [
            f"{kind} {_some(keys)}"
            for kind, keys in (("lacks", missing), ("has unknown", extra))
            if keys
        ]
        raise ValueError(f"{source} does not fit {backbone.name}: it {' and '.join(problems)}")
    return {
        entry.flax_path: _cross(
            backbone, entry, tensors[entry.torch_key], needed[entry.flax_path], source
        )
        for entry in table
        if entry.flax_path
    }


def _plain_keys(tensors: Mapping[str, np.ndarray], source: str) -> Tensors:
    for prefix in ("module.", "model."):
        if tensors and all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    plain = {current_key(key): value for key, value in tensors.items()}
    if len(plain) < len(tensors):
        twice = [key for key in tensors if key != current_key(key) and current_key(key) in tensors]
        raise ValueError(f"{source} holds tensors under an old and a new name: {_some(twice)}")
    return plain


def _recognise(backbone, needed: Mapping, tensors: Tensors, source: str) -> Table:
    """The table that shares most keys with the tensors."""
    layouts = LAYOUTS[type(backbone).__name__]
    tables = [table(backbone) for table in layouts.values()]
    tables.append([Entry(path, path, SAME) for path in needed])
    shared = [sum(entry.torch_key in tensors for entry in table) for table in tables]
    if not any(shared):
        raise ValueError(
            f"{source} does not fit {backbone.name}: no tensor of it is known "
            f"({_some(list(tensors))})"
        )
    return tables[int(np.argmax(shared))]


def _cross(backbone, entry: Entry, tensor: np.ndarray, needed, source: str) -> np.ndarray:
    key, path, transform = entry
    try:
        value = backbone.fit_tensor(path, transform.to_flax(tensor.astype(np.float32, copy=False)))
    except ValueError:  # a transform that cannot even be applied to this shape
        value = None
    if value is not None and value.shape == needed.shape:
        return value
    shape = jax.eval_shape(transform.to_torch, jax.ShapeDtypeStruct(needed.shape, np.float32)).shape
    line = (
        f"{source} does not fit {backbone.name}: {key} has shape {list(tensor.shape)}, "
        f"needed is {list(shape)}"
    )
    if backbone.num_classes == shape[0] and tensor.shape[1:] == shape[1:]:
        line += f"; for a classifier of {len(tensor)} classes pass num_classes={len(tensor)}"
    raise ValueError(line)


def _some(keys: list[str], limit: int = 5) -> str:
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more

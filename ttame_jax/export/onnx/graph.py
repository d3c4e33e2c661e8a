"""An ONNX graph in the making, and values in it.

Values that a node would only rearrange are kept as they are until one needs them otherwise. Images
stay channels-first between convolutions, which is ONNX's layout, and broadcasting is left to the
nodes. ONNX Runtime can then fuse convolutions with what follows them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

OPSET, IR_VERSION = 20, 9  # ONNX 1.15; ONNX Runtime 1.17 and later read them
TO_NCHW = (0, 3, 1, 2)


class Unsupported(Exception):
    """An operation has no equivalent in ONNX."""


@dataclasses.dataclass(frozen=True)
class Value:
    """An array of the program, either known or computed by the graph.

    Attributes:
      data: its values, or its name in the graph.
      shape: its shape in the program, but 1 along axes that still have to be broadcast.
      nchw: whether an array [B, H, W, C] of the program is stored as [B, C, H, W].
      grid: an array [B, H, W, C] that this one reshapes to [B H W, C]; `data` is not used then.
    """

    data: Any
    shape: tuple[Any, ...]
    nchw: bool = False
    grid: Value | None = None

    @property
    def known(self) -> bool:
        return isinstance(self.data, np.ndarray)

    def stored(self, axis: int) -> int:
        """Where an axis of the program is stored."""
        return TO_NCHW.index(axis) if self.nchw else axis


def constant(array: Any) -> Value:
    array = np.asarray(array)
    return Value(array, array.shape)


def is_static(shape: Sequence[Any]) -> bool:
    return all(isinstance(size, int) for size in shape)


class Graph:
    """An ONNX graph in the making.

    Args:
      inputs: shapes and dtypes by name. Their symbolic sizes are those of the whole graph.
    """

    def __init__(self, inputs: dict[str, jax.ShapeDtypeStruct]):
        self.nodes, self.weights, self.names = [], [], {}
        self.structs = inputs
        self.inputs = {name: Value(name, struct.shape) for name, struct in inputs.items()}

    def model(self, outputs: dict[str, tuple[Value, jax.ShapeDtypeStruct]]):
        """The model, with given values and their shapes as outputs."""
        from onnx import checker, helper

        for name, (value, struct) in outputs.items():
            source = self.name(self.plain(self.full(value, struct.shape)))
            self.nodes.append(helper.make_node("Identity", [source], [name]))

        def info(name, struct):
            sizes = [size if isinstance(size, int) else str(size) for size in struct.shape]
            kind = helper.np_dtype_to_tensor_dtype(np.dtype(struct.dtype))
            return helper.make_tensor_value_info(name, kind, sizes)

        graph = helper.make_graph(
            self.nodes,
            "explainer",
            [info(name, struct) for name, struct in self.structs.items()],
            [info(name, struct) for name, (_, struct) in outputs.items()],
            self.weights,
        )
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="ttame_jax"
        )
        checker.check_model(model)
        return model

    def node(
        self, op: str, inputs: Sequence[Value], shape: Sequence[Any], nchw=False, **attributes
    ) -> Value:
        """Adds a node whose inputs have the right form; returns its output."""
        return self.multiple(op, inputs, [shape], nchw, **attributes)[0]

    def multiple(self, op, inputs, shapes, nchw=False, **attributes) -> list[Value]:
        """Adds a node with several outputs."""
        from onnx import helper

        names = [self.name(value) for value in inputs]
        outputs = [f"v{len(self.nodes)}_{i}" for i in range(len(shapes))]
        # ONNX Runtime 1.20 gives two nodes one name if they have none.
        self.nodes.append(helper.make_node(op, names, outputs, outputs[0], **attributes))
        return [Value(output, tuple(shape), nchw) for output, shape in zip(outputs, shapes)]

    def name(self, value: Value) -> str:
        """The name of a value as it is stored."""
        if not value.known:
            return value.data
        array = np.ascontiguousarray(value.data).reshape(value.data.shape)
        key = (array.dtype, array.shape, array.tobytes() if array.size < 64 else id(value.data))
        if key not in self.names:
            from onnx import numpy_helper

            self.names[key] = (f"c{len(self.names)}", value.data)  # keeps the id in use
            self.weights.append(numpy_helper.from_array(array, self.names[key][0]))
        return self.names[key][0]

    # Values in the form that a node needs.

    def plain(self, value: Value) -> Value:
        """The value in the layout of the program."""
        if value.grid is not None:
            return self.reshaped(self.plain(value.grid), value.shape)
        return self.permuted(value, range(len(value.shape))) if value.nchw else value

    def permuted(self, value: Value, axes: Sequence[int]) -> Value:
        """The plain value with permuted axes."""
        if value.grid is not None:
            value = self.plain(value)
        shape = tuple(value.shape[axis] for axis in axes)
        stored = [value.stored(axis) for axis in axes]
        if value.known:
            return Value(value.data.transpose(stored), shape)
        if stored == list(range(len(stored))):
            return Value(value.data, shape)
        return self.node("Transpose", [value], shape, perm=stored)

    def channels_first(self, value: Value) -> Value:
        """An array [B, H, W, C] stored as [B, C, H, W]."""
        if value.nchw:
            return value
        return dataclasses.replace(self.permuted(value, TO_NCHW), shape=value.shape, nchw=True)

    def same_layout(self, values: Sequence[Value]) -> tuple[list[Value], bool]:
        """Values of one rank in one layout, and whether it is channels-first."""
        nchw = any(value.nchw for value in values)
        form = self.channels_first if nchw else self.plain
        return [form(value) if len(value.shape) else value for value in values], nchw

    def full(self, value: Value, shape: Sequence[Any]) -> Value:
        """The value, broadcast to its shape in the program."""
        if value.shape == tuple(shape):
            return value
        value = self.plain(value)
        if value.known and is_static(shape):
            return constant(np.broadcast_to(value.data, shape))
        return self.node("Expand", [value, self.sizes(shape)], shape)

    def reshaped(self, value: Value, shape: Sequence[Any]) -> Value:
        """The plain, fully broadcast value in another shape."""
        if value.known:
            return Value(value.data.reshape(shape), tuple(shape))
        return self.node("Reshape", [value, self.sizes(shape, guess=True)], shape)

    def sizes(self, shape: Sequence[Any], guess: bool = False) -> Value:
        """A shape as an array. With `guess`, a symbolic size is -1: the only one or no input's."""
        symbolic = [size for size in shape if not isinstance(size, int)]
        if guess and len(symbolic) > 1:  # at most one is a product of the inputs' sizes
            symbolic = [size for size in symbolic if self._source(size) is None]
        guessed = symbolic[0] if guess and symbolic else None
        parts = [self._size(-1 if size is guessed else size) for size in shape]
        if all(part.known for part in parts):
            return constant(np.array([part.data[0] for part in parts], np.int64))
        return self.node("Concat", parts, (len(shape),), axis=0)

    def _size(self, size: Any) -> Value:
        if isinstance(size, int):
            return constant(np.array([size]))
        if (source := self._source(size)) is None:
            raise Unsupported(f"the size {size} is not that of an input")
        name, axis = source
        return self.node("Shape", [self.inputs[name]], (1,), start=axis, end=axis + 1)

    def _source(self, size: Any) -> tuple[str, int] | None:
        """The input and its axis that has a symbolic size."""
        found = (
            (name, struct.shape.index(size))
            for name, struct in self.structs.items()
            if size in struct.shape
        )
        return next(found, None)

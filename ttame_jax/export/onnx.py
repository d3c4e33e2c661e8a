"""ONNX: the operations of a JAX program as nodes of an ONNX graph.

Values that a node would only rearrange are kept as they are until one needs them otherwise. Images
stay channels-first between convolutions, which is ONNX's layout. Matrix products over channels
are 1x1 convolutions again, and broadcasting is left to the nodes. ONNX Runtime can then fuse
convolutions with what follows them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from ttame_jax.errors import Failure
from ttame_jax.explainer import Explainer

from .program import OUTPUTS, metadata, program

OPSET, IR_VERSION = 20, 9  # ONNX 1.15; ONNX Runtime 1.17 and later read them
INPUTS = ("images", "classes")
END = np.iinfo(np.int64).max
TO_NCHW = (0, 3, 1, 2)


def onnx_model(explainer: Explainer, likeliest: int = 1) -> bytes:
    """Exports an explainer as an ONNX model for any number of images and classes.

    Args:
      explainer: with its weights, computing in float32.
      likeliest: see `program`, which also says what the inputs and outputs are.

    Returns:
      The file. `metadata` is in its ``metadata_props``, each value as JSON.

    Raises:
      ValueError: see `program`.
      ImportError: the package onnx is not installed.
      Failure: the method has an operation that ONNX lacks, or its program depends on the number of
        images.
    """
    import onnx

    if explainer.backbone.dtype != np.float32:
        raise Failure(f"ONNX needs a float32 backbone, not {explainer.backbone.dtype}")
    explain, shapes = program(explainer, likeliest)
    jaxpr, structs = jax.make_jaxpr(explain, return_shape=True)(*shapes)
    graph = Graph(dict(zip(INPUTS, shapes)))
    try:
        values = graph.run(jaxpr, [graph.inputs[name] for name in INPUTS])
    except Unsupported as error:
        raise Failure(f"{explainer.method.name} cannot be exported to ONNX: {error}") from None
    outputs = jax.tree.unflatten(jax.tree.structure(structs), values)
    model = graph.model({name: (outputs[name], structs[name]) for name in OUTPUTS})
    details = metadata(explainer, structs["maps"].shape[2:])
    onnx.helper.set_model_props(model, {key: json.dumps(v) for key, v in details.items()})
    return model.SerializeToString()


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

    def run(self, closed: ClosedJaxpr, arguments: Sequence[Value]) -> list[Value]:
        """Adds the operations of a program to the graph; returns its outputs."""
        jaxpr = closed.jaxpr
        known = [constant(value) for value in closed.consts]
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*known, *arguments]))

        def read(atom):
            if isinstance(atom, Literal):
                aval: Any = atom.aval
                return constant(np.asarray(atom.val, aval.dtype))
            return values[atom]

        for equation in jaxpr.eqns:
            results = self.equation(equation, [read(atom) for atom in equation.invars])
            values.update(zip(equation.outvars, results))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, equation, inputs: list[Value]) -> list[Value]:
        name, params = equation.primitive.name, equation.params
        if name in CALLS:
            inner = next(params[key] for key in ("jaxpr", "call_jaxpr") if key in params)
            return self.run(inner, inputs)
        if name == "platform_index":  # ONNX Runtime is none of XLA's platforms
            return [constant(np.int32(params["platforms"].index(None)))]
        if name == "cond" and inputs[0].known:
            return self.run(params["branches"][int(inputs[0].data)], inputs[1:])
        shapes = [variable.aval.shape for variable in equation.outvars]
        if all(value.known for value in inputs) and all(map(_is_static, shapes)):
            return _evaluated(equation, inputs)
        if name not in RULES:
            raise Unsupported(f"ONNX has no operation for JAX's {name}")
        if name not in BROADCASTING:
            inputs = [self.full(x, atom.aval.shape) for x, atom in zip(inputs, equation.invars)]
        output = equation.outvars[0].aval
        result = RULES[name](self, output, *inputs, **params)
        return result if isinstance(result, list) else [result]

    # Values in the form that a node needs.

    def node(self, op: str, inputs: Sequence[Value | None], shape, nchw=False, **attributes):
        """Adds a node whose inputs have the right form; returns its output."""
        return self.multiple(op, inputs, [shape], nchw, **attributes)[0]

    def multiple(self, op, inputs, shapes, nchw=False, **attributes) -> list[Value]:
        from onnx import helper

        names = [self.name(value) if value else "" for value in inputs]
        outputs = [f"v{len(self.nodes)}_{i}" for i in range(len(shapes))]
        self.nodes.append(helper.make_node(op, names, outputs, **attributes))
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
        stored = [_stored(value, axis) for axis in axes]
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
        if value.known and _is_static(shape):
            return constant(np.broadcast_to(value.data, shape))
        return self.node("Expand", [value, self.sizes(shape)], shape)

    def reshaped(self, value: Value, shape: Sequence[Any]) -> Value:
        """The plain, fully broadcast value in another shape."""
        if value.known:
            return Value(value.data.reshape(shape), tuple(shape))
        return self.node("Reshape", [value, self.sizes(shape, guess=True)], shape)

    def sizes(self, shape: Sequence[Any], guess: bool = False) -> Value:
        """A shape as an array, whose only symbolic size may be left to be guessed as -1."""
        symbolic = [size for size in shape if not isinstance(size, int)]
        if guess and len(symbolic) == 1:
            shape = [size if isinstance(size, int) else -1 for size in shape]
        if _is_static(shape):
            return constant(np.array(shape, np.int64))
        guessed = None
        if guess:  # at most one product of symbolic sizes
            guessed = next((size for size in symbolic if self.axis(size) is None), None)
        parts = [
            constant(np.array([-1 if size is guessed else size], np.int64))
            if size is guessed or isinstance(size, int)
            else self.size(size)
            for size in shape
        ]
        return self.node("Concat", parts, (len(shape),), axis=0)

    def axis(self, size) -> tuple[str, int] | None:
        """The input and its axis that has a symbolic size."""
        return next(
            (
                (name, struct.shape.index(size))
                for name, struct in self.structs.items()
                if size in struct.shape
            ),
            None,
        )

    def size(self, size) -> Value:
        if (found := self.axis(size)) is None:
            raise Unsupported(f"the size {size} is not that of an input")
        name, axis = found
        return self.node("Shape", [self.inputs[name]], (1,), start=axis, end=axis + 1)


CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call")


def constant(array: Any) -> Value:
    array = np.asarray(array)
    return Value(array, array.shape)


def _is_static(shape: Sequence[Any]) -> bool:
    return all(isinstance(size, int) for size in shape)


def _stored(value: Value, axis: int) -> int:
    """Where an axis of the program is stored."""
    return TO_NCHW.index(axis) if value.nchw else axis


NUMPY: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "div": np.divide,
    "mul": np.multiply,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sub": np.subtract,
}
"""What BatchNorms are folded with. JAX would compile each operation for each number of channels."""


def _evaluated(equation, inputs: Sequence[Value]) -> list[Value]:
    arrays = [
        np.broadcast_to(value.data, atom.aval.shape) for value, atom in zip(inputs, equation.invars)
    ]
    function = NUMPY.get(equation.primitive.name)
    if function and arrays[0].dtype == np.float32:
        return [constant(function(*arrays))]
    if equation.primitive.name in ("reshape", "squeeze"):
        return [constant(arrays[0].reshape(equation.outvars[0].aval.shape))]
    if equation.primitive.name == "broadcast_in_dim" and not arrays[0].ndim:
        return [constant(np.broadcast_to(arrays[0], equation.outvars[0].aval.shape))]
    with jax.default_matmul_precision("highest"):
        results = equation.primitive.bind(*arrays, **equation.params)
    return [constant(x) for x in (results if equation.primitive.multiple_results else [results])]


# Rules: (graph, the output's shape and dtype, inputs, parameters) -> the output.

Rule = Callable[..., Value | list[Value]]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def add(function):
        RULES.update(dict.fromkeys(names, function))
        return function

    return add


def pointwise(op: str, graph: Graph, *values: Value, **attributes: Any) -> Value:
    """A node that broadcasts its inputs."""
    inputs, nchw = graph.same_layout(values)
    rank = max(len(value.shape) for value in inputs)
    shapes = [value.shape or (1,) * rank for value in inputs]
    shape = [next((size for size in sizes if size != 1), 1) for sizes in zip(*shapes)]
    return graph.node(op, inputs, shape, nchw, **attributes)


POINTWISE = {
    "abs": "Abs",
    "add": "Add",
    "add_any": "Add",
    "and": "And",
    "div": "Div",
    "eq": "Equal",
    "erf": "Erf",
    "exp": "Exp",
    "floor": "Floor",
    "ge": "GreaterOrEqual",
    "gt": "Greater",
    "le": "LessOrEqual",
    "log": "Log",
    "logistic": "Sigmoid",
    "lt": "Less",
    "min": "Min",
    "mul": "Mul",
    "neg": "Neg",
    "not": "Not",
    "or": "Or",
    "pow": "Pow",
    "sign": "Sign",
    "sqrt": "Sqrt",
    "sub": "Sub",
    "tanh": "Tanh",
}
for name, op in POINTWISE.items():
    RULES[name] = lambda graph, output, *values, op=op, **_: pointwise(op, graph, *values)


@rule("stop_gradient", "copy", "copy_p")
def _same(graph, output, value, **_):
    return value


@rule("max")
def _max(graph, output, x, y):
    for value, other in ((x, y), (y, x)):
        if other.known and not other.data.any():
            return pointwise("Relu", graph, value)
    return pointwise("Max", graph, x, y)


@rule("ne")
def _not_equal(graph, output, x, y):
    return pointwise("Not", graph, pointwise("Equal", graph, x, y))


@rule("square")
def _square(graph, output, x):
    return pointwise("Mul", graph, x, x)


@rule("integer_pow")
def _integer_power(graph, output, x, y):
    return pointwise("Pow", graph, x, constant(np.array(y, output.dtype)))


@rule("rsqrt")
def _rsqrt(graph, output, x, **_):
    return pointwise("Reciprocal", graph, pointwise("Sqrt", graph, x))


@rule("erfc")
def _erfc(graph, output, x):
    one = constant(np.array(1, output.dtype))
    return pointwise("Sub", graph, one, pointwise("Erf", graph, x))


@rule("select_n")
def _select(graph, output, condition, *cases):
    if len(cases) != 2:
        raise Unsupported("ONNX selects between two values only")
    return pointwise("Where", graph, condition, *reversed(cases))


@rule("convert_element_type")
def _cast(graph, output, x, **_):
    from onnx import helper

    kind = helper.np_dtype_to_tensor_dtype(np.dtype(output.dtype))
    return pointwise("Cast", graph, x, to=kind)


@rule("broadcast_in_dim")
def _broadcast_in_dim(graph, output, x, *_, shape, broadcast_dimensions, **__):
    if len(shape) == len(x.shape):
        return x
    x = graph.plain(x)
    sizes = [1] * len(shape)
    for size, axis in zip(x.shape, broadcast_dimensions):
        sizes[axis] = size
    if x.known:
        return Value(x.data.reshape(sizes), tuple(sizes))
    new = [axis for axis in range(len(shape)) if axis not in broadcast_dimensions]
    return graph.node("Unsqueeze", [x, constant(np.array(new))], sizes)


def reduction(op: str) -> Rule:
    def reduce(graph, output, x, axes, **_):
        left = [axis for axis in range(len(x.shape)) if axis not in axes]
        if x.grid is not None or sorted(left, key=lambda axis: _stored(x, axis)) != left:
            x = graph.plain(x)
        stored = constant(np.array([_stored(x, axis) for axis in axes]))
        return graph.node(op, [x, stored], [x.shape[axis] for axis in left], keepdims=0)

    return reduce


for name, op in {"reduce_sum": "Sum", "reduce_max": "Max", "reduce_min": "Min"}.items():
    RULES[name] = reduction(f"Reduce{op}")


@rule("reshape")
def _reshape(graph, output, x, *_, new_sizes, **__):
    if x.grid is not None and x.grid.shape == tuple(new_sizes):
        return x.grid
    if x.nchw and len(new_sizes) == 2 and new_sizes[1] == x.shape[3]:
        return Value(None, tuple(new_sizes), grid=x)
    return graph.reshaped(graph.plain(x), new_sizes)


@rule("squeeze")
def _squeeze(graph, output, x, dimensions):
    return graph.node("Squeeze", [graph.plain(x), constant(np.array(dimensions))], output.shape)


@rule("transpose")
def _transpose(graph, output, x, permutation):
    return graph.permuted(x, permutation)


@rule("concatenate")
def _concatenate(graph, output, *values, dimension):
    values, nchw = graph.same_layout(values)
    axis = TO_NCHW.index(dimension) if nchw else dimension
    return graph.node("Concat", values, output.shape, nchw, axis=axis)


@rule("slice")
def _slice(graph, output, x, start_indices, limit_indices, strides):
    strides = strides or (1,) * len(x.shape)
    return _sliced(graph, x, start_indices, limit_indices, strides, output.shape)


def _sliced(graph, x, starts, ends, strides, shape):
    x = graph.plain(x) if x.grid is not None else x
    cuts = [
        # An end at the size of an axis is written as END, because it may be symbolic.
        (start, END if end == size else end, _stored(x, axis), stride)
        for axis, (start, end, size, stride) in enumerate(zip(starts, ends, x.shape, strides))
        if (start, end, stride) != (0, size, 1)
    ]
    if not all(map(_is_static, cuts)):
        raise Unsupported("a slice depends on the number of images or classes")
    if not cuts:
        return x
    parts = [constant(np.array(numbers, np.int64)) for numbers in zip(*cuts)]
    return graph.node("Slice", [x, *parts], shape, x.nchw)


@rule("pad")
def _pad(graph, output, x, fill, padding_config):
    if any(interior for *_, interior in padding_config):
        raise Unsupported("ONNX does not pad between elements")
    x = graph.plain(x)
    lows, highs, _ = zip(*padding_config)
    pads = constant(np.array([*lows, *highs]))
    return graph.node("Pad", [x, pads, fill], output.shape)


@rule("gather")
def _gather(graph, output, x, indices, dimension_numbers, slice_sizes, **_):
    numbers, x = dimension_numbers, graph.plain(x)
    axes, collapsed = numbers.start_index_map, numbers.collapsed_slice_dims
    if indices.known and indices.data.ndim == 1:  # a slice
        starts = dict(zip(axes, map(int, indices.data)))
        starts = [starts.get(axis, 0) for axis in range(len(x.shape))]
        ends = [start + size for start, size in zip(starts, slice_sizes)]
        cut = _sliced(graph, x, starts, ends, (1,) * len(starts), slice_sizes)
        return _squeeze(graph, output, cut, collapsed) if collapsed else cut
    whole = [size for axis, size in enumerate(slice_sizes) if axis not in axes]
    sizes = [size for axis, size in enumerate(x.shape) if axis not in axes]
    if len(axes) != 1 or collapsed != axes or whole != sizes or numbers.operand_batching_dims:
        raise Unsupported("ONNX gathers whole slices of one axis only")
    (axis,), indices = axes, graph.plain(indices)
    indices = graph.reshaped(indices, indices.shape[:-1])
    count = len(indices.shape)
    shape = (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])
    gathered = graph.node("Gather", [x, indices], shape, axis=axis)
    chosen = iter(range(axis, axis + count))
    others = iter([*range(axis), *range(axis + count, len(shape))])
    order = [next(others if i in numbers.offset_dims else chosen) for i in range(len(shape))]
    return graph.permuted(gathered, order)


@rule("top_k")
def _top_k(graph, output, x, k, **_):
    from onnx import TensorProto

    shape = output.shape
    count = constant(np.array([k]))
    values, indices = graph.multiple("TopK", [graph.plain(x), count], [shape, shape])
    return [values, pointwise("Cast", graph, indices, to=TensorProto.INT32)]


@rule("conv_general_dilated")
def _convolution(
    graph,
    output,
    x,
    kernel,
    window_strides,
    padding,
    lhs_dilation,
    rhs_dilation,
    dimension_numbers,
    feature_group_count,
    batch_group_count,
    **_,
):
    specs = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
    if tuple(dimension_numbers) != specs or set(lhs_dilation) != {1} or batch_group_count != 1:
        raise Unsupported("only plain convolutions can be exported")
    (top, bottom), (left, right) = padding
    return graph.node(
        "Conv",
        [graph.channels_first(x), graph.permuted(kernel, (3, 2, 0, 1))],
        output.shape,
        nchw=True,
        strides=window_strides,
        pads=(top, left, bottom, right),
        dilations=rhs_dilation,
        group=feature_group_count,
    )


@rule("reduce_window_max")
def _max_pool(
    graph,
    output,
    x,
    window_dimensions,
    window_strides,
    padding,
    base_dilation,
    window_dilation,
):
    spatial = slice(1, 3)
    if len(x.shape) != 4 or {*base_dilation, *window_dilation} != {1}:
        raise Unsupported("only plain max-pools can be exported")
    (top, bottom), (left, right) = padding[spatial]
    return graph.node(
        "MaxPool",
        [graph.channels_first(x)],
        output.shape,
        nchw=True,
        kernel_shape=window_dimensions[spatial],
        strides=window_strides[spatial],
        pads=(top, left, bottom, right),
    )


@rule("dot_general")
def _product(graph, output, x, y, dimension_numbers, **_):
    (of_x, of_y), (batch_x, batch_y) = dimension_numbers
    image = x.grid or x
    channels = not batch_x and tuple(of_x) == (len(x.shape) - 1,) and tuple(of_y) == (0,)
    if image.nchw and channels and y.known and len(y.shape) == 2:
        kernel = constant(y.data.T[:, :, None, None])
        shape = (*image.shape[:3], y.shape[1])
        result = graph.node("Conv", [image, kernel], shape, nchw=True)
        return Value(None, output.shape, grid=result) if x.grid else result
    free_x = [axis for axis in range(len(x.shape)) if axis not in (*of_x, *batch_x)]
    free_y = [axis for axis in range(len(y.shape)) if axis not in (*of_y, *batch_y)]
    x = graph.permuted(x, [*batch_x, *free_x, *of_x])
    y = graph.permuted(y, [*batch_y, *of_y, *free_y])
    return _matrix_product(graph, x, y, len(batch_x), len(of_x), output.shape)


def _matrix_product(graph, x, y, batch, contracted, shape):
    """x [batch..., rows..., inner...] times y [batch..., inner..., columns...]."""
    end = len(x.shape) - contracted
    inner = (_size(x.shape[end:]),)
    rows, columns = x.shape[batch:end], y.shape[batch + contracted :]
    shared = x.shape[:batch]
    # MatMul broadcasts a matrix y over the rows' axes but for the last.
    if batch or contracted != 1 or not rows:
        rows = (_size(rows),)
    if x.shape != (*shared, *rows, *inner):
        x = graph.reshaped(x, (*shared, *rows, *inner))
    if y.shape != (*shared, *inner, _size(columns)):
        y = graph.reshaped(y, (*shared, *inner, _size(columns)))
    result = graph.node("MatMul", [x, y], (*shared, *rows, _size(columns)))
    return result if result.shape == tuple(shape) else graph.reshaped(result, shape)


def _size(shape: Sequence[Any]) -> Any:
    size = 1
    for length in shape:
        size = size * length
    return size


BROADCASTING = {
    *POINTWISE,
    "broadcast_in_dim",
    "convert_element_type",
    "erfc",
    "integer_pow",
    "max",
}
BROADCASTING |= {"ne", "rsqrt", "select_n", "square", "stop_gradient", "copy", "copy_p"}
"""JAX operations whose rules take inputs that still have to be broadcast."""

"""ONNX nodes for the operations and the named functions of a JAX program.

A rule is a function of the graph, the output's shape and dtype, the inputs, and the parameters of
the JAX operation. It returns the output, or a list of all outputs.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .graph import TO_NCHW, Graph, Unsupported, Value, constant, is_static

Rule = Callable[..., Value | list[Value]]

RULES: dict[str, Rule] = {}
"""By the name of a JAX operation, or by those of a call and its function, as in ``jit[layer_norm]``.
Of other functions the operations are exported."""

BROADCASTING: set[str] = set()
"""Names whose rules take inputs that still have to be broadcast."""

END = np.iinfo(np.int64).max


def rule(name: str, broadcasting: bool = False) -> Callable[[Rule], Rule]:
    def add(function):
        RULES[name] = function
        if broadcasting:
            BROADCASTING.add(name)
        return function

    return add


def pointwise(op: str, graph: Graph, *values: Value, **attributes: Any) -> Value:
    """A node that broadcasts its inputs."""
    inputs, nchw = graph.same_layout(values)
    rank = max(len(value.shape) for value in inputs)
    shapes = [value.shape or (1,) * rank for value in inputs]
    shape = [next((size for size in sizes if size != 1), 1) for sizes in zip(*shapes)]
    if not nchw and not all(value.known for value in inputs):
        inputs = [_operand(value, shape) if value.known else value for value in inputs]
    return graph.node(op, inputs, shape, nchw, **attributes)


def _operand(value: Value, shape: Sequence[Any]) -> Value:
    """A known operand for an output of some shape, in the form that suits ONNX Runtime best."""
    array = value.data
    while array.ndim and len(array) == 1:
        array = array[0]  # biases are fused if they have one axis
    if array.ndim == 1 and len(array) < 16 and len(shape) > 1 and isinstance(shape[-2], int):
        array = np.tile(array, (shape[-2], 1))  # a short last axis is slow to broadcast over
    return constant(array)


POINTWISE = {
    "abs": "Abs",
    "add": "Add",
    "div": "Div",
    "exp": "Exp",
    "gt": "Greater",
    "logistic": "Sigmoid",
    "lt": "Less",
    "max": "Max",
    "min": "Min",
    "mul": "Mul",
    "neg": "Neg",
    "sqrt": "Sqrt",
    "sub": "Sub",
    "tanh": "Tanh",
    "custom_jvp_call[gelu]": "Gelu",
    "custom_jvp_call[relu]": "Relu",
}
for name, op in POINTWISE.items():
    rule(name, broadcasting=True)(
        lambda graph, output, *values, op=op, **_: pointwise(op, graph, *values)
    )


@rule("custom_jvp_call[relu6]", broadcasting=True)
def _relu6(graph, output, x, **_):
    limits = [constant(np.array(limit, output.dtype)) for limit in (0, 6)]
    return pointwise("Clip", graph, x, *limits)


@rule("jit[attention_weights]")
def _attention_weights(graph, output, scores, **_):
    return graph.node("Softmax", [graph.plain(scores)], output.shape, axis=-1)


@rule("jit[layer_norm]")
def _layer_norm(graph, output, x, scale, bias, epsilon, **_):
    inputs, epsilon = [graph.plain(x), scale, bias], float(epsilon.data)
    return graph.node("LayerNormalization", inputs, output.shape, axis=-1, epsilon=epsilon)


@rule("stop_gradient", broadcasting=True)
def _same(graph, output, value, **_):
    return value


@rule("square", broadcasting=True)
def _square(graph, output, x):
    return pointwise("Mul", graph, x, x)


@rule("integer_pow", broadcasting=True)
def _integer_power(graph, output, x, y):
    return pointwise("Pow", graph, x, constant(np.array(y, output.dtype)))


@rule("rsqrt", broadcasting=True)
def _rsqrt(graph, output, x, **_):
    return pointwise("Reciprocal", graph, pointwise("Sqrt", graph, x))


@rule("select_n", broadcasting=True)
def _select(graph, output, condition, *cases):
    if len(cases) != 2:
        raise Unsupported("ONNX selects between two values only")
    return pointwise("Where", graph, condition, *reversed(cases))


@rule("broadcast_in_dim", broadcasting=True)
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


def _reduce(op, graph, x, axes):
    left = [axis for axis in range(len(x.shape)) if axis not in axes]
    if x.grid is not None or sorted(left, key=x.stored) != left:
        x = graph.plain(x)
    stored = constant(np.array([x.stored(axis) for axis in axes]))
    return graph.node(op, [x, stored], [x.shape[axis] for axis in left], keepdims=0)


for name, op in {"reduce_sum": "Sum", "reduce_max": "Max", "reduce_min": "Min"}.items():
    rule(name)(lambda graph, output, x, axes, op=f"Reduce{op}", **_: _reduce(op, graph, x, axes))


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
        (start, END if end == size else end, x.stored(axis), stride)
        for axis, (start, end, size, stride) in enumerate(zip(starts, ends, x.shape, strides))
        if (start, end, stride) != (0, size, 1)
    ]
    if not all(map(is_static, cuts)):
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
def _max_pool(graph, output, x, **window):
    return _pool("MaxPool", graph, output, x, **window)


@rule("reduce_window_sum")
def _sum_pool(graph, output, x, **window):
    average = _pool("AveragePool", graph, output, x, **window, count_include_pad=1)
    count = math.prod(window["window_dimensions"])
    return pointwise("Mul", graph, average, constant(np.array(count, output.dtype)))


def _pool(
    op,
    graph,
    output,
    x,
    window_dimensions,
    window_strides,
    padding,
    base_dilation,
    window_dilation,
    **attributes,
):
    spatial = slice(1, 3)
    is_image = len(window_dimensions) == 4 and window_dimensions[::3] == (1, 1)
    if not is_image or {*base_dilation, *window_dilation} != {1}:
        raise Unsupported("only plain pooling of images can be exported")
    (top, bottom), (left, right) = padding[spatial]
    return graph.node(
        op,
        [graph.channels_first(x)],
        output.shape,
        nchw=True,
        kernel_shape=window_dimensions[spatial],
        strides=window_strides[spatial],
        pads=(top, left, bottom, right),
        **attributes,
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
    inner = (math.prod(x.shape[end:]),)
    rows, columns = x.shape[batch:end], y.shape[batch + contracted :]
    shared = x.shape[:batch]
    # MatMul broadcasts a matrix y over the rows' axes but for the last.
    if batch or contracted != 1 or not rows:
        rows = (math.prod(rows),)
    if x.shape != (*shared, *rows, *inner):
        x = graph.reshaped(x, (*shared, *rows, *inner))
    if y.shape != (*shared, *inner, math.prod(columns)):
        y = graph.reshaped(y, (*shared, *inner, math.prod(columns)))
    result = graph.node("MatMul", [x, y], (*shared, *rows, math.prod(columns)))
    return result if result.shape == tuple(shape) else graph.reshaped(result, shape)

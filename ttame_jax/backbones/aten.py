"""PyTorch's ATen operators in JAX, in inference mode.

Names, arguments and semantics are those of PyTorch's operator schemas. Arrays of images are
channels-first there, [1, C, H, W]. Convolutions, pools and their like are computed channels-last,
as everywhere in this project: a `ChannelsLast` is such an array as it is stored.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ttame_jax.compilers import convolve, depthwise_convolve, gelu, layer_norm

Operator = Callable[..., Any]


class ChannelsLast(NamedTuple):
    """An array that PyTorch sees as [1, C, H, W], stored as [1, H, W, C]."""

    array: jax.Array


class Kernel(NamedTuple):
    """A weight that PyTorch sees as [out, in, ...], stored as [..., in, out]."""

    array: jax.Array


def plain(x: Any) -> Any:
    """An argument as PyTorch sees it."""
    if isinstance(x, ChannelsLast):
        return x.array.transpose(0, 3, 1, 2)
    if isinstance(x, Kernel):
        axes = x.array.ndim
        return x.array.transpose(axes - 1, axes - 2, *range(axes - 2))
    return [plain(item) for item in x] if isinstance(x, list) else x


def channels_last(x: Any) -> jax.Array:
    """An array [1, C, H, W], or one that is broadcast to such an array, as it is stored."""
    if isinstance(x, ChannelsLast):
        return x.array
    return x.reshape((1,) * (4 - x.ndim) + x.shape).transpose(0, 2, 3, 1)


def kernel(weight: Any) -> jax.Array:
    """A weight [out, in, ...] as [..., in, out]."""
    if isinstance(weight, Kernel):
        return weight.array
    return weight.transpose(*range(2, weight.ndim), 1, 0)


def apply(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Applies an operator of `OPERATORS` to arrays in either layout."""
    if name in _BY_LAYOUT:
        return _BY_LAYOUT[name](*args, **kwargs)
    if name in _POINTWISE:
        return _pointwise(_POINTWISE[name], args, kwargs)
    plain_kwargs = {key: plain(value) for key, value in kwargs.items()}
    return _PLAIN[name](*map(plain, args), **plain_kwargs)


def _pointwise(function: Operator, args, kwargs):
    small = all(x.ndim <= 4 for x in args if isinstance(x, jax.Array))
    if not small or not any(isinstance(x, ChannelsLast) for x in args):
        return function(*map(plain, args), **kwargs)
    arrays = ChannelsLast | jax.Array
    return ChannelsLast(
        function(*(channels_last(x) if isinstance(x, arrays) else x for x in args), **kwargs)
    )


_STORED = (0, 3, 1, 2)
"""The stored axis of each axis of [1, C, H, W]."""


def _along(function: Operator) -> Operator:
    """A reduction ``function(x, dim, keepdim)`` in the layout that its input is stored in."""

    def reduce(x, dim=None, keepdim=False, **kwargs):
        axes = _axes(dim, 4)
        if isinstance(x, ChannelsLast) and (keepdim or axes == (2, 3)):
            stored = tuple(_STORED[axis] for axis in axes)
            y = function(x.array, stored, keepdim, **kwargs)
            return ChannelsLast(y) if keepdim else y
        x = plain(x)
        return function(x, _axes(dim, x.ndim), keepdim, **kwargs)

    return reduce


def _axes(dim: int | Sequence[int] | None, ndim: int) -> tuple[int, ...]:
    dims = range(ndim) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    return tuple(sorted(axis % ndim for axis in dims))


def _spatial(function: Operator) -> Operator:
    """An operator on images [1, H, W, C], or [H, W, C] of PyTorch's [C, H, W]."""

    def on_images(x, *args, **kwargs):
        if not isinstance(x, ChannelsLast) and x.ndim == 3:
            return plain(ChannelsLast(function(channels_last(x[None]), *args, **kwargs)))[0]
        return ChannelsLast(function(channels_last(x), *args, **kwargs))

    return on_images


# Convolutions and linear layers


def _convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    axes = (x.array if isinstance(x, ChannelsLast) else x).ndim - 2
    stride, padding, dilation, output_padding = (
        _repeated(value, axes) for value in (stride, padding, dilation, output_padding)
    )
    if axes != 2 or transposed:
        y = _general_convolution(
            plain(x), plain(weight), stride, padding, dilation, transposed, output_padding, groups
        )
        return y if bias is None else y + bias.reshape(-1, *(1,) * axes)
    x, weight = channels_last(x), kernel(weight)
    rows, columns = padding
    pads = ((rows, rows), (columns, columns))
    if dilation == (1, 1) and groups == 1:
        y = convolve(x, weight, stride, pads)
    elif dilation == (1, 1) and groups == x.shape[-1] == weight.shape[-1]:
        y = depthwise_convolve(x, weight, stride, pads)
    else:
        y = jax.lax.conv_general_dilated(
            x,
            weight,
            stride,
            pads,
            rhs_dilation=dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
    return ChannelsLast(y if bias is None else y + bias)


def _general_convolution(x, weight, stride, padding, dilation, transposed, output_padding, groups):
    """Convolutions of any number of axes, channels-first, and their transposes."""
    if not transposed:
        pads = [(size, size) for size in padding]
        return jax.lax.conv_general_dilated(
            x, weight, stride, pads, rhs_dilation=dilation, feature_group_count=groups
        )
    # weight [in, out / groups, ...] -> [out, in / groups, ...], turned around
    inputs, outputs, *sizes = weight.shape
    weight = weight.reshape(groups, inputs // groups, outputs, *sizes).swapaxes(1, 2)
    weight = weight.reshape(groups * outputs, inputs // groups, *sizes)
    weight = jnp.flip(weight, tuple(range(2, weight.ndim)))
    reach = [d * (size - 1) for d, size in zip(dilation, sizes)]
    pads = [(r - p, r - p + extra) for r, p, extra in zip(reach, padding, output_padding)]
    return jax.lax.conv_general_dilated(
        x,
        weight,
        (1,) * len(sizes),
        pads,
        lhs_dilation=stride,
        rhs_dilation=dilation,
        feature_group_count=groups,
    )


def _repeated(values: int | Sequence[int], count: int) -> tuple[Any, ...]:
    values = [values] if isinstance(values, int) else list(values)
    return tuple(values * count if len(values) == 1 else values)


def _linear(x, weight, bias=None):
    y = plain(x) @ kernel(weight)
    return y if bias is None else y + bias


def _addmm(bias, x, y, *, beta=1, alpha=1):
    return beta * bias + alpha * (x @ y)


def _attention(
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    *,
    scale=None,
    enable_gqa=False,
):
    if enable_gqa:
        key, value = (jnp.repeat(x, query.shape[-3] // x.shape[-3], axis=-3) for x in (key, value))
    scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    if attn_mask is not None:
        masked = attn_mask.dtype == bool
        scores = jnp.where(attn_mask, scores, -jnp.inf) if masked else scores + attn_mask
    return jax.nn.softmax(scores) @ value


# Normalisation


def _batch_norm(x, weight, bias, mean, var, momentum, eps):
    factor = jax.lax.rsqrt(var + eps) * (1 if weight is None else weight)
    shift = (0 if bias is None else bias) - mean * factor
    if isinstance(x, ChannelsLast) or x.ndim == 4:
        return ChannelsLast(channels_last(x) * factor + shift), None, None
    shape = (-1, *(1,) * (x.ndim - 2))
    return x * factor.reshape(shape) + shift.reshape(shape), None, None


def _layer_norm(x, shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
    if len(shape) == 1:
        ones, zeros = jnp.ones(shape, x.dtype), jnp.zeros(shape, x.dtype)
        return layer_norm(
            x, ones if weight is None else weight, zeros if bias is None else bias, eps
        )
    y = _standardised(x, tuple(range(x.ndim - len(shape), x.ndim)), eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _group_norm(x, groups, weight=None, bias=None, eps=1e-5, cudnn_enabled=True):
    y = _standardised(x.reshape(len(x), groups, -1), (2,), eps).reshape(x.shape)
    shape = (-1, *(1,) * (x.ndim - 2))
    y = y if weight is None else y * weight.reshape(shape)
    return y if bias is None else y + bias.reshape(shape)


def _standardised(x, axes, eps):
    return (x - x.mean(axes, keepdims=True)) * jax.lax.rsqrt(x.var(axes, keepdims=True) + eps)


def _rms_norm(x, shape, weight=None, eps=None):
    axes = tuple(range(x.ndim - len(shape), x.ndim))
    eps = jnp.finfo(x.dtype).eps if eps is None else eps
    y = x * jax.lax.rsqrt(jnp.square(x).mean(axes, keepdims=True) + eps)
    return y if weight is None else y * weight


# Pools and interpolation, of images [1, H, W, C]


def _max_pool(x, kernel_size, stride=(), padding=0, dilation=1, ceil_mode=False):
    size, stride, padding, dilation = (
        _repeated(value, 2) for value in (kernel_size, stride or kernel_size, padding, dilation)
    )
    pads = _pool_pads(x, size, stride, padding, dilation, ceil_mode)
    return jax.lax.reduce_window(
        x,
        -jnp.inf,
        jax.lax.max,
        (1, *size, 1),
        (1, *stride, 1),
        ((0, 0), *pads, (0, 0)),
        window_dilation=(1, *dilation, 1),
    )


def _avg_pool(
    x,
    kernel_size,
    stride=(),
    padding=0,
    ceil_mode=False,
    count_include_pad=True,
    divisor_override=None,
):
    size, stride, padding = (
        _repeated(value, 2) for value in (kernel_size, stride or kernel_size, padding)
    )
    pads = _pool_pads(x, size, stride, padding, (1, 1), ceil_mode)

    def total(x, pads):
        windows = (1, *size, 1), (1, *stride, 1), ((0, 0), *pads, (0, 0))
        return jax.lax.reduce_window(x, 0.0, jax.lax.add, *windows)

    if divisor_override is not None:
        return total(x, pads) / divisor_override
    ones = np.ones((1, *x.shape[1:3], 1), x.dtype)
    if count_include_pad:  # what ceil_mode adds beyond the padding does not count
        ones = np.pad(ones, ((0, 0), *((n, n) for n in padding), (0, 0)), constant_values=1)
        counted = [(0, high - n) for n, (_, high) in zip(padding, pads)]
        return total(x, pads) / total(ones, counted)
    return total(x, pads) / total(ones, pads)


def _pool_pads(x, size, stride, padding, dilation, ceil_mode):
    """(before, after) of both axes, such that all windows of PyTorch's fit exactly."""
    return tuple(
        map(partial(_pool_pad, ceil_mode=ceil_mode), x.shape[1:3], size, stride, padding, dilation)
    )


def _pool_pad(length, size, stride, padding, dilation, *, ceil_mode):
    reach = dilation * (size - 1) + 1
    steps = (length + 2 * padding - reach) / stride
    count = (math.ceil(steps) if ceil_mode else math.floor(steps)) + 1
    if ceil_mode and (count - 1) * stride >= length + padding:
        count -= 1  # a window must begin inside the image or its padding
    # JAX cannot differentiate a maximum over windows that leave out the border by negative padding.
    return padding, max((count - 1) * stride + reach - length - padding, 0)


def _adaptive_avg_pool(x, output_size):
    sizes = [
        n if size is None else size for n, size in zip(x.shape[1:3], _repeated(output_size, 2))
    ]
    if sizes == [1, 1]:
        return x.mean((1, 2), keepdims=True)
    return _resampled(x, *(_average_matrix(n, size) for n, size in zip(x.shape[1:3], sizes)))


def _adaptive_max_pool(x, output_size):
    bins = [_bins(n, size) for n, size in zip(x.shape[1:3], _repeated(output_size, 2))]
    rows = [jnp.stack([x[:, a:b, c:d].max((1, 2)) for c, d in bins[1]], axis=1) for a, b in bins[0]]
    return jnp.stack(rows, axis=1)


def _bins(length: int, size: int) -> list[tuple[int, int]]:
    return [(i * length // size, -(-(i + 1) * length // size)) for i in range(size)]


def _average_matrix(length: int, size: int) -> np.ndarray:
    """[size, length]: row i averages the entries of bin i."""
    matrix = np.zeros((size, length), np.float32)
    for row, (start, stop) in zip(matrix, _bins(length, size)):
        row[start:stop] = 1 / (stop - start)
    return matrix


def _resampled(x, rows, columns):
    """Images [1, H, W, C] -> [1, h, w, C], with weights [h, H] and [w, W]."""
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("bhwc,ih,jw->bijc", x, rows, columns, precision=highest).astype(x.dtype)


def _interpolate(
    weights: Callable[[np.ndarray, int], np.ndarray], aligned: bool = True
) -> Operator:
    """Interpolation by one-dimensional weights: (positions [n], length) -> [n, length]."""

    def interpolate(x, output_size, *options):
        align_corners, factors = (options[0] if aligned else False), options[-1]
        factors = factors if isinstance(factors, list) else [None, None]
        sizes = output_size or [int(n * f) for n, f in zip(x.shape[1:3], factors)]
        matrices = []
        for length, size, factor in zip(x.shape[1:3], sizes, factors):
            index = np.arange(size, dtype=np.float64)
            if align_corners:
                position = index * ((length - 1) / max(size - 1, 1))
            else:
                scale = 1 / factor if factor else length / size
                position = index * scale if not aligned else (index + 0.5) * scale - 0.5
            matrices.append(weights(position, length).astype(np.float32))
        return _resampled(x, *matrices)

    return interpolate


def _nearest(position, length):
    return np.eye(length)[np.minimum(np.floor(position).astype(int), length - 1)]


def _bilinear(position, length):
    position = np.maximum(position, 0)
    low = np.minimum(np.floor(position).astype(int), length - 1)
    part = (position - low)[:, None]
    eye = np.eye(length)
    return (1 - part) * eye[low] + part * eye[np.minimum(low + 1, length - 1)]


def _bicubic(position, length):
    low, a, eye = np.floor(position).astype(int), -0.75, np.eye(length)

    def weight(distance):
        d = np.abs(distance)
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        return np.where(d <= 1, near, ((a * d - 5 * a) * d + 8 * a) * d - 4 * a)

    parts = [
        weight(position - low - i)[:, None] * eye[np.clip(low + i, 0, length - 1)]
        for i in range(-1, 3)
    ]
    return np.sum(parts, axis=0)


# Shapes and indices


def _permute(x, dims):
    dims = [dim % len(dims) for dim in dims]
    if isinstance(x, ChannelsLast):
        stored = [_STORED[dim] for dim in dims]
        return x.array if stored == [0, 1, 2, 3] else x.array.transpose(stored)
    return ChannelsLast(x) if dims == [0, 3, 1, 2] else x.transpose(dims)


def _transpose(x, first, second):
    dims = list(range(4 if isinstance(x, ChannelsLast) else x.ndim))
    dims[first], dims[second] = dims[second], dims[first]
    return _permute(x, dims)


def _cat(arrays, dim=0):
    if all(isinstance(x, ChannelsLast) for x in arrays):
        return ChannelsLast(jnp.concatenate([x.array for x in arrays], _STORED[dim]))
    arrays = [x for x in plain(list(arrays)) if x.shape != (0,)]
    return jnp.concatenate(arrays, dim)


def _split_with_sizes(x, sizes, dim=0):
    stops = np.cumsum(sizes)[:-1].tolist()
    if isinstance(x, ChannelsLast):
        return [ChannelsLast(part) for part in jnp.split(x.array, stops, _STORED[dim])]
    return jnp.split(x, stops, dim)


def _split(x, size, dim=0):
    length = (x.array.shape[_STORED[dim]]) if isinstance(x, ChannelsLast) else x.shape[dim]
    count, rest = divmod(length, size)
    return _split_with_sizes(x, [size] * count + [rest] * (rest > 0), dim)


def _slice(x, dim=0, start=None, end=None, step=1):
    part = slice(start, end, step)
    if isinstance(x, ChannelsLast):
        return ChannelsLast(x.array[(slice(None),) * _STORED[dim] + (part,)])
    return x[(slice(None),) * (dim % x.ndim) + (part,)]


def _index(x, indices):
    return x[tuple(slice(None) if index is None else index for index in indices)]


def _index_put(x, indices, values, accumulate=False):
    place = x.at[tuple(slice(None) if index is None else index for index in indices)]
    return place.add(values) if accumulate else place.set(values)


def _unfold(x, dim, size, step):
    dim, starts = dim % x.ndim, np.arange(0, x.shape[dim] - size + 1, step)
    windows = jnp.take(x, starts[:, None] + np.arange(size), axis=dim)  # [..., window, size, ...]
    return jnp.moveaxis(windows, dim + 1, -1)


def _expand(x, sizes, *, implicit=False):
    own = (1,) * (len(sizes) - x.ndim) + x.shape
    return jnp.broadcast_to(x, [n if size == -1 else size for n, size in zip(own, sizes)])


def _pad(x, pad, value=0.0):
    pads = [(0, 0)] * x.ndim
    for i in range(len(pad) // 2):
        pads[-1 - i] = (pad[2 * i], pad[2 * i + 1])
    return jax.lax.pad(x, jnp.asarray(value or 0, x.dtype), [(*ends, 0) for ends in pads])


def _pad_images(mode: str) -> Operator:
    def pad(x, padding):
        left, right, top, bottom = padding
        return jnp.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)), mode=mode)

    return pad


def _squeeze(x, dim=None):
    return x.squeeze(tuple(axis for axis in _axes(dim, x.ndim) if x.shape[axis] == 1))


def _cast(x, dtype=None, **_):
    return x if dtype is None else x.astype(dtype)


def _full(size, value, dtype=None, **_):
    return jnp.full(size, value, dtype)


def _gelu(x, *, approximate="none"):
    return gelu(x) if approximate == "none" else jax.nn.gelu(x, approximate=True)


def _softplus(x, beta=1, threshold=20):
    return jnp.where(x * beta > threshold, x, jax.nn.softplus(x * beta) / beta)


def _elu(x, alpha=1, scale=1, input_scale=1):
    return scale * jnp.where(x > 0, x, alpha * jnp.expm1(jnp.minimum(x * input_scale, 0)))


def _variance(x, axes, keepdim=False, *, correction=1):
    count = math.prod(x.shape[axis] for axis in axes)
    return jnp.square(x - x.mean(axes, keepdims=True)).sum(axes, keepdims=keepdim) / (
        count - (1 if correction is None else correction)
    )


def _vector_norm(x, ord=2, dim=None, keepdim=False, *, dtype=None):
    axes = _axes(dim, x.ndim)
    if ord == 2:  # the gradient at zero is zero, as in PyTorch
        squares = jnp.square(x).sum(axes, keepdims=keepdim)
        return jnp.sqrt(jnp.where(squares > 0, squares, 1)) * (squares > 0)
    return jnp.linalg.vector_norm(x, axis=axes, keepdims=keepdim, ord=ord)


_POINTWISE: dict[str, Operator] = {
    "abs.default": jnp.abs,
    "add.Scalar": lambda x, y, alpha=1: x + alpha * y,
    "add.Tensor": lambda x, y, *, alpha=1: x + (y if alpha == 1 else alpha * y),
    "alias.default": lambda x: x,
    "bitwise_and.Tensor": jnp.bitwise_and,
    "bitwise_not.default": jnp.bitwise_not,
    "bitwise_or.Tensor": jnp.bitwise_or,
    "clamp.default": lambda x, min=None, max=None: jnp.clip(x, min, max),
    "clamp_min.default": jnp.maximum,
    "clamp_max.default": jnp.minimum,
    "clone.default": lambda x, **_: x,
    "_to_copy.default": _cast,
    "copy.default": lambda x, y, *_: jnp.broadcast_to(y, x.shape).astype(x.dtype),
    "cos.default": jnp.cos,
    "detach.default": lambda x: x,
    "div.Scalar": jnp.divide,
    "div.Tensor": jnp.divide,
    "dropout.default": lambda x, p, train: x,
    "elu.default": _elu,
    "eq.Scalar": jnp.equal,
    "eq.Tensor": jnp.equal,
    "erf.default": jax.lax.erf,
    "exp.default": jnp.exp,
    "expm1.default": jnp.expm1,
    "floor.default": jnp.floor,
    "ge.Scalar": jnp.greater_equal,
    "gelu.default": _gelu,
    "gt.Scalar": jnp.greater,
    "gt.Tensor": jnp.greater,
    "hardsigmoid.default": lambda x: jnp.clip(x / 6 + 0.5, 0, 1),
    "hardswish.default": lambda x: x * jnp.clip(x + 3, 0, 6) / 6,
    "hardtanh.default": lambda x, low=-1.0, high=1.0: jnp.clip(x, low, high),
    "le.Scalar": jnp.less_equal,
    "leaky_relu.default": lambda x, slope=0.01: jnp.where(x > 0, x, slope * x),
    "log.default": jnp.log,
    "log1p.default": jnp.log1p,
    "logical_and.default": jnp.logical_and,
    "logical_not.default": jnp.logical_not,
    "lt.Scalar": jnp.less,
    "lt.Tensor": jnp.less,
    "masked_fill.Scalar": lambda x, mask, value: jnp.where(mask, value, x),
    "maximum.default": jnp.maximum,
    "minimum.default": jnp.minimum,
    "mish.default": lambda x: x * jnp.tanh(jax.nn.softplus(x)),
    "mul.Scalar": jnp.multiply,
    "mul.Tensor": jnp.multiply,
    "ne.Scalar": jnp.not_equal,
    "neg.default": jnp.negative,
    "pow.Scalar": jnp.power,
    "pow.Tensor_Scalar": jnp.power,
    "pow.Tensor_Tensor": jnp.power,
    "reciprocal.default": jnp.reciprocal,
    "relu.default": jax.nn.relu,
    "rsqrt.default": jax.lax.rsqrt,
    "rsub.Scalar": lambda x, y, alpha=1: y - alpha * x,
    "sigmoid.default": jax.nn.sigmoid,
    "silu.default": jax.nn.silu,
    "sin.default": jnp.sin,
    "softplus.default": _softplus,
    "sqrt.default": jnp.sqrt,
    "sub.Scalar": lambda x, y, alpha=1: x - alpha * y,
    "sub.Tensor": lambda x, y, *, alpha=1: x - (y if alpha == 1 else alpha * y),
    "tanh.default": jnp.tanh,
    "where.self": jnp.where,
}
"""Operators on each value for itself, with PyTorch's broadcasting, in either layout."""

_BY_LAYOUT: dict[str, Operator] = {
    "_native_batch_norm_legit_no_training.default": _batch_norm,
    "adaptive_avg_pool2d.default": _spatial(_adaptive_avg_pool),
    "adaptive_max_pool2d.default": lambda *args: (_spatial(_adaptive_max_pool)(*args), None),
    "amax.default": _along(lambda x, axes, keepdim: x.max(axes, keepdims=keepdim)),
    "amin.default": _along(lambda x, axes, keepdim: x.min(axes, keepdims=keepdim)),
    "avg_pool2d.default": _spatial(_avg_pool),
    "cat.default": _cat,
    "convolution.default": _convolution,
    "getitem": lambda values, index: values[index],
    "linear.default": _linear,
    "max_pool2d.default": _spatial(_max_pool),
    "max_pool2d_with_indices.default": lambda *args: (_spatial(_max_pool)(*args), None),
    "mean.dim": _along(lambda x, axes, keepdim, dtype=None: x.mean(axes, dtype, keepdims=keepdim)),
    "permute.default": _permute,
    "reflection_pad2d.default": _spatial(_pad_images("reflect")),
    "replication_pad2d.default": _spatial(_pad_images("edge")),
    "slice.Tensor": _slice,
    "split.Tensor": _split,
    "split_with_sizes.default": _split_with_sizes,
    "sum.dim_IntList": _along(
        lambda x, axes, keepdim, dtype=None: x.sum(axes, dtype, keepdims=keepdim)
    ),
    "transpose.int": _transpose,
    "upsample_bicubic2d.vec": _spatial(_interpolate(_bicubic)),
    "upsample_bilinear2d.vec": _spatial(_interpolate(_bilinear)),
    "upsample_nearest2d.vec": _spatial(_interpolate(_nearest, aligned=False)),
    "var.correction": _along(_variance),
}
"""Operators that know both layouts."""

_PLAIN: dict[str, Operator] = {
    "_log_softmax.default": lambda x, dim, half_to_float: jax.nn.log_softmax(x, dim),
    "_softmax.default": lambda x, dim, half_to_float: jax.nn.softmax(x, dim),
    "_unsafe_view.default": jnp.reshape,
    "addmm.default": _addmm,
    "any.dim": lambda x, dim, keepdim=False: x.any(dim, keepdims=keepdim),
    "bmm.default": jnp.matmul,
    "constant_pad_nd.default": _pad,
    "cumsum.default": lambda x, dim: jnp.cumsum(x, dim),
    "embedding.default": lambda weight, index, *_: weight[index],
    "expand.default": _expand,
    "flip.default": jnp.flip,
    "full.default": _full,
    "full_like.default": lambda x, value, **_: jnp.full_like(x, value),
    "gather.default": lambda x, dim, index: jnp.take_along_axis(x, index, dim),
    "group_norm.default": _group_norm,
    "index.Tensor": _index,
    "index_put.default": _index_put,
    "index_select.default": lambda x, dim, index: jnp.take(x, index, dim),
    "layer_norm.default": _layer_norm,
    "linalg_vector_norm.default": _vector_norm,
    "matmul.default": jnp.matmul,
    "max.dim": lambda x, dim, keepdim=False: (
        x.max(dim, keepdims=keepdim),
        x.argmax(dim, keepdims=keepdim),
    ),
    "mean.default": jnp.mean,
    "mm.default": jnp.matmul,
    "ones_like.default": lambda x, **_: jnp.ones_like(x),
    "repeat.default": jnp.tile,
    "rms_norm.default": _rms_norm,
    "roll.default": lambda x, shifts, dims=(): jnp.roll(x, tuple(shifts), tuple(dims) or None),
    "scaled_dot_product_attention.default": _attention,
    "select.int": lambda x, dim, index: jax.lax.index_in_dim(x, index, dim, keepdims=False),
    "squeeze.default": _squeeze,
    "squeeze.dim": _squeeze,
    "squeeze.dims": _squeeze,
    "stack.default": lambda arrays, dim=0: jnp.stack(arrays, dim),
    "sum.default": jnp.sum,
    "t.default": jnp.transpose,
    "unbind.int": lambda x, dim=0: [jnp.take(x, i, dim) for i in range(x.shape[dim])],
    "unfold.default": _unfold,
    "unsqueeze.default": lambda x, dim: jnp.expand_dims(x, dim),
    "view.default": jnp.reshape,
    "zeros_like.default": lambda x, **_: jnp.zeros_like(x),
}
"""Operators on arrays as PyTorch sees them."""

KNOW_LAYOUTS = frozenset({*_POINTWISE, *_BY_LAYOUT})
"""The names of the operators that read a `ChannelsLast` as it is stored."""

OPERATORS = KNOW_LAYOUTS | _PLAIN.keys()
"""The names of all operators here, without "aten."."""

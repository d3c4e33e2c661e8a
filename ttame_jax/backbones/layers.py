"""Layers that the CNN families share, equal to PyTorch's in inference. All are NHWC."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Conv(nnx.Conv):
    """Flax's convolution, started as He et al. do; `padding` is a number of pixels each side.

    One of 1x1 runs as the matrix product it is: a third quicker on CPU, where the compiler sees
    none in a convolution.
    """

    def __init__(self, *sizes, padding: int = 0, rngs: nnx.Rngs, **options):
        he_normal = nnx.initializers.he_normal()
        super().__init__(*sizes, padding=padding, kernel_init=he_normal, rngs=rngs, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.feature_group_count > 1:
            return super().__call__(x)
        dtype = self.dtype or x.dtype
        x, kernel = x.astype(dtype), self.kernel[...].astype(dtype)
        strides = tuple(np.broadcast_to(self.strides, 2).tolist())
        if self.kernel_size == (1, 1):
            x = x[:, :: strides[0], :: strides[1]]
            y = (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:-1], -1)
        else:
            y = convolve(x, kernel, strides, self.padding)
        return y if self.bias is None else y + self.bias[...].astype(dtype)


NHWC = ("NHWC", "HWIO", "NHWC")


def _convolution(x, kernel, strides, padding):
    pads = [(padding, padding)] * 2
    return jax.lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=NHWC)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: int) -> jax.Array:
    """[B, H, W, in] with kernel [h, w, in, out] -> [B, H', W', out]; `padding` zeros each side.

    Its gradient is the usual one, computed for CPUs so that it stays quick in a loop.
    """
    return _convolution(x, kernel, strides, padding)


def _convolve_forward(x, kernel, strides, padding):
    return _convolution(x, kernel, strides, padding), (x, kernel)


def _convolve_backward(strides, padding, residuals, gradient):
    _, pull = jax.vjp(lambda *inputs: _convolution(*inputs, strides, padding), *residuals)
    of_x, of_kernel = pull(gradient)
    if jax.default_backend() == "cpu":
        of_x = _turned_convolution(gradient, *residuals, strides, padding)
    return of_x, of_kernel


def _turned_convolution(gradient, x, kernel, strides, padding):
    """The gradient of x. XLA reads the kernel with `in` and `out` swapped in place, which inside
    a loop on a CPU its fast convolution cannot do; here they are swapped beforehand."""
    pads = [
        (length - 1 - padding, full - (short - 1) * stride - 1 + padding)
        for length, full, short, stride in zip(
            kernel.shape, x.shape[1:], gradient.shape[1:], strides
        )
    ]
    return jax.lax.conv_transpose(
        gradient, kernel, strides, pads, dimension_numbers=NHWC, transpose_kernel=True
    )


convolve.defvjp(_convolve_forward, _convolve_backward)


def classify(
    head: nnx.Linear | nnx.Conv, x: jax.Array, classes: jax.Array | None = None
) -> jax.Array:
    """What a fully connected (or 1x1 convolution) head gives [..., C] for classes [K], or all."""
    if classes is None:
        return head(x)
    kernel, bias = head.kernel[...], head.bias[...]
    return x.astype(kernel.dtype) @ kernel.reshape(-1, bias.size)[:, classes] + bias[classes]


class FrozenBatchNorm(nnx.Module):
    """BatchNorm that only ever uses its running statistics, whatever mode the module is put in.

    The statistics are applied in float32; the output has the input's shape and dtype. `count`,
    the batches that made the statistics, serves only the way back to PyTorch.
    """

    def __init__(self, num_features: int, *, epsilon: float = 1e-5):
        self.scale = nnx.Param(jnp.ones(num_features))
        self.bias = nnx.Param(jnp.zeros(num_features))
        self.mean = nnx.BatchStat(jnp.zeros(num_features))
        self.var = nnx.BatchStat(jnp.ones(num_features))
        self.count = nnx.BatchStat(jnp.zeros((), jnp.int32))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        factor = self.scale[...] * jax.lax.rsqrt(self.var[...] + self.epsilon)
        return (x * factor + (self.bias[...] - self.mean[...] * factor)).astype(x.dtype)


def adaptive_average_pool(x: jax.Array, size: int) -> jax.Array:
    """[B, H, W, C] -> [B, size, size, C]; bin i averages rows floor(i H / size) up to
    ceil((i + 1) H / size), as PyTorch's AdaptiveAvgPool2d does."""
    if x.shape[1:3] == (size, size):
        return x
    rows, columns = (_pooling_matrix(length, size) for length in x.shape[1:3])
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("bhwc,ih,jw->bijc", x, rows, columns, precision=highest).astype(x.dtype)


def _pooling_matrix(length: int, size: int) -> np.ndarray:
    """[size, length]: row i holds the weights of bin i."""
    matrix = np.zeros((size, length), np.float32)
    for i in range(size):
        start, stop = i * length // size, -(-(i + 1) * length // size)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def max_pool(x: jax.Array, window: int, stride: int, padding: tuple[int, int]) -> jax.Array:
    """Max-pooling of [B, H, W, C] with a square window; `padding` is (before, after) each side.

    Its gradient goes to the first maximum of each window, as PyTorch's and XLA's own do. XLA's
    (a select-and-scatter) is several times slower on CPU, where it would be a quarter of
    a training step.
    """
    return nnx.max_pool(x, (window, window), (stride, stride), (padding, padding))


def _max_pool_forward(x, window, stride, padding):
    y = max_pool(x, window, stride, padding)
    return y, (x, y)


def _max_pool_backward(window, stride, padding, residuals, gradient):
    x, y = residuals
    before, after = padding
    lowest = jnp.array(-jnp.inf, x.dtype)
    padded = jax.lax.pad(x, lowest, ((0, 0, 0), (before, after, 0), (before, after, 0), (0, 0, 0)))
    taken = jnp.zeros(y.shape, bool)
    total = jnp.zeros(padded.shape, gradient.dtype)
    for row, column in np.ndindex(window, window):
        ends = (row + (y.shape[1] - 1) * stride + 1, column + (y.shape[2] - 1) * stride + 1)
        limits = (len(x), *ends, x.shape[3])
        values = jax.lax.slice(padded, (0, row, column, 0), limits, (1, stride, stride, 1))
        hit = (values == y) & ~taken
        taken |= hit
        spread = (
            (0, 0, 0),
            (row, padded.shape[1] - ends[0], stride - 1),
            (column, padded.shape[2] - ends[1], stride - 1),
            (0, 0, 0),
        )
        zero = jnp.zeros((), gradient.dtype)
        total += jax.lax.pad(jnp.where(hit, gradient, zero), zero, spread)
    height, width = x.shape[1:3]
    return (total[:, before : before + height, before : before + width],)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)

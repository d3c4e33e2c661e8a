"""Layers that the CNN families share, equal to PyTorch's in inference. All are NHWC."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Conv = partial(nnx.Conv, kernel_init=nnx.initializers.he_normal())


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

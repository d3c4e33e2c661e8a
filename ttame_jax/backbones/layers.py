"""Layers that several families share, equal to PyTorch's in inference mode. All are NHWC."""

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ttame_jax.compilers import Padding, convolve, depthwise_convolve, layer_norm


class Conv(nnx.Conv):
    """A 2D convolution with He initialisation.

    `padding` is a number of pixels on each side, or "SAME" for TensorFlow's padding.
    """

    strides: int
    padding: int | Literal["SAME"]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: tuple[int, int],
        *,
        padding: int | Literal["SAME"] = 0,
        rngs: nnx.Rngs,
        **options,
    ):
        super().__init__(
            in_features,
            out_features,
            kernel_size,
            padding=padding,
            kernel_init=nnx.initializers.he_normal(),
            rngs=rngs,
            **options,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        depthwise = self.feature_group_count == x.shape[-1] == self.out_features
        if self.feature_group_count > 1 and not depthwise:
            return super().__call__(x)
        dtype = self.dtype or x.dtype
        strides = (self.strides, self.strides)
        padding = self._pads(x.shape[1:3], strides)
        function = depthwise_convolve if self.feature_group_count > 1 else convolve
        y = function(x.astype(dtype), self.kernel[...].astype(dtype), strides, padding)
        return y if self.bias is None else y + self.bias[...].astype(dtype)

    def _pads(self, size: Sequence[int], strides: tuple[int, int]) -> Padding:
        """((top, bottom), (left, right))."""
        if self.padding == "SAME":
            rows, columns = jax.lax.padtype_to_pads(size, self.kernel_size, strides, "SAME")
            return rows, columns
        return ((self.padding, self.padding),) * 2


def classify(
    head: nnx.Linear | nnx.Conv, x: jax.Array, classes: jax.Array | None = None
) -> jax.Array:
    """A fully connected (or 1x1 convolutional) head on x [..., C], for classes [K] or all."""
    if classes is None:
        return head(x)
    # pyrefly: ignore[unsupported-operation]  # the bias, which is optional in Flax
    kernel, bias = head.kernel[...], head.bias[...]
    return x.astype(kernel.dtype) @ kernel.reshape(-1, bias.size)[:, classes] + bias[classes]


class LayerNorm(nnx.LayerNorm):
    """LayerNorm over the last axis, computed by `compilers.layer_norm`."""

    scale: nnx.Param
    bias: nnx.Param

    def __call__(self, x: jax.Array) -> jax.Array:
        arrays = self.promote_dtype((x, self.scale[...], self.bias[...]), dtype=self.dtype)
        return layer_norm(*arrays, self.epsilon)


class FrozenBatchNorm(nnx.Module):
    """BatchNorm that always uses its running statistics, whatever mode the module is in.

    The statistics are applied in float32. The output has the input's shape and dtype. `count` is
    the number of batches behind the statistics, kept for export to PyTorch.
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


class ConvNorm(nnx.Module):
    """A convolution and BatchNorm: [B, H, W, in] -> [B, H/stride, W/stride, out].

    `padding` is half the kernel on each side, or "SAME" for TensorFlow's padding.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel: int,
        stride: int = 1,
        *,
        padding: Literal["symmetric", "SAME"] = "symmetric",
        epsilon: float = 1e-5,
        use_bias: bool = False,
        **options,
    ):
        self.conv = Conv(
            in_features,
            out_features,
            (kernel, kernel),
            strides=stride,
            padding="SAME" if padding == "SAME" else kernel // 2,
            use_bias=use_bias,
            **options,
        )
        self.bn = FrozenBatchNorm(out_features, epsilon=epsilon)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.bn(self.conv(x))


class SqueezeExcite(nnx.Module):
    """Scales each channel of [B, H, W, C] by a gate in (0, 1), computed from all their averages.

    Hu et al., 2018, arXiv:1709.01507.
    """

    def __init__(
        self,
        features: int,
        squeeze: int,
        activation: Callable[[jax.Array], jax.Array] = nnx.relu,
        gate: Callable[[jax.Array], jax.Array] = nnx.sigmoid,
        **options,
    ):
        self.reduce = nnx.Linear(features, squeeze, **options)
        self.expand = nnx.Linear(squeeze, features, **options)
        self.activation, self.gate = activation, gate

    def __call__(self, x: jax.Array) -> jax.Array:
        averages = x.mean(axis=(1, 2), keepdims=True)
        return x * self.gate(self.expand(self.activation(self.reduce(averages))))


def adaptive_average_pool(x: jax.Array, size: int) -> jax.Array:
    """[B, H, W, C] -> [B, size, size, C], as PyTorch's AdaptiveAvgPool2d.

    Bin i averages rows floor(i H / size) to ceil((i + 1) H / size), and columns likewise.
    """
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

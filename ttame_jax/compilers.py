"""Operations that are written in a special way because of one compiler.

Each function computes a standard operation. It differs from the obvious implementation only because
XLA, JAX or ONNX Runtime is slow or fails there on some platform. The comment in each one gives the
reason and the condition under which it can be removed. The observations were made with JAX and
jaxlib 0.10 unless the comment names another version.

Implementations are chosen when a program is lowered (`jax.lax.platform_dependent`) or by the
devices of a mesh, never by the default backend. A machine without an accelerator can therefore
lower programs for TPUs and GPUs with `jax.export`.
"""

import os
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from math import pi, sqrt
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.custom_derivatives import SymbolicZero
from jax.sharding import Mesh

Padding = tuple[tuple[int, int], tuple[int, int]]
"""Zeros added to an image: ((top, bottom), (left, right))."""

CPU_PIXELS = (os.cpu_count() or 1) * 224 * 224
"""Pixels that a CPU processes at a time: one image of the usual size per core."""

_platform: ContextVar[str | None] = ContextVar("_platform", default=None)
"""The platform for which a group of images is being traced; None outside groups."""


def in_groups(
    function: Callable[..., Any],
    images: jax.Array,
    *others: jax.Array,
    tpu_pixels: int | None = None,
) -> Any:
    """Applies a function to a batch, on CPUs a few images at a time, and on TPUs if asked to.

    Outside `jax.jit` the whole batch is processed at once on every platform, because a loop
    would be compiled at every call.

    Args:
      function: maps arrays [n, ...] like those given, for any n, to a tree of arrays [n, ...].
      images: [B, H, W, C].
      others: further arrays [B, ...] with one entry per image.
      tpu_pixels: pixels that a TPU processes at a time; None is the whole batch.

    Returns:
      ``function(images, *others)``. A group is the largest divisor of B images with at most
      `CPU_PIXELS` or `tpu_pixels` pixels, or a single image. A symbolic batch is one group.
    """
    # The activations of a small group stay in the CPU's caches, which makes a classifier and its
    # gradient up to a fifth faster, and in a TPU's vector memory, which by the compiler's estimate
    # saves a ViT a third of its cycles (docs/tpu.md). Remove when XLA tiles the batch itself.
    batch, height, width = images.shape[:3]
    if jax.export.is_symbolic_dim(batch):  # of an exported program; its divisors are unknown
        return function(images, *others)
    sizes = {}
    for platform, pixels in (("cpu", CPU_PIXELS), ("tpu", tpu_pixels)):
        if pixels is None:
            continue
        most = min(max(pixels // (height * width), 1), batch)
        sizes[platform] = next(n for n in range(most, 0, -1) if batch % n == 0)

    def in_groups_of(size, platform):
        def grouped(*arrays):
            token = _platform.set(platform)
            try:
                if size == batch:
                    return function(*arrays)
                groups = [x.reshape(-1, size, *x.shape[1:]) for x in arrays]
                outputs = jax.lax.map(lambda group: function(*group), groups)
                return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)
            finally:
                _platform.reset(token)

        return grouped

    # All branches are traced, which takes time. There is no choice to make for a nested call, nor
    # if the batch is a single group on every platform.
    branches = {name: in_groups_of(size, name) for name, size in sizes.items() if size < batch}
    if not branches or not isinstance(images, jax.core.Tracer) or _platform.get():
        return function(images, *others)
    default = in_groups_of(batch, "default")
    return jax.lax.platform_dependent(images, *others, **branches, default=default)


def convolve(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Padding
) -> jax.Array:
    """Convolves images [B, H, W, in] with a kernel [h, w, in, out].

    Args:
      x: the images.
      kernel: the weights, of the same dtype as the images.
      strides: (vertical, horizontal), in pixels.
      padding: numbers of zeros, ((top, bottom), (left, right)). Must be hashable.

    Returns:
      [B, H', W', out]. The values and gradients are those of `jax.lax.conv_general_dilated`.
    """
    # XLA's CPU compiler does not recognise a 1x1 convolution as a matrix product, which is a third
    # faster. Remove when it does.
    if kernel.shape[:2] == (1, 1) and padding == ((0, 0), (0, 0)):
        x = jax.lax.slice(x, (0, 0, 0, 0), x.shape, (1, *strides, 1))
        return (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:-1], -1)
    return _convolve(x, kernel, strides, padding)


NHWC = ("NHWC", "HWIO", "NHWC")


def _plain_convolve(x, kernel, strides, padding):
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=NHWC)


_convolve = jax.custom_vjp(_plain_convolve, nondiff_argnums=(2, 3))


def _convolve_forward(x, kernel, strides, padding):
    y = _plain_convolve(x.value, kernel.value, strides, padding)
    return y, (x.value, kernel.value, _trained(kernel))


def _trained(kernel):
    """A pytree without arrays that tells whether the gradient of a kernel is needed.

    The kernels of a frozen classifier are constants. Their gradients would be traced, and for single
    images as under `jax.vmap` they are convolutions with a group for each image, which cannot be
    exported for any number of images.
    """
    return () if kernel.perturbed else None


def _convolve_backward(strides, padding, residuals, gradient):
    if isinstance(gradient, SymbolicZero):
        return None, None
    x, kernel, trained = residuals

    def turned(gradient, x, kernel):
        return _turned_convolution(gradient, x, kernel, strides, padding)

    def plain(gradient, x, kernel):
        _, pull = jax.vjp(lambda x: _plain_convolve(x, kernel, strides, padding), x)
        return pull(gradient)[0]

    of_x = jax.lax.platform_dependent(gradient, x, kernel, cpu=turned, default=plain)
    if trained is None:
        return of_x, None
    _, pull = jax.vjp(lambda kernel: _plain_convolve(x, kernel, strides, padding), kernel)
    return of_x, *pull(gradient)


def _turned_convolution(gradient, x, kernel, strides, padding):
    """The gradient of x, with the kernel's `in` and `out` swapped beforehand."""
    # JAX's gradient leaves the swap to XLA's dimension numbers. Inside a loop XLA's fast CPU
    # convolution does not support those and a slow one runs. Remove when it does.
    pads = [
        (length - 1 - before, full - (short - 1) * stride - 1 + before)
        for length, full, short, stride, (before, _) in zip(
            kernel.shape, x.shape[1:], gradient.shape[1:], strides, padding
        )
    ]
    return jax.lax.conv_transpose(
        gradient, kernel, strides, pads, dimension_numbers=NHWC, transpose_kernel=True
    )


_convolve.defvjp(_convolve_forward, _convolve_backward, symbolic_zeros=True)


def depthwise_convolve(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Padding
) -> jax.Array:
    """Convolves each channel of images [B, H, W, C] with its own kernel, [h, w, 1, C].

    Arguments and result are those of `convolve`, with as many output as input channels.
    """
    return _depthwise(x, kernel, strides, padding)


def _plain_depthwise(x, kernel, strides, padding):
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=NHWC, feature_group_count=x.shape[-1]
    )


def _shifted_products(x, kernel, strides):
    """A depthwise convolution without padding, as a sum of products over the kernel's offsets."""
    # XLA's CPU compiler has no fast path for depthwise convolutions: this is up to 50 times faster,
    # and 3 to 50 times in the gradient of x. Remove when it has one.
    height, width = kernel.shape[:2]
    rows, columns = ((n - k) // s for n, k, s in zip(x.shape[1:3], kernel.shape, strides))

    def shifted(i, j):
        ends = (i + rows * strides[0] + 1, j + columns * strides[1] + 1)
        limits = (x.shape[0], *ends, x.shape[3])
        return jax.lax.slice(x, (0, i, j, 0), limits, (1, *strides, 1))

    return sum(shifted(i, j) * kernel[i, j, 0] for i, j in np.ndindex(height, width))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise(x, kernel, strides, padding):
    def shifted(x, kernel):
        return _shifted_products(jnp.pad(x, ((0, 0), *padding, (0, 0))), kernel, strides)

    def plain(x, kernel):
        return _plain_depthwise(x, kernel, strides, padding)

    return jax.lax.platform_dependent(x, kernel, cpu=shifted, default=plain)


def _depthwise_forward(x, kernel, strides, padding):
    y = _depthwise(x.value, kernel.value, strides, padding)
    return y, (x.value, kernel.value, _trained(kernel))


def _depthwise_backward(strides, padding, residuals, gradient):
    if isinstance(gradient, SymbolicZero):
        return None, None
    x, kernel, trained = residuals

    def shifted(gradient, x, kernel):
        # The transpose: the gradient, spread by the strides, with the kernel turned around.
        pads = [
            (k - 1 - before, full - (short - 1) * stride - 1 + before, stride - 1)
            for k, full, short, stride, (before, _) in zip(
                kernel.shape, x.shape[1:], gradient.shape[1:], strides, padding
            )
        ]
        zero = jnp.zeros((), gradient.dtype)
        spread = jax.lax.pad(gradient, zero, ((0, 0, 0), *pads, (0, 0, 0)))
        return _shifted_products(spread, kernel[::-1, ::-1], (1, 1))

    def plain(gradient, x, kernel):
        _, pull = jax.vjp(lambda x: _plain_depthwise(x, kernel, strides, padding), x)
        return pull(gradient)[0]

    of_x = jax.lax.platform_dependent(gradient, x, kernel, cpu=shifted, default=plain)
    if trained is None:
        return of_x, None
    _, pull = jax.vjp(lambda kernel: _plain_depthwise(x, kernel, strides, padding), kernel)
    return of_x, *pull(gradient)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward, symbolic_zeros=True)


def _plain_max_pool(x, window, stride, padding):
    return nnx.max_pool(x, (window, window), (stride, stride), (padding, padding))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def max_pool(x: jax.Array, window: int, stride: int, padding: tuple[int, int]) -> jax.Array:
    """Max-pools [B, H, W, C] with a square window; `padding` is (before, after) of both axes.

    The gradient goes to the first maximum of each window, as in PyTorch and XLA.
    """
    return _plain_max_pool(x, window, stride, padding)


def _max_pool_forward(x, window, stride, padding):
    y = _plain_max_pool(x, window, stride, padding)
    return y, (x, y)


def _max_pool_backward(window, stride, padding, residuals, gradient):
    def by_offset(gradient, x, y):
        return _max_pool_gradient(gradient, x, y, window, stride, padding)

    def plain(gradient, x, y):
        _, pull = jax.vjp(lambda x: _plain_max_pool(x, window, stride, padding), x)
        return pull(gradient)[0]

    return (jax.lax.platform_dependent(gradient, *residuals, cpu=by_offset, default=plain),)


def _max_pool_gradient(gradient, x, y, window, stride, padding):
    """The gradient of x, accumulated over the offsets in the window."""
    # XLA's gradient, a select-and-scatter, is several times slower on CPUs, where it would take a
    # quarter of a training step. Remove when XLA's CPU compiler vectorises it.
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
    return total[:, before : before + height, before : before + width]


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, x times the standard normal distribution function, of any shape."""
    # Half precision uses the error function, computed in float32: its complement, as in
    # `jax.nn.gelu`, takes twice as long. Float32 uses the complement, which is three times as accurate.
    # The derivative is written out because JAX 0.12 fails to differentiate the error function inside
    # `jax.shard_map`. Remove when `jax.nn.gelu` is as fast, and no supported version of JAX fails.
    values = _at_least_float32(x)
    return (values * _normal_distribution(values, x.dtype)).astype(x.dtype)


@gelu.defjvp
def _gelu_jvp(primals, tangents):
    (x,), (tangent,) = primals, tangents
    values = _at_least_float32(x)
    density = jnp.exp(-0.5 * values * values) / sqrt(2 * pi)
    slope = _normal_distribution(values, x.dtype) + values * density
    return gelu(x), slope.astype(x.dtype) * tangent


def _normal_distribution(x, dtype):
    """The standard normal distribution function, as accurate as values of a dtype need."""
    if jnp.finfo(dtype).bits < 32:
        return 0.5 + 0.5 * jax.lax.erf(sqrt(0.5) * x)
    return 0.5 * jax.lax.erfc(-sqrt(0.5) * x)


def _at_least_float32(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


@jax.jit
def layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: jax.typing.ArrayLike
) -> jax.Array:
    """Normalises x [..., D] over the last axis, and applies scale [D] and bias [D], as Flax does.

    Statistics are computed in at least float32. The result has the dtype of x.
    """
    # `jax.jit` gives the function a name in a JAX program, by which `ttame_jax.export` recognises it.
    # As one node it is several times faster in ONNX Runtime than as many. Remove, and use Flax's,
    # when Flax's is under `jax.jit`.
    values = _at_least_float32(x)
    mean = values.mean(-1, keepdims=True)
    var = jnp.maximum(jnp.square(values).mean(-1, keepdims=True) - jnp.square(mean), 0)
    return ((x - mean) * (jax.lax.rsqrt(var + epsilon) * scale) + bias).astype(x.dtype)


@jax.jit
def attention_weights(scores: jax.Array) -> jax.Array:
    """The softmax over the keys of scores [..., queries, keys], which are scaled already."""
    # For ONNX Runtime, as `layer_norm`. Remove when `jax.nn.softmax` is under `jax.jit`.
    return jax.nn.softmax(scores)


def unfused_relu(x: jax.Array) -> jax.Array:
    """ReLU for the fully connected layers after convolutions, of any shape."""
    # XLA's CPU compiler fuses a maximum with the layers around it such that all convolutions before
    # them run twice. It does not do so with a select. Remove when it no longer does with a maximum.
    return jnp.where(x > 0, x, 0)


def self_attention(
    x: jax.Array,
    qkv: nnx.Linear,
    proj: nnx.Linear,
    num_heads: int,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Multi-head self-attention with its linear layers.

    In groups of images that are traced for TPUs (`in_groups`) each head is projected by itself.

    Args:
      x: tokens, [..., N, D], of the layers' dtype.
      qkv: the projection to queries, keys and values, D -> 3 D, each with its heads in order.
      proj: the projection of the joined heads, D -> D.
      num_heads: number of heads h.
      bias: added to the scores before the softmax, float32 [..., h, N, N].

    Returns:
      [..., N, D], of the same dtype.
    """

    # XLA's TPU compiler copies the joint projection from one layout to another several times. With
    # one product per head it needs no copies. On CPUs that is a quarter slower. Remove when XLA
    # lays out the joint projection as the attention reads it.
    if _platform.get() != "tpu":
        projected = qkv(x).reshape(*x.shape[:-1], 3, num_heads, -1)
        return proj(attend(projected, bias).reshape(x.shape))
    width = x.shape[-1]
    kernels = qkv.kernel[...].astype(x.dtype).reshape(width, 3, num_heads, -1)
    query, key, value = (jnp.einsum("...nd,dhk->...hnk", x, kernels[:, i]) for i in range(3))
    if qkv.bias is not None:
        biases = qkv.bias[...].astype(x.dtype).reshape(3, num_heads, 1, -1)
        query, key, value = query + biases[0], key + biases[1], value + biases[2]
    kernel = proj.kernel[...].astype(x.dtype).reshape(num_heads, -1, width)
    attended = _attend_by_heads(query, key, value, bias)
    y = jnp.einsum("...hnk,hkd->...nd", attended, kernel)
    return y if proj.bias is None else y + proj.bias[...].astype(x.dtype)


def attend(qkv: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Softmax attention of every head.

    On CUDA GPUs cuDNN computes it if there is no bias, the dtype is bfloat16 or float16 and d is a
    multiple of 8 and at most 128. JAX cannot trace cuDNN's attention on a machine without cuDNN: a
    program traced there uses the plain implementation on every platform, even when it is lowered
    for CUDA.

    Args:
      qkv: queries, keys and values, [..., N, 3, h, d].
      bias: added to the scores before the softmax, float32 [..., h, N, N].

    Returns:
      [..., N, h, d], of the same dtype.
    """
    # XLA's GPU compiler writes the [N, N] scores to memory and reads them back, cuDNN's fused kernel
    # does not. Remove when `jax.nn.dot_product_attention` selects cuDNN by default.
    if bias is None and _can_use_cudnn(qkv):
        return jax.lax.platform_dependent(qkv, cuda=_cudnn_attend, default=_plain_attend)
    return _plain_attend(qkv, bias)


def _can_use_cudnn(qkv):
    width = qkv.shape[-1]
    if qkv.dtype not in (jnp.bfloat16, jnp.float16) or width % 8 or width > 128:
        return False
    try:
        jax.eval_shape(_cudnn_attend, jax.ShapeDtypeStruct(qkv.shape, qkv.dtype))
    except (NotImplementedError, RuntimeError):  # unsupported GPU, or no cuDNN
        return False
    return True


def _cudnn_attend(qkv):
    query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")


def _plain_attend(qkv, bias=None):
    # With heads first the matrix products need no further transposes: a seventh faster on CPUs.
    query, key, value = jnp.moveaxis(qkv, (-3, -2), (0, -3))
    return _attend_by_heads(query, key, value, bias).swapaxes(-3, -2)


def _attend_by_heads(query, key, value, bias):
    """Queries, keys and values [..., h, N, d] -> [..., h, N, d]."""
    scores = jnp.einsum("...qd,...kd->...qk", query, key, preferred_element_type=jnp.float32)
    scores = scores * query.shape[-1] ** -0.5
    scores = scores if bias is None else scores + bias
    return attention_weights(scores).astype(value.dtype) @ value


def compiler_options(mesh: Mesh) -> dict[str, bool] | None:
    """Options of `jax.jit` for a data-parallel step over a mesh; None for the defaults.

    On several GPUs the latency-hiding scheduler is enabled. The same option in the environment
    variable ``XLA_FLAGS`` takes precedence.
    """
    # Without it the all-reduce of gradients does not overlap with their computation. Remove when XLA
    # enables it by default.
    option = "xla_gpu_enable_latency_hiding_scheduler"
    on_gpus = mesh.devices.flat[0].platform == "gpu"
    if mesh.size == 1 or not on_gpus or option in os.environ.get("XLA_FLAGS", ""):
        return None
    return {option: True}

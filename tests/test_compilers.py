from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ttame_jax import compilers
from ttame_jax.compilers import (
    attend,
    compiler_options,
    convolve,
    depthwise_convolve,
    gelu,
    in_groups,
    layer_norm,
    max_pool,
    self_attention,
    unfused_relu,
)

NO_PADDING = ((0, 0), (0, 0))
IMAGES = jax.random.normal(jax.random.key(0), (16, 8, 8, 3))
KERNELS = (
    0.3 * jax.random.normal(jax.random.key(1), (3, 3, 3, 6)),
    0.3 * jax.random.normal(jax.random.key(2), (1, 1, 6, 12)),
)


def lowered(function, platform, *inputs):
    """The StableHLO program for a platform, which need not be available."""
    return jax.export.export(jax.jit(function), platforms=[platform])(*inputs).mlir_module()


def network(kernels, images):
    """All operations of `compilers` in one classifier: images [B, 8, 8, 3] -> [B]."""

    def forward(images):
        x = convolve(images, kernels[0], (2, 2), ((0, 1), (1, 1)))
        x = max_pool(gelu(x), 3, 2, (1, 1))
        x = convolve(x, kernels[1], (1, 1), NO_PADDING)
        return unfused_relu(attend(x.reshape(len(x), -1, 3, 2, 2))).sum((1, 2, 3))

    return in_groups(forward, images)


def loss(kernels, images):
    return (network(kernels, images) ** 2).sum()


gradients = jax.grad(loss, argnums=(0, 1))


@pytest.fixture
def two_at_a_time(monkeypatch):
    monkeypatch.setattr(compilers, "CPU_PIXELS", 2 * 8 * 8)


@pytest.fixture(scope="module")
def expected_gradients():
    """Gradients of `loss`, all images at once, on one device."""
    return jax.jit(lambda *inputs: gradients(*inputs))(KERNELS, IMAGES)


def assert_all_close(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * jnp.abs(b).max())


def test_a_program_compiled_for_a_cpu_has_no_conditional(two_at_a_time, expected_gradients):
    compiled = jax.jit(lambda *inputs: gradients(*inputs)).lower(KERNELS, IMAGES).compile()
    assert " conditional(" not in compiled.as_text()
    assert_all_close(compiled(KERNELS, IMAGES), expected_gradients)


@pytest.mark.parametrize("platform,loops", [("cpu", True), ("tpu", False), ("cuda", False)])
def test_only_the_program_of_a_cpu_has_loops(two_at_a_time, platform, loops):
    program = lowered(lambda *inputs: gradients(*inputs), platform, KERNELS, IMAGES)
    assert ("stablehlo.while" in program) == loops


@pytest.mark.parametrize("varying", [True, False])
def test_gradients_inside_shard_map_equal_those_outside(two_at_a_time, expected_gradients, varying):
    """The kernels are marked as varying over devices, as in training, or are not."""

    def local(kernels, images):
        if not varying:
            return gradients(kernels, images)
        kernels = jax.lax.pcast(kernels, "data", to="varying")
        of_kernels, of_images = gradients(kernels, images)
        return jax.lax.psum(of_kernels, "data"), of_images

    mesh = Mesh(np.array(jax.devices()), ("data",))
    assert mesh.size == 8
    images = jnp.concatenate([IMAGES, IMAGES])  # four on each device, in two groups
    specs = (P(), P("data"))
    step = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs))
    of_kernels, of_images = step(KERNELS, images)
    assert_all_close(jax.tree.map(lambda x: x / 2, of_kernels), expected_gradients[0])
    assert_all_close(of_images, jnp.concatenate([expected_gradients[1]] * 2))


def test_gradients_can_be_mapped(two_at_a_time, expected_gradients):
    mapped = jax.jit(jax.vmap(jax.grad(loss, argnums=1), (None, 0)))
    of_images = mapped(KERNELS, IMAGES.reshape(4, 4, 8, 8, 3))
    assert_all_close(of_images.reshape(IMAGES.shape), expected_gradients[1])


def sizes_in_groups(count, transform=jax.jit):
    """The batch sizes with which a function of `count` images is traced."""
    sizes = []

    def function(images, factors):
        sizes.append(len(images))
        return {"sum": images.sum((1, 2, 3)) * factors, "scaled": images * 2}

    images, factors = IMAGES[:count], jnp.arange(count)
    outputs = transform(lambda *inputs: in_groups(function, *inputs))(images, factors)
    np.testing.assert_allclose(outputs["sum"], images.sum((1, 2, 3)) * factors, rtol=1e-5)
    np.testing.assert_array_equal(outputs["scaled"], images * 2)
    return sorted(set(sizes))


@pytest.mark.parametrize("count,expected", [(6, [3, 6]), (8, [2, 8]), (7, [1, 7])])
def test_a_group_has_the_largest_size_that_fits_and_divides(monkeypatch, count, expected):
    monkeypatch.setattr(compilers, "CPU_PIXELS", 4 * 8 * 8 - 1)
    assert sizes_in_groups(count) == expected


def test_a_group_has_at_least_one_image(monkeypatch):
    monkeypatch.setattr(compilers, "CPU_PIXELS", 1)
    assert sizes_in_groups(6) == [1, 6]


def test_a_batch_that_is_a_group_does_not_branch(two_at_a_time):
    function = lambda images: in_groups(lambda x: x.sum((1, 2, 3)), images)
    assert "cond" not in str(jax.make_jaxpr(function)(IMAGES[:2]))
    assert "cond" in str(jax.make_jaxpr(function)(IMAGES[:4]))


def test_outside_of_jit_the_batch_is_not_split(two_at_a_time):
    assert sizes_in_groups(6, transform=lambda function: function) == [6]


@pytest.mark.parametrize("tpu_pixels,loops", [(4 * 8 * 8, True), (None, False)])
def test_a_tpu_takes_groups_of_the_size_that_it_is_told(two_at_a_time, tpu_pixels, loops):
    sizes = []

    def function(images):
        sizes.append(len(images))
        return images.sum((1, 2, 3))

    grouped = lambda images: in_groups(function, images, tpu_pixels=tpu_pixels)
    assert ("stablehlo.while" in lowered(grouped, "tpu", IMAGES)) == loops
    assert sorted(set(sizes)) == ([2, 4, 16] if loops else [2, 16])


def test_groups_inside_of_groups_are_traced_once_for_each_branch(two_at_a_time):
    sizes = []

    def inner(images):
        sizes.append(len(images))
        return images

    nested = lambda images: in_groups(lambda group: in_groups(inner, group), images)
    np.testing.assert_array_equal(jax.jit(nested)(IMAGES), IMAGES)
    assert sorted(sizes) == [2, 16]


def plain_convolution(x, kernel, strides, padding):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=dimensions)


@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (1, 2)])
@pytest.mark.parametrize(
    "size,kernel,padding",
    [
        (9, 3, ((1, 1), (1, 1))),
        (8, 3, ((0, 1), (0, 1))),  # TensorFlow's 'same' with stride 2
        (11, 7, ((3, 3), (2, 4))),
        (8, 5, NO_PADDING),
        (8, 1, NO_PADDING),
        (8, 1, ((1, 0), (0, 2))),
    ],
)
def test_convolutions_and_their_gradients_are_those_of_jax(strides, size, kernel, padding):
    x = jax.random.normal(jax.random.key(0), (2, size, size + 1, 3))
    weights = jax.random.normal(jax.random.key(1), (kernel, kernel, 3, 4))

    def output_and_gradients(function):
        def squares(x, weights):
            y = function(x, weights, strides, padding)
            return (y**2).sum(), y

        return jax.jit(jax.grad(squares, argnums=(0, 1), has_aux=True))(x, weights)

    assert_all_close(output_and_gradients(convolve), output_and_gradients(plain_convolution))


@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (1, 2)])
@pytest.mark.parametrize("padding", [((1, 1), (1, 1)), ((0, 1), (1, 2)), NO_PADDING])
def test_depthwise_convolutions_and_their_gradients_are_those_of_jax(strides, padding):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 9, 10, 4))
    kernel = jax.random.normal(keys[1], (3, 5, 1, 4))

    def plain(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            strides,
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=4,
        )

    y, pull = jax.vjp(lambda *inputs: depthwise_convolve(*inputs, strides, padding), x, kernel)
    expected, expected_pull = jax.vjp(plain, x, kernel)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    gradient = jax.random.normal(keys[2], y.shape)
    assert_all_close(pull(gradient), expected_pull(gradient))


@pytest.mark.parametrize("platform,groups", [("cpu", 0), ("tpu", 2), ("cuda", 2)])
def test_only_the_program_of_a_cpu_has_shifted_products(platform, groups):
    def gradient(x, kernel):
        y, pull = jax.vjp(lambda x: depthwise_convolve(x, kernel, (1, 1), NO_PADDING), x)
        return pull(y)

    text = lowered(gradient, platform, jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 1, 4)))
    assert text.count("stablehlo.convolution") == groups


def test_a_1x1_convolution_is_a_matrix_product():
    function = lambda x, kernel: convolve(x, kernel, (2, 2), NO_PADDING)
    program = lowered(function, "cpu", IMAGES, jnp.ones((1, 1, 3, 4)))
    assert "stablehlo.dot_general" in program and "stablehlo.convolution" not in program


@pytest.mark.parametrize("platform,in_place", [("cpu", False), ("tpu", True), ("cuda", True)])
def test_only_the_program_of_a_cpu_swaps_the_kernel_before_the_gradient(platform, in_place):
    function = jax.grad(lambda x: convolve(x, KERNELS[0], (1, 1), ((1, 1), (1, 1))).sum())
    assert ("x[0, 1, o, i]->" in lowered(function, platform, IMAGES)) == in_place


@pytest.mark.parametrize(
    ("size", "window", "stride", "padding", "torch_options"),
    [
        (11, 3, 2, (1, 1), {"padding": 1}),
        (10, 3, 2, (0, 1), {"ceil_mode": True}),
        (11, 3, 2, (0, 1), {"ceil_mode": True}),
        (9, 2, 2, (0, 0), {}),
    ],
)
@pytest.mark.parametrize("rectified", [False, True])
def test_max_pool_and_its_gradient_equal_pytorchs(
    size, window, stride, padding, torch_options, rectified
):
    """Rectified values tie at 0, where the first maximum receives the gradient."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, size, size + 3, 4)).astype(np.float32)
    if rectified:
        x = np.maximum(x - 0.7, 0)
    tensor = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    expected = torch.nn.functional.max_pool2d(tensor, window, stride, **torch_options)
    weights = rng.normal(size=expected.shape).astype(np.float32)
    (expected * torch.tensor(weights)).sum().backward()

    y, pullback = jax.vjp(lambda x: max_pool(x, window, stride, padding), x)
    (gradient,) = pullback(weights.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(y, expected.detach().numpy().transpose(0, 2, 3, 1))
    np.testing.assert_allclose(gradient, tensor.grad.numpy().transpose(0, 2, 3, 1), atol=1e-6)


@pytest.mark.parametrize("platform,scatters", [("cpu", False), ("tpu", True), ("cuda", True)])
def test_only_the_program_of_a_cpu_has_its_own_max_pool_gradient(platform, scatters):
    program = lowered(jax.grad(lambda x: max_pool(x, 3, 2, (1, 1)).sum()), platform, IMAGES)
    assert ("stablehlo.select_and_scatter" in program) == scatters


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layer_norm_is_flax_s(dtype):
    module = nnx.LayerNorm(8, epsilon=1e-3, dtype=dtype, rngs=nnx.Rngs(0))
    scale, bias = jax.random.normal(jax.random.key(0), (2, 8))
    module.scale[...], module.bias[...] = scale, bias
    x = (3 * jax.random.normal(jax.random.key(1), (4, 5, 8)) + 2).astype(dtype)
    found = layer_norm(x, scale.astype(dtype), bias.astype(dtype), 1e-3)
    assert found.dtype == dtype
    np.testing.assert_allclose(*map(np.float32, (found, module(x))), atol=1e-6, rtol=1e-6)


def test_gelu_and_its_derivative_are_exact():
    x = np.linspace(-6, 6, 1001, dtype=np.float32)
    tensor = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    expected = torch.nn.functional.gelu(tensor)
    expected.sum().backward()
    np.testing.assert_allclose(gelu(x), expected.detach(), rtol=2e-6, atol=1e-9)
    np.testing.assert_allclose(jax.vmap(jax.grad(gelu))(x), tensor.grad, rtol=2e-6, atol=3e-7)


def test_gelu_of_half_precision_is_computed_in_float32():
    x = jnp.linspace(-3, 3, 101, dtype=jnp.bfloat16)
    expected = jax.nn.gelu(x.astype(jnp.float32), approximate=False)
    assert gelu(x).dtype == jnp.bfloat16
    np.testing.assert_allclose(*map(np.float32, (gelu(x), expected)), rtol=2**-8)


@pytest.mark.parametrize("biases", [True, False])
def test_self_attention_by_heads_is_self_attention(biases, monkeypatch):
    """The implementation for TPUs, on a CPU."""
    rngs = nnx.Rngs(0)
    bias_init = nnx.initializers.normal()
    qkv, proj = (
        nnx.Linear(8, width, use_bias=biases, bias_init=bias_init, rngs=rngs) for width in (24, 8)
    )
    x, scores = jax.random.normal(rngs(), (2, 3, 5, 8)), jax.random.normal(rngs(), (2, 5, 5))

    def attention(x):
        return self_attention(x, qkv, proj, 2, scores if biases else None)

    def outputs(function):
        y, pull = jax.vjp(jax.jit(function), x)
        return y, *pull(x)

    choose = lambda *arrays, tpu, default: tpu(*arrays)
    monkeypatch.setattr(jax.lax, "platform_dependent", choose)
    with jax.default_matmul_precision("highest"):
        by_heads = outputs(lambda x: in_groups(attention, x, tpu_pixels=1))
        assert_all_close(by_heads, outputs(attention))
    program = jax.make_jaxpr(lambda x: in_groups(attention, x, tpu_pixels=1))(x)
    assert "5,24]" not in str(program)  # no joint projection


def test_unfused_relu_is_relu_without_a_maximum():
    x = jnp.array([-2.0, 0.0, 3.0])
    np.testing.assert_array_equal(unfused_relu(x), [0, 0, 3])
    np.testing.assert_array_equal(jax.grad(lambda x: unfused_relu(x).sum())(x), [0, 0, 1])
    assert "stablehlo.maximum" not in lowered(unfused_relu, "cpu", x)


@pytest.mark.parametrize("dtype,tolerance", [("float32", 1e-6), ("bfloat16", 0.03)])
def test_attention_is_that_of_jax(dtype, tolerance):
    qkv = jax.random.normal(jax.random.key(0), (2, 5, 3, 4, 8), dtype)
    query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    expected = jax.jit(jax.nn.dot_product_attention)(query, key, value)
    actual = jax.jit(lambda qkv: attend(qkv))(qkv)
    assert actual.dtype == dtype
    np.testing.assert_allclose(
        actual.astype(jnp.float32), expected.astype(jnp.float32), atol=tolerance
    )


@pytest.fixture
def cudnn(monkeypatch):
    """Replaces cuDNN's attention by one that any machine can trace, recognisable by its cosine."""

    def attention(query, key, value, *, implementation):
        assert implementation == "cudnn"
        return jnp.cos(query) + key + value

    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)


def uses_cudnn(platform="cuda", dtype="bfloat16", width=64):
    program = lowered(lambda qkv: attend(qkv), platform, jnp.ones((2, 5, 3, 4, width), dtype))
    return "stablehlo.cosine" in program


@pytest.mark.parametrize("platform", ["cuda", "rocm", "cpu", "tpu"])
def test_cudnn_attends_only_in_the_program_of_a_cuda_gpu(cudnn, platform):
    assert uses_cudnn(platform) == (platform == "cuda")


@pytest.mark.parametrize(
    "dtype,width,supported",
    [
        ("bfloat16", 128, True),
        ("float16", 8, True),
        ("float32", 64, False),
        ("bfloat16", 12, False),
        ("bfloat16", 136, False),
    ],
)
def test_cudnn_attends_only_where_it_supports_the_heads(cudnn, dtype, width, supported):
    assert uses_cudnn(dtype=dtype, width=width) == supported


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError])
def test_where_cudnn_cannot_be_traced_attention_does_not_branch(monkeypatch, error):
    def refuse(*_, **__):
        raise error("cuDNN is not detected.")

    monkeypatch.setattr(jax.nn, "dot_product_attention", refuse)
    qkv = jnp.ones((2, 7, 3, 4, 64), jnp.bfloat16)  # a shape that JAX has not traced before
    assert "cond" not in str(jax.make_jaxpr(lambda qkv: attend(qkv))(qkv))


def mesh_of(platform, count):
    devices = np.array([SimpleNamespace(platform=platform)] * count)
    return SimpleNamespace(devices=devices, size=count)


def test_the_latency_hiding_scheduler_is_enabled_on_several_gpus_unless_set_in_xla_flags(
    monkeypatch,
):
    option = "xla_gpu_enable_latency_hiding_scheduler"
    assert compiler_options(Mesh(np.array(jax.devices()), ("data",))) is None
    assert compiler_options(mesh_of("tpu", 2)) is None
    assert compiler_options(mesh_of("gpu", 1)) is None
    assert compiler_options(mesh_of("gpu", 2)) == {option: True}
    jax.jit(lambda x: x, compiler_options={option: True})(1.0)  # the compiler knows it
    monkeypatch.setenv("XLA_FLAGS", f"--{option}=false")
    assert compiler_options(mesh_of("gpu", 2)) is None


@pytest.mark.parametrize("channels", [1, 4])  # depthwise with a group per channel
def test_a_convolution_whose_output_has_no_gradient_can_be_differentiated(channels):
    @jax.custom_vjp
    def without_gradient(x):
        return x.sum()

    without_gradient.defvjp(lambda x: (x.sum(), None), lambda _, gradient: (None,))
    convolution = convolve if channels == 4 else depthwise_convolve
    x, kernel = jnp.ones((1, 5, 5, 4)), jnp.ones((3, 3, channels, 4))
    gradient = jax.grad(
        lambda x: without_gradient(convolution(x, kernel, (1, 1), ((1, 1), (1, 1)))) + x.sum()
    )(x)
    np.testing.assert_array_equal(gradient, jnp.ones_like(x))

"""ATen operators in JAX, against PyTorch's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from ttame_jax.backbones import aten
from ttame_jax.backbones.imported import decode


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def values(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def positive(*shape, seed=0):
    return np.abs(values(*shape, seed=seed)) + 0.1


IMAGE = values(1, 6, 9, 8)
SMALL = values(1, 4, 3, 3)
TOKENS = values(1, 5, 8)
HEADS = [values(1, 2, 5, 4, seed=i) for i in range(3)]

CONVOLUTIONS = [  # weight, bias, stride, padding, dilation, transposed, output_padding, groups
    (values(4, 6, 3, 2), values(4), [2, 1], [1, 0], [1, 1], False, [0, 0], 1),
    (values(4, 6, 3, 3), None, [1, 1], [2, 2], [2, 2], False, [0, 0], 1),
    (values(4, 3, 3, 3), values(4), [2, 2], [1, 1], [1, 1], False, [0, 0], 2),
    (values(6, 1, 3, 3), None, [2, 2], [1, 1], [1, 1], False, [0, 0], 6),
    (values(12, 1, 3, 3), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 6),
    (values(4, 6, 1, 1), values(4), [2, 2], [0, 0], [1, 1], False, [0, 0], 1),
    (values(6, 2, 3, 2), values(4), [2, 2], [1, 0], [1, 2], True, [1, 0], 2),
]
CASES = [("convolution.default", (IMAGE, *options)) for options in CONVOLUTIONS]
CASES += [
    (
        "convolution.default",
        (values(1, 1, 6), values(1, 1, 3), None, [1], [1], [1], False, [0], 1),
    ),
    ("linear.default", (TOKENS, values(3, 8), values(3))),
    ("linear.default", (IMAGE, values(3, 8))),
    ("addmm.default", (values(3), values(5, 8), values(8, 3))),
    ("bmm.default", (values(2, 5, 8), values(2, 8, 3))),
    ("matmul.default", (TOKENS, values(8, 3))),
    ("scaled_dot_product_attention.default", tuple(HEADS)),
    ("scaled_dot_product_attention.default", (*HEADS, values(1, 2, 5, 5))),
    ("scaled_dot_product_attention.default", (*HEADS, values(1, 1, 5, 5) > -1)),
    ("scaled_dot_product_attention.default", (*HEADS, None, 0.0, True)),
    (
        "_native_batch_norm_legit_no_training.default",
        (IMAGE, values(6), values(6), values(6), positive(6), 0.1, 1e-3),
    ),
    (
        "_native_batch_norm_legit_no_training.default",
        (values(1, 6, 5), None, None, values(6), positive(6), 0.1, 1e-3),
    ),
    ("layer_norm.default", (TOKENS, [8], values(8), values(8), 1e-3)),
    ("layer_norm.default", (IMAGE, [8])),
    ("layer_norm.default", (IMAGE, [6, 9, 8], values(6, 9, 8), values(6, 9, 8))),
    ("group_norm.default", (IMAGE, 2, values(6), values(6), 1e-3)),
    ("rms_norm.default", (TOKENS, [8], values(8), 1e-3)),
    ("rms_norm.default", (TOKENS, [8])),
    ("_softmax.default", (IMAGE, 1, False)),
    ("_log_softmax.default", (TOKENS, -1, False)),
    ("max_pool2d.default", (IMAGE, [3, 3], [2, 2], [1, 1])),
    ("max_pool2d.default", (IMAGE, [2, 2], [2, 2], [0, 0], [1, 1], True)),
    ("max_pool2d.default", (IMAGE, [3], [], [1], [2])),
    ("max_pool2d.default", (IMAGE, [4, 3], [4, 3])),  # leaves out the border
    ("max_pool2d_with_indices.default", (IMAGE, [3, 3], [2, 2], [1, 1], [1, 1], True)),
    ("avg_pool2d.default", (IMAGE, [3, 3], [2, 2], [1, 1])),
    ("avg_pool2d.default", (IMAGE, [3, 3], [2, 2], [1, 1], True)),
    ("avg_pool2d.default", (IMAGE, [2, 2], [2, 2], [0, 0], True, False)),
    ("avg_pool2d.default", (IMAGE, [3, 2], [], [1, 0], False, False)),
    ("avg_pool2d.default", (IMAGE, [2, 2], [2, 2], [0, 0], False, True, 3)),
    ("adaptive_avg_pool2d.default", (IMAGE, [4, 3])),
    ("adaptive_avg_pool2d.default", (IMAGE, [1, 1])),
    ("adaptive_avg_pool2d.default", (IMAGE[0], [4, 3])),
    ("adaptive_max_pool2d.default", (IMAGE, [4, 3])),
    ("upsample_nearest2d.vec", (SMALL, [7, 5], None)),
    ("upsample_nearest2d.vec", (SMALL, None, [2.0, 2.0])),
    ("upsample_bilinear2d.vec", (SMALL, [7, 5], False, None)),
    ("upsample_bilinear2d.vec", (SMALL, None, True, [2.0, 2.0])),
    ("upsample_bilinear2d.vec", (IMAGE, [4, 3], False, None)),
    ("upsample_bicubic2d.vec", (SMALL, [7, 5], False, None)),
    ("upsample_bicubic2d.vec", (SMALL, None, False, [2.5, 2.5])),
    ("reflection_pad2d.default", (IMAGE, [1, 2, 3, 0])),
    ("replication_pad2d.default", (IMAGE, [1, 2, 3, 0])),
    ("constant_pad_nd.default", (IMAGE, [1, -2, 0, 3], 0.5)),
    ("add.Tensor", (IMAGE, values(6, 1, 1))),
    ("add.Tensor", (IMAGE, values(8))),
    ("sub.Tensor", (IMAGE, values(1, 6, 1, 1))),
    ("mul.Tensor", (values(6, 1, 1), IMAGE)),
    ("mul.Tensor", (IMAGE, values(2, 1, 6, 9, 8))),
    ("rsub.Scalar", (IMAGE, 2)),
    ("pow.Tensor_Scalar", (positive(1, 6, 9, 8), 0.5)),
    ("where.self", (IMAGE > 0, IMAGE, values(6, 1, 1))),
    ("clamp.default", (IMAGE, None, 0.5)),
    ("hardtanh.default", (IMAGE, 0.0, 6.0)),
    ("leaky_relu.default", (IMAGE, 0.2)),
    ("elu.default", (IMAGE, 0.5)),
    ("softplus.default", (IMAGE, 2, 1)),
    ("mean.dim", (IMAGE, [2, 3])),
    ("mean.dim", (IMAGE, [-1, -2], True)),
    ("mean.dim", (IMAGE, [1], True)),
    ("mean.dim", (IMAGE, [3])),
    ("sum.dim_IntList", (IMAGE, [1])),
    ("amax.default", (IMAGE, [2], True)),
    ("cumsum.default", (TOKENS, 1)),
    ("linalg_vector_norm.default", (TOKENS, 2, [-1], True)),
    ("linalg_vector_norm.default", (IMAGE, 2, [1, 2], True)),
    ("linalg_vector_norm.default", (IMAGE, 1, [2, 3])),
    ("permute.default", (IMAGE, [0, 2, 3, 1])),
    ("permute.default", (IMAGE, [0, 3, 1, 2])),
    ("permute.default", (IMAGE, [2, 0, -1, 1])),
    ("transpose.int", (IMAGE, 1, -1)),
    ("cat.default", ([IMAGE, IMAGE], 1)),
    ("cat.default", ([IMAGE, IMAGE], -1)),
    ("split.Tensor", (IMAGE, 4, 1)),
    ("split_with_sizes.default", (IMAGE, [2, 7], 2)),
    ("slice.Tensor", (IMAGE, 1, 1, 9223372036854775807, 2)),
    ("slice.Tensor", (TOKENS, -1, -3)),
    ("select.int", (IMAGE, 1, -1)),
    ("unbind.int", (TOKENS, 1)),
    ("roll.default", (IMAGE, [1, -2], [2, 3])),
    ("expand.default", (values(6, 1, 1), [2, -1, 3, 3])),
    ("view.default", (IMAGE, [1, -1, 4])),
    ("squeeze.dims", (values(1, 6, 1, 1), [2, 3])),
    ("index.Tensor", (IMAGE, [None, None, np.array([0, 2]), None])),
    ("index_put.default", (IMAGE, [None, None, np.array([0, 2])], values(1, 6, 2, 8))),
    ("index_put.default", (IMAGE, [None, np.array([2, 2])], values(1, 2, 9, 8), True)),
    ("gather.default", (TOKENS, 1, np.zeros((1, 2, 8), np.int64))),
    ("unfold.default", (IMAGE, 2, 3, 2)),
    ("repeat.default", (TOKENS, [2, 1, 3])),
    ("flip.default", (IMAGE, [2])),
]
CURVES = [
    "gelu",
    "hardsigmoid",
    "hardswish",
    "mish",
    "relu",
    "sigmoid",
    "silu",
    "tanh",
    "erf",
    "abs",
]
CASES += [(f"{name}.default", (3 * IMAGE,)) for name in CURVES]


def mapped(args, array):
    if isinstance(args, np.ndarray):
        return array(args)
    return type(args)(mapped(x, array) for x in args) if isinstance(args, tuple | list) else args


def stored(x):
    """An array [1, C, H, W] as `ChannelsLast`; any other as it is."""
    image = x.ndim == 4 and len(x) == 1
    return aten.ChannelsLast(jnp.asarray(x.transpose(0, 2, 3, 1))) if image else jnp.asarray(x)


def arrays(result):
    """The result as a list of arrays, without what inference does not need."""
    results = result if isinstance(result, list | tuple) else [result]
    if isinstance(result, aten.ChannelsLast):
        results = [result]
    return [np.asarray(aten.plain(x)) for x in results]


ALL = [(name, args, jnp.asarray) for name, args in CASES]
ALL += [(name, args, stored) for name, args in CASES if name in aten.KNOW_LAYOUTS]


@pytest.mark.parametrize(("name", "args", "layout"), ALL)
def test_operators_compute_what_pytorch_computes(name, args, layout):
    packet, overload = name.split(".")
    operator = getattr(getattr(torch.ops.aten, packet), overload)
    expected = operator(*mapped(args, torch.from_numpy))
    expected = [expected] if torch.is_tensor(expected) else expected
    if "batch_norm" in name or "max_pool2d" in name:  # statistics and indices are not needed
        expected = expected[:1]
    found = arrays(aten.apply(name, mapped(args, layout), {}))[: len(expected)]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=3e-6)


def test_the_approximate_gelu_is_pytorchs():
    theirs = torch.nn.functional.gelu(torch.from_numpy(IMAGE), approximate="tanh")
    ours = aten.apply("gelu.default", [jnp.asarray(IMAGE)], {"approximate": "tanh"})
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-6)


def test_a_graph_with_an_unknown_operator_is_refused_by_its_name():
    text = '{"nodes": [["%x", "evil.default", [], {}]], "logits": "%x", "places": {}}'
    with pytest.raises(ValueError, match=r"does not know: evil\.default"):
        decode(text)


def test_the_gradient_of_a_norm_is_zero_at_zero():
    gradient = jax.grad(lambda x: aten.apply("linalg_vector_norm.default", [x, 2, [1]], {}).sum())
    np.testing.assert_array_equal(gradient(jnp.zeros((2, 3))), jnp.zeros((2, 3)))


def test_the_gradient_of_a_maximum_that_leaves_out_the_border_is_pytorchs():
    def pooled(x):
        pools = aten.apply("max_pool2d.default", [x, [4, 3], [4, 3]], {})
        return (aten.plain(pools) ** 2).sum()

    x = torch.from_numpy(IMAGE).requires_grad_()
    (torch.nn.functional.max_pool2d(x, (4, 3)) ** 2).sum().backward()
    np.testing.assert_allclose(jax.grad(pooled)(jnp.asarray(IMAGE)), x.grad.numpy(), atol=1e-6)

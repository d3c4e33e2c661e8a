"""Every operation that is exported to ONNX computes the same in ONNX Runtime."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ttame_jax.compilers import attention_weights, convolve, gelu, layer_norm, max_pool
from ttame_jax.export.onnx.graph import Graph
from ttame_jax.export.onnx.model import translate
from ttame_jax.export.onnx.rules import RULES

onnxruntime = pytest.importorskip("onnxruntime")

CHANNELS = np.float32([0.5, -1, 2, 3])
KERNEL = np.random.default_rng(1).standard_normal((3, 3, 4, 2), np.float32) / 6

# By the rule that each of them needs: functions of images [b, 6, 6, 4].
CASES = {
    "abs": jnp.abs,
    "add": lambda x: x + CHANNELS,
    "broadcast_in_dim": lambda x: jnp.broadcast_to(x[..., 0, None], x.shape),
    "concatenate": lambda x: jnp.concatenate([x, x[:, :2]], axis=1),
    "conv_general_dilated": lambda x: convolve(x, KERNEL, (2, 1), ((0, 1), (1, 1))),
    "custom_jvp_call[gelu]": gelu,
    "custom_jvp_call[relu6]": lambda x: nnx.relu6(4 * x),
    "custom_jvp_call[relu]": nnx.relu,
    "div": lambda x: x / CHANNELS,
    "dot_general": lambda x: jnp.einsum("bhwc,bhvc->bhwv", x, x),
    "exp": jnp.exp,
    "gather": lambda x: x[:, jnp.array([3, 0])],
    "gt": lambda x: jnp.where(x > CHANNELS, x, 1.0),
    "integer_pow": lambda x: x**3,
    "jit[attention_weights]": attention_weights,
    "jit[layer_norm]": lambda x: layer_norm(x, CHANNELS, -CHANNELS, 1e-3),
    "logistic": nnx.sigmoid,
    "lt": lambda x: jnp.where(x < 1, x, CHANNELS),
    "max": lambda x: jnp.maximum(x, CHANNELS),
    "min": lambda x: jnp.minimum(x, 0.5),
    "mul": lambda x: x * x[:, :1],
    "neg": lambda x: -x,
    "pad": lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 0), (0, 3))),
    "reduce_max": lambda x: x.max((1, 2)),
    "reduce_min": lambda x: x.min(3),
    "reduce_sum": lambda x: x.sum((1, 3)),
    "reduce_window_max": lambda x: max_pool(x, 3, 2, (1, 1)),
    "reduce_window_sum": lambda x: nnx.avg_pool(x, (2, 2), (2, 2), ((0, 1), (1, 0))),
    "reshape": lambda x: x.reshape(-1, 36, 4),
    "rsqrt": lambda x: jax.lax.rsqrt(1 + x * x),
    "select_n": lambda x: jnp.where(x > 0, x, 2.0),
    "slice": lambda x: jax.lax.slice_in_dim(x, 1, 5, 2, axis=1),
    "sqrt": lambda x: jnp.sqrt(1 + x * x),
    "square": jnp.square,
    "squeeze": lambda x: x[:, 1:2].squeeze(1),
    "stop_gradient": lambda x: jax.nn.softmax(x, axis=1),
    "sub": lambda x: CHANNELS - x,
    "tanh": jnp.tanh,
    "top_k": lambda x: jax.lax.top_k(x, 2)[1],
    "transpose": lambda x: x.transpose(2, 0, 3, 1),
}


def exported(function):
    """The ONNX model of a function of images [b, 6, 6, 4]."""
    (batch,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, 6, 6, 4), jnp.float32)
    jaxpr, struct = jax.make_jaxpr(function, return_shape=True)(images)
    graph = Graph({"images": images})
    (value,) = translate(graph, jaxpr, [graph.inputs["images"]])
    return graph.model({"output": (value, struct)})


def check(function):
    images = np.random.default_rng(0).standard_normal((2, 6, 6, 4), np.float32)
    session = onnxruntime.InferenceSession(exported(function).SerializeToString())
    (found,) = session.run(None, {"images": images})
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(found, function(images), atol=1e-5)


@pytest.mark.parametrize("name", RULES)
def test_every_operation_computes_the_same(name, monkeypatch):
    calls, rule = [], RULES[name]
    monkeypatch.setitem(
        RULES, name, lambda *args, **params: calls.append(1) or rule(*args, **params)
    )
    check(CASES[name])
    assert calls


@pytest.mark.parametrize(
    ("function", "node"),
    [
        (gelu, "Gelu"),
        (nnx.relu6, "Clip"),
        (attention_weights, "Softmax"),
        (CASES["jit[layer_norm]"], "LayerNormalization"),
    ],
)
def test_functions_that_onnx_has_are_one_node(function, node):
    nodes = [node.op_type for node in exported(function).graph.node]
    assert nodes == [node, "Identity"]


def test_functions_of_the_same_name_are_not_taken_for_them():
    check(jax.jit(partial(nnx.gelu, approximate=True)))

    @jax.jit
    def layer_norm(x, scale):
        return (x - x.mean((1, 2, 3), keepdims=True)) * scale

    @jax.custom_jvp
    def relu(x):
        return jnp.where(x > 0, x, 0.1 * x)

    relu.defjvp(lambda x, tangents: (relu(x[0]), tangents[0]))
    check(lambda x: layer_norm(relu(x), 2.0))


def test_a_pointwise_linear_layer_between_convolutions_stays_channels_first():
    """As a 1x1 convolution, which ONNX Runtime fuses with its neighbours."""

    def function(x):
        x = convolve(x, KERNEL, (1, 1), ((1, 1), (1, 1)))
        x = convolve(x, KERNEL[:1, :1, :2], (1, 1), ((0, 0), (0, 0)))
        return convolve(x, KERNEL[..., :2, :], (1, 1), ((1, 1), (1, 1)))

    check(function)
    nodes = [node.op_type for node in exported(function).graph.node]
    assert nodes == ["Transpose", "Conv", "Conv", "Conv", "Transpose", "Identity"]

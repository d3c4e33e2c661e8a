"""Translates a JAX program into an ONNX model, equation by equation."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from ttame_jax import compilers
from ttame_jax.errors import Failure
from ttame_jax.explainer import Explainer
from ttame_jax.export.program import OUTPUTS, metadata, program

from .graph import Graph, Unsupported, Value, constant, is_static
from .rules import BROADCASTING, RULES

INPUTS = ("images", "classes")

CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call")


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
        values = translate(graph, jaxpr, [graph.inputs[name] for name in INPUTS])
    except Unsupported as error:
        raise Failure(f"{explainer.method.name} cannot be exported to ONNX: {error}") from None
    outputs = jax.tree.unflatten(jax.tree.structure(structs), values)
    model = graph.model({name: (outputs[name], structs[name]) for name in OUTPUTS})
    details = metadata(explainer, structs["maps"].shape[2:])
    onnx.helper.set_model_props(model, {key: json.dumps(v) for key, v in details.items()})
    return model.SerializeToString()


def translate(graph: Graph, closed: ClosedJaxpr, arguments: Sequence[Value]) -> list[Value]:
    """Adds the operations of a program to a graph; returns the program's outputs."""
    jaxpr = closed.jaxpr
    known = [constant(value) for value in closed.consts]
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*known, *arguments]))

    def read(atom):
        if isinstance(atom, Literal):
            aval: Any = atom.aval
            return constant(np.asarray(atom.val, aval.dtype))
        return values[atom]

    for equation in jaxpr.eqns:
        results = _equation(graph, equation, [read(atom) for atom in equation.invars])
        values.update(zip(equation.outvars, results))
    return [read(atom) for atom in jaxpr.outvars]


def _equation(graph, equation, inputs: list[Value]) -> list[Value]:
    name, params = equation.primitive.name, equation.params
    known = all(value.known for value in inputs)
    if name in CALLS:
        inner = next(params[key] for key in ("jaxpr", "call_jaxpr") if key in params)
        name = f"{name}[{inner.jaxpr.debug_info.func_name}]"
        if known or name not in RULES or not _is_known(inner):
            return translate(graph, inner, inputs)
    if name == "platform_index":  # ONNX Runtime is none of XLA's platforms
        return [constant(np.int32(params["platforms"].index(None)))]
    if name == "cond" and inputs[0].known:
        return translate(graph, params["branches"][int(inputs[0].data)], inputs[1:])
    if known and all(is_static(variable.aval.shape) for variable in equation.outvars):
        return _evaluated(equation, inputs)
    if name not in RULES:
        raise Unsupported(f"ONNX has no operation for JAX's {name}")
    if name not in BROADCASTING:
        inputs = [graph.full(x, atom.aval.shape) for x, atom in zip(inputs, equation.invars)]
    result = RULES[name](graph, equation.outvars[0].aval, *inputs, **params)
    return result if isinstance(result, list) else [result]


def _is_known(function: ClosedJaxpr) -> bool:
    """Whether a function is one of JAX's or of `compilers`, not a user's of the same name."""
    _, _, place = (function.jaxpr.debug_info.func_src_info or "").partition(" at ")
    return place.startswith((str(Path(jax.__file__).parent), compilers.__file__))


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

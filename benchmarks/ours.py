"""This project's models under a benchmark's setting, with their FLOPs, memory and device."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from math import prod
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from common import Setting
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr

from ttame_jax import AttentionMechanism, Backbone, compilers, load_backbone

# Dense FLOPs a second of one chip, as its vendor states them; float32 is TF32 on NVIDIA's, which
# is what XLA uses there by default.
PEAKS = {
    "NVIDIA A100": {"bfloat16": 312e12, "float32": 156e12},
    "NVIDIA H100": {"bfloat16": 989e12, "float32": 494e12},
    "NVIDIA H200": {"bfloat16": 989e12, "float32": 494e12},
    "NVIDIA B200": {"bfloat16": 2250e12, "float32": 1125e12},
    "TPU v4": {"bfloat16": 275e12},
    "TPU v5 lite": {"bfloat16": 197e12},
    "TPU v5p": {"bfloat16": 459e12},
    "TPU v5": {"bfloat16": 459e12},
    "TPU v6 lite": {"bfloat16": 918e12},
}


def select_device(setting: Setting) -> None:
    """Makes JAX use the setting's kind of device; call this before anything runs."""
    jax.config.update("jax_platforms", setting.device)


def build(setting: Setting) -> tuple[Backbone, AttentionMechanism]:
    """A classifier and an attention mechanism, both with random weights."""
    select_device(setting)
    options = {"image_size": setting.image_size, "dtype": setting.precision}
    backbone = load_backbone(setting.backbone, **options)
    attention = AttentionMechanism(
        [channels for _, _, channels in backbone.feature_shapes()],
        backbone.num_classes,
        dtype=jnp.dtype(setting.precision),
        rngs=nnx.Rngs(0),
    )
    return backbone, attention


def all_at_once() -> contextlib.AbstractContextManager:
    """On a CPU, too, what is traced in here takes a whole batch at a time: of a loop over groups of
    images the compiler counts one turn."""
    return mock.patch.object(compilers, "CPU_PIXELS", sys.maxsize)


def noise(setting: Setting) -> jax.Array:
    """A batch of noise: uint8 [B, S, S, 3]."""
    shape = (setting.batch_size, setting.image_size, setting.image_size, 3)
    return jax.random.bits(jax.random.key(0), shape, jnp.uint8)


def device() -> dict:
    """What JAX runs on."""
    devices = jax.devices()
    return {"device": devices[0].device_kind, "device_count": len(devices)}


def peak_flops(precision: str) -> float | None:
    """FLOPs a second of all devices together; None where the kind is not in `PEAKS`."""
    kind = jax.devices()[0].device_kind
    for name, peaks in PEAKS.items():
        if kind.startswith(name):
            return peaks[precision] * jax.device_count() if precision in peaks else None
    return None


def memory(compiled: jax.stages.Compiled) -> dict[str, int | None]:
    """Bytes that a compiled program needs, and the most that its device has held so far."""
    needs: Any = compiled.memory_analysis()
    statistics = jax.devices()[0].memory_stats() or {}
    return {
        "program_memory_bytes": needs.argument_size_in_bytes
        + needs.output_size_in_bytes
        - needs.alias_size_in_bytes
        + needs.temp_size_in_bytes,
        "peak_memory_bytes": statistics.get("peak_bytes_in_use"),
    }


def module_flops(module: nnx.Module, *arguments) -> int:
    """`layer_flops` of a module, whose parameters may be shapes."""
    graph, state = nnx.split(module)
    return layer_flops(lambda state, *inputs: nnx.merge(graph, state)(*inputs), state, *arguments)


def layer_flops(function: Callable, *arguments) -> int:
    """FLOPs of a function's convolutions and matrix products, from their shapes alone.

    A product of [M, K] and [K, N] is 2 M N K, and a convolution is one for each place of its
    kernel. Unlike the compiler's own count this depends on no machine and leaves out all else.
    """
    return _jaxpr_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def _jaxpr_flops(jaxpr: Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        variables: list[Any] = [*equation.invars, *equation.outvars]  # all of them arrays
        shapes = [variable.aval.shape for variable in variables]
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2 * prod(shapes[-1]) * prod(shapes[0][axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.params["dimension_numbers"].rhs_spec  # (out, in, *places)
            places = prod(shapes[1][axis] for axis in kernel[1:])
            total += 2 * prod(shapes[-1]) * places
        elif equation.primitive.name == "cond":  # the same operation, for several platforms
            total += max(_jaxpr_flops(branch.jaxpr) for branch in equation.params["branches"])
        else:
            turns = equation.params.get("length", 1)  # of a loop
            total += turns * sum(map(_jaxpr_flops, _inner(equation.params.values())))
    return total


def _inner(values) -> Iterator[Jaxpr]:
    for value in values:
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value

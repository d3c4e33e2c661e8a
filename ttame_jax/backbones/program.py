"""Divides the program of a function at one of the values that it returns."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core


class NotOnThePath(Exception):
    """The logits are not computed from the feature."""


def divide(
    function: Callable[[Any, jax.Array], tuple[jax.Array, Mapping[str, jax.Array]]],
    params: Any,
    image: jax.ShapeDtypeStruct,
    layer: str,
) -> tuple[Callable[..., list[jax.Array]], Callable[..., list[jax.Array]]]:
    """Divides the program of a classifier for one image at a feature.

    The program for one image serves any number of them under `jax.vmap`.

    Args:
      function: ``function(params, images) -> (logits, features)``, with features by name.
      params: a pytree of arrays.
      image: [1, H, W, 3].
      layer: name of the feature.

    Returns:
      ``first(params, image) -> [feature, *others]`` and
      ``last(params, feature, *others) -> [logits]``, where `others` are all other values that
      depend on the image and that `last` needs. What depends on the parameters alone is computed
      in both.

    Raises:
      NotOnThePath: the logits are not computed from the feature.
    """
    # `jax.jit` remembers the traced program of a function.
    closed, structs = jax.make_jaxpr(jax.jit(function), return_shape=True)(params, image)
    flat = jax.make_jaxpr(lambda *inputs: _run(closed, inputs))(*closed.in_avals)
    program = flat.jaxpr
    *given, pixels = program.invars
    logits, features = jax.tree.structure(structs).unflatten(program.outvars)
    maker = {variable: equation for equation in program.eqns for variable in equation.outvars}
    on_the_way = _needed(program.eqns, [logits], [])[1]
    source, undo = features[layer], []
    while source not in on_the_way:  # the model may have gone on with another layout of it
        equation = maker.get(source)
        if equation is None or not _is_layout(equation):
            raise NotOnThePath
        undo.append(equation)
        source = equation.invars[0]
    from_image = _dependent(program.eqns, [pixels])
    if source not in from_image or source == logits:
        raise NotOnThePath
    from_source = _dependent(program.eqns, [source])
    read = _needed([e for e in program.eqns if from_source & set(e.outvars)], [logits], [source])[1]
    others = [v for v in maker | {pixels: None} if v in (read & from_image) - from_source]
    given = [*program.constvars, *given]
    first = _part(program, [*given, pixels], [features[layer], *others])
    last = _part(program, [*given, source, *others], [logits])

    def before(params, image):
        return first(*flat.consts, *jax.tree.leaves(params), image)

    def after(params, feature, *others):
        for equation in undo:
            feature = _undone(equation, feature)
        return last(*flat.consts, *jax.tree.leaves(params), feature, *others)

    return before, after


def read_inputs(function: Callable[..., Any], *arguments: Any) -> list[set[int]]:
    """The inputs that each output of a function is computed from.

    Args:
      function: returns a list of pytrees.
      *arguments: pytrees of arrays or shapes.

    Returns:
      For each item of the list, the indices of the leaves of `arguments` that any of its leaves
      depends on.
    """
    closed, structs = jax.make_jaxpr(function, return_shape=True)(*arguments)
    program = jax.make_jaxpr(lambda *inputs: _run(closed, inputs))(*closed.in_avals).jaxpr
    outputs = jax.tree.structure(structs).unflatten(program.outvars)
    index = {variable: i for i, variable in enumerate(program.invars)}
    return [
        {index[v] for v in _needed(program.eqns, jax.tree.leaves(item), [])[1] if v in index}
        for item in outputs
    ]


CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2")
"""Primitives that only call a program."""

RESHAPES = ("reshape", "squeeze", "expand_dims", "broadcast_in_dim", "convert_element_type", "copy")


def _run(closed: core.ClosedJaxpr, inputs: Sequence[Any]) -> list[Any]:
    """Evaluates a program. Traced, it becomes a program without calls."""
    program = closed.jaxpr
    values = dict(zip([*program.constvars, *program.invars], [*closed.consts, *inputs]))

    def read(atom):
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in program.eqns:
        if equation.primitive.name in CALLS:
            inner = equation.params.get("jaxpr") or equation.params["call_jaxpr"]
            inner = inner if isinstance(inner, core.ClosedJaxpr) else core.ClosedJaxpr(inner, ())
            results = _run(inner, [read(atom) for atom in equation.invars])
        else:
            known = {atom: values[atom] for atom in _variables(equation.invars)}
            alone = program.replace(eqns=[equation])
            results = _part(alone, known, equation.outvars)(*known.values())
        values.update(zip(equation.outvars, results))
    return [read(atom) for atom in program.outvars]


def _variables(atoms) -> set[core.Var]:
    return {atom for atom in atoms if not isinstance(atom, core.Literal)}


def _needed(equations, outputs, inputs) -> tuple[list[core.JaxprEqn], set[core.Var]]:
    """The equations that compute `outputs` from `inputs`, and all variables that they need."""
    needed, chosen = _variables(outputs) - set(inputs), []
    for equation in reversed(equations):
        if needed & set(equation.outvars):
            chosen.append(equation)
            needed |= _variables(equation.invars) - set(inputs)
    return chosen[::-1], needed


def _dependent(equations, inputs) -> set[core.Var]:
    """The variables that depend on any of `inputs`, and these themselves."""
    dependent = set(inputs)
    for equation in equations:
        if dependent & _variables(equation.invars):
            dependent.update(equation.outvars)
    return dependent


def _part(
    program: core.Jaxpr, inputs: Iterable[core.Var], outputs: Iterable[core.Var]
) -> Callable[..., list[jax.Array]]:
    """The function that computes some variables of a program from others."""
    inputs, outputs = list(inputs), list(outputs)
    equations, _ = _needed(program.eqns, outputs, inputs)
    part = program.replace(constvars=[], invars=inputs, outvars=outputs, eqns=equations)
    return lambda *values: jax.core.eval_jaxpr(part, (), *values)


def _is_layout(equation: core.JaxprEqn) -> bool:
    """Whether an equation only arranges the values of one array anew."""
    name, arrays = equation.primitive.name, [*equation.invars, *equation.outvars]
    if name in RESHAPES:
        sizes = {np.prod(_type(array).shape) for array in arrays}
        return len(arrays) == 2 and len(sizes) == 1
    return name == "transpose"


def _undone(equation: core.JaxprEqn, result: jax.Array) -> jax.Array:
    """The array that a layout equation was given."""
    if equation.primitive.name == "transpose":
        return result.transpose(np.argsort(equation.params["permutation"]))
    source = _type(equation.invars[0])
    return result.reshape(source.shape).astype(source.dtype)


def _type(atom: core.Var | core.Literal) -> Any:
    return atom.aval

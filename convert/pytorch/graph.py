"""Reads the computation of a PyTorch module as a graph of ATen operators."""

import dataclasses
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from ttame_jax.backbones import aten
from ttame_jax.backbones.imported import (
    IMAGE,
    Description,
    Graph,
    Node,
    Ref,
    encode,
)
from ttame_jax.files import Tensors
from ttame_jax.preprocessing import Preprocessing

from .checkpoints import numpy_state
from .features import (
    choose_features,
    common_prefix_tokens,
    find_class_weights,
    find_places,
    find_target,
    with_prefix_tokens,
)

KEPT = (
    "adaptive_avg_pool2d.default",
    "adaptive_max_pool2d.default",
    "group_norm.default",
    "hardsigmoid.default",
    "hardswish.default",
    "layer_norm.default",
    "linear.default",
    "matmul.default",
    "max_pool2d.default",
    "mish.default",
    "rms_norm.default",
    "roll.default",
    "scaled_dot_product_attention.default",
    "silu.default",
    "softplus.default",
    "upsample_bicubic2d.vec",
    "upsample_bilinear2d.vec",
    "upsample_nearest2d.vec",
)
"""Operators that PyTorch would decompose, but that JAX computes better as a whole."""


def read(
    module,
    name: str,
    preprocessing: Preprocessing,
    features: Sequence[str] | None = None,
    prefix_tokens: int | None = None,
) -> tuple[Description, Tensors]:
    """The description and tensors with which `ImportedBackbone` computes what a module computes.

    Args:
      module: maps images [B, 3, H, W] to logits [B, num_classes]. It is put into inference mode
        and float32.
      name: what to call it in an error.
      preprocessing: of its input; the graph holds for its `image_size` only.
      features: names of the modules whose outputs are the feature maps, earliest first; None is
        the last three resolutions, or the last three blocks of a classifier of one resolution.
      prefix_tokens: number of tokens before those of the patches; None is the least that leaves a
        square.

    Raises:
      ValueError: the module cannot be read; the message says why.
    """
    import torch

    size = preprocessing.image_size
    module = module.float().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, size, size, generator=generator)
    outputs, logits = _outputs_and_logits(module, image, name)
    trace = _trace(_export(module, image, name), image, outputs)
    graph, tensors = _graph(trace, name)
    graph = dataclasses.replace(
        graph, places=find_places(module, trace.places, outputs, size, prefix_tokens, name)
    )
    layers = choose_features(module, graph, outputs, features, name)
    prefix = common_prefix_tokens(graph.places, layers, name)
    graph = dataclasses.replace(graph, places=with_prefix_tokens(graph.places, prefix))
    last = layers[-1]
    class_weights = find_class_weights(graph, tensors, last, outputs[last], logits)
    for key in graph.kernels():
        axes = tensors[key].ndim
        tensors[key] = np.ascontiguousarray(tensors[key].transpose(*range(2, axes), 1, 0))
    description = Description(
        graph=encode(graph),
        preprocessing=preprocessing,
        features=layers,
        target=find_target(module, image, graph.places, last),
        prefix_tokens=prefix,
        class_weights=class_weights,
    )
    return description, tensors


def _outputs_and_logits(module, image, name: str) -> tuple[dict[str, Any], Any]:
    """`outputs_of` an image, checked."""
    import torch

    try:
        outputs, logits = outputs_of(module, image)
    except Exception as error:  # noqa: BLE001  whatever the module's code raises
        shape = list(image.shape)
        raise ValueError(f"{name} does not take images {shape}: {_line(error)}") from None
    if not torch.is_tensor(logits) or logits.ndim != 2 or len(logits) != 1 or not logits.shape[1]:
        shape = list(logits.shape) if torch.is_tensor(logits) else f"a {type(logits).__name__}"
        raise ValueError(f"{name} must return logits [B, num_classes], not {shape}")
    return outputs, logits


def outputs_of(module, images) -> tuple[dict[str, Any], Any]:
    """The outputs of all modules that return one tensor, by name, and that of the whole."""
    import torch

    found = {}

    def keep(path):
        def hook(module, args, output):
            if torch.is_tensor(output):
                found[path] = output.clone()

        return hook

    hooks = [m.register_forward_hook(keep(path)) for path, m in module.named_modules() if path]
    try:
        with torch.no_grad():
            return found, module(images)
    finally:
        for hook in hooks:
            hook.remove()


def _export(module, image, name: str):
    """PyTorch's own graph of a module, in the operators of `OPERATORS` as far as possible."""
    import torch

    table = torch.export.default_decompositions()
    for kept in KEPT:
        operator, overload = kept.split(".")
        table.pop(getattr(getattr(torch.ops.aten, operator), overload), None)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of PyTorch, about itself
            return torch.export.export(module, (image,)).run_decompositions(table)
    except Exception as error:  # noqa: BLE001  torch.export raises many types
        raise ValueError(f"PyTorch cannot export {name}: {_line(error)}") from None


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@dataclass(frozen=True)
class _Trace:
    """A graph of PyTorch's with its values for one image.

    Attributes:
      nodes: those that the logits depend on and that depend on the image.
      logits: the node of the logits.
      constants: the values of all others that those nodes read, by node.
      names: the tensors' names, by node.
      places: the name of each module's output in the graph, by the module's name and in the order
        of their computation.
    """

    nodes: list[Any]
    logits: Any
    constants: dict[Any, Any]
    names: dict[Any, str]
    places: dict[str, str]


def _trace(program, image, outputs: Mapping[str, Any]) -> _Trace:
    import torch
    from torch.fx import map_arg

    signature = program.graph_signature
    stored = dict(program.state_dict) | dict(program.constants)
    sources = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    (result,) = (node for node in program.graph.nodes if node.op == "output")
    logits = result.args[0][-1]
    needed, queue = set(), [logits]
    while queue:
        if (node := queue.pop()) not in needed:
            needed.add(node)
            queue += node.all_input_nodes
    values, names, dependent, places = {}, {}, {}, {}
    last = {source: node for node in program.graph.nodes for source in node.all_input_nodes}
    for node in program.graph.nodes:
        if node not in needed:
            continue
        if node.op == "placeholder":
            source = sources.get(node.name)
            values[node] = image if source is None else stored[source]
            names[node] = IMAGE if source is None else source
            if source is None:
                dependent[node] = None
            continue
        args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
        with torch.no_grad():
            values[node] = node.target(*args, **kwargs)
        if not any(source in dependent for source in node.all_input_nodes):
            continue
        dependent[node] = None
        for path in _paths(node):
            if path in outputs and _same(values[node], outputs[path]):
                places.pop(path, None)  # the last such node counts
                places[path] = _value(node)
        for source in node.all_input_nodes:
            if source in dependent and last[source] is node:
                del values[source]
    nodes = [node for node in dependent if node.op != "placeholder"]
    read = {source for node in nodes for source in node.all_input_nodes if source not in dependent}
    constants = {node: values[node] for node in values if node in read}
    return _Trace(nodes, logits, constants, names, places)


def _value(node) -> str:
    """The name of a node's value in the graph."""
    return f"%{node.name}"


def _paths(node) -> Iterator[str]:
    """Names of the modules that a node is in."""
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        yield re.sub(r"@\d+", "", path)


def _same(value: Any, output: Any) -> bool:
    import torch

    if not torch.is_tensor(value) or value.shape != output.shape:
        return False
    return bool((value - output).abs().max() <= 1e-4 * output.abs().max())


def _graph(trace: _Trace, name: str) -> tuple[Graph, Tensors]:
    """Our graph, still without places, and the tensors that it reads."""
    names = {node: _value(node) for node in trace.nodes}
    names |= {node: trace.names.get(node, node.name) for node in trace.constants}
    names |= {node: IMAGE for node, source in trace.names.items() if source == IMAGE}
    nodes = [_node(node, names, name) for node in trace.nodes]
    tensors = numpy_state({names[node]: value for node, value in trace.constants.items()})
    tensors = {key: _narrow(value) for key, value in tensors.items()}
    return Graph(tuple(nodes), names[trace.logits], {}), tensors


def _narrow(value: np.ndarray) -> np.ndarray:
    return value.astype(np.int32) if value.dtype == np.int64 else value


NO_VALUE = ("device", "layout", "pin_memory", "memory_format", "non_blocking")
"""Arguments on which no value depends."""


def _node(node, names: Mapping[Any, str], name: str) -> Node:
    operator = str(getattr(node.target, "__name__", node.target)).removeprefix("aten.")
    if operator not in aten.OPERATORS:
        where = [path for path in _paths(node) if path]
        raise ValueError(
            f"{name} needs PyTorch's operator {operator}, which is not supported here"
            + (f" (in its module {where[-1]})" if where else "")
        )
    kwargs = {key: _arg(value, names) for key, value in node.kwargs.items() if key not in NO_VALUE}
    return Node(names[node], operator, [_arg(value, names) for value in node.args], kwargs)


def _arg(value: Any, names: Mapping[Any, str]) -> Any:
    import torch

    if isinstance(value, torch.fx.Node):
        return Ref(names[value])
    if isinstance(value, list | tuple):
        return [_arg(item, names) for item in value]
    if isinstance(value, torch.dtype):
        dtype = str(value).removeprefix("torch.")
        return jnp.dtype({"float64": "float32", "int64": "int32"}.get(dtype, dtype))
    return value

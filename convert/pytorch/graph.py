"""Reads the computation of a PyTorch module as a graph of ATen operators."""

import dataclasses
import difflib
import math
import re
import statistics
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
    Place,
    Ref,
    encode,
)
from ttame_jax.files import Tensors
from ttame_jax.preprocessing import Preprocessing

from .checkpoints import numpy_state

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

MOST_PREFIX_TOKENS = 16
"""Tokens before the patches that a sequence may have to count as an image."""


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
    try:
        outputs, logits = outputs_of(module, image)
    except Exception as error:  # noqa: BLE001  whatever the module's code raises
        shape = list(image.shape)
        raise ValueError(f"{name} does not take images {shape}: {_line(error)}") from None
    if not torch.is_tensor(logits) or logits.ndim != 2 or len(logits) != 1 or not logits.shape[1]:
        shape = list(logits.shape) if torch.is_tensor(logits) else f"a {type(logits).__name__}"
        raise ValueError(f"{name} must return logits [B, num_classes], not {shape}")
    trace = _trace(_export(module, image, name), image, outputs)
    graph, tensors = _graph(trace, name, _places(module, trace, outputs, size, prefix_tokens))
    if not graph.places:
        raise ValueError(
            f"{name} has no spatial features: no module on the way to its logits returns "
            "[B, C, H, W], [B, H, W, C] or square [B, tokens, C]"
        )
    layers = _features(module, graph, outputs, features, name)
    prefix = {p.prefix_tokens for p in map(graph.places.get, layers) if p and p.layout == "tokens"}
    if len(prefix) > 1:
        raise ValueError(
            f"{name} has feature maps with {', '.join(map(str, sorted(prefix)))} tokens before the "
            "patches: choose others with --features"
        )
    (prefix_tokens,) = prefix or {0}
    graph = dataclasses.replace(
        graph,
        places={
            path: place
            for path, place in graph.places.items()
            if place.layout != "tokens" or place.prefix_tokens == prefix_tokens
        },
    )
    target = _target(module, image, graph.places, layers[-1])
    weights = _class_weights(graph, tensors, graph.places[layers[-1]], outputs[layers[-1]], logits)
    for key in graph.kernels():
        axes = tensors[key].ndim
        tensors[key] = np.ascontiguousarray(tensors[key].transpose(*range(2, axes), 1, 0))
    description = Description(
        graph=encode(graph),
        preprocessing=preprocessing,
        features=layers,
        target=target,
        prefix_tokens=prefix_tokens,
        class_weights=weights,
    )
    return description, tensors


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
      places: the node of each module's output, by the module's name.
    """

    nodes: list[Any]
    logits: Any
    constants: dict[Any, Any]
    names: dict[Any, str]
    places: dict[str, Any]


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
                places[path] = node
        for source in node.all_input_nodes:
            if source in dependent and last[source] is node:
                del values[source]
    nodes = [node for node in dependent if node.op != "placeholder"]
    read = {source for node in nodes for source in node.all_input_nodes if source not in dependent}
    constants = {node: values[node] for node in values if node in read}
    return _Trace(nodes, logits, constants, names, places)


def _paths(node) -> Iterator[str]:
    """Names of the modules that a node is in."""
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        yield re.sub(r"@\d+", "", path)


def _same(value: Any, output: Any) -> bool:
    import torch

    if not torch.is_tensor(value) or value.shape != output.shape:
        return False
    return bool((value - output).abs().max() <= 1e-4 * output.abs().max())


def _graph(trace: _Trace, name: str, places: dict[str, Place]) -> tuple[Graph, Tensors]:
    """Our graph, and the tensors that it reads."""
    names = {node: f"%{node.name}" for node in trace.nodes}
    names |= {node: trace.names.get(node, node.name) for node in trace.constants}
    names |= {node: IMAGE for node, source in trace.names.items() if source == IMAGE}
    nodes = [_node(node, names, name) for node in trace.nodes]
    tensors = numpy_state({names[node]: value for node, value in trace.constants.items()})
    tensors = {key: _narrow(value) for key, value in tensors.items()}
    return Graph(tuple(nodes), names[trace.logits], places), tensors


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


def _places(
    module, trace: _Trace, outputs: Mapping[str, Any], size: int, prefix_tokens: int | None
) -> dict[str, Place]:
    if prefix_tokens is None:
        prefix_tokens = getattr(module, "num_prefix_tokens", None)  # timm's
    order = {node: i for i, node in enumerate(trace.nodes)}
    places = {}
    for path in sorted(trace.places, key=lambda path: order[trace.places[path]]):
        value = f"%{trace.places[path].name}"
        if place := _place(value, outputs[path].shape, size, prefix_tokens):
            places[path] = place
    return places


def _place(value: str, shape: Sequence[int], size: int, prefix_tokens: int | None) -> Place | None:
    """An output with an extent in space, from its shape; None for any other."""
    if len(shape) == 4 and shape[0] == 1:
        if 2 <= shape[2] == shape[3] <= size:
            return Place(value, "channels_first")
        if 2 <= shape[1] == shape[2] <= size:
            return Place(value, "channels_last")
    if len(shape) == 3 and shape[0] == 1:
        tokens = shape[1]
        for prefix in (prefix_tokens, tokens - math.isqrt(tokens) ** 2):
            if prefix is None or not 0 <= prefix <= MOST_PREFIX_TOKENS:
                continue
            side = math.isqrt(max(tokens - prefix, 0))
            if 2 <= side <= size and side * side == tokens - prefix:
                return Place(value, "tokens", prefix)
    return None


def _side(place: Place, shape: Sequence[int]) -> int:
    """Height and width of a place's feature map."""
    if place.layout == "tokens":
        return math.isqrt(shape[1] - place.prefix_tokens)
    return shape[2] if place.layout == "channels_first" else shape[1]


def _features(
    module,
    graph: Graph,
    outputs: Mapping[str, Any],
    chosen: Sequence[str] | None,
    name: str,
) -> tuple[str, ...]:
    """The modules whose outputs are the feature maps."""
    places = graph.places
    for path in chosen or ():
        if path not in places:
            near = difflib.get_close_matches(path, places, n=6, cutoff=0)
            raise ValueError(
                f"{name} has no module {path!r} with spatial features; it has {', '.join(near)} "
                "and others"
            )
    if chosen:
        return tuple(sorted(chosen, key=list(places).index))
    sides = {path: _side(place, outputs[path].shape) for path, place in places.items()}
    info = getattr(module, "feature_info", None) or ()  # timm's
    listed = [entry["module"] for entry in info if isinstance(entry, dict)]
    listed = [same for path in listed if (same := _computed(path, places, outputs))]
    if len(listed) >= 3:
        return _resolutions(listed, sides) or tuple(_of_one_prefix(listed, places)[-3:])
    trunk = _trunk(graph)
    trunk = [path for path, place in places.items() if place.value in trunk] or list(places)
    # The first layers of a block that lowers the resolution belong to that block.
    ends = [path for path in trunk if not _inside_lower(module, path, sides)] or trunk
    outer = {places[path].value: path for path in sorted(ends, key=len, reverse=True)}
    ends = [outer[places[path].value] for path in ends]
    blocks = _of_one_prefix(_blocks(module, trunk, sides), places)
    return _resolutions(ends, sides) or tuple(blocks[-3:] or ends[-1:])


def _computed(path: str, places: Mapping[str, Place], outputs: Mapping[str, Any]) -> str | None:
    """The module itself, or the outermost one with the same output if it is an identity."""
    import torch

    if path in places or path not in outputs:
        return path if path in places else None
    equal = [one for one in places if torch.equal(outputs[one], outputs[path])]
    return min(equal, key=len, default=None)


def _of_one_prefix(paths: Sequence[str], places: Mapping[str, Place]) -> list[str]:
    """The paths with as many tokens before the patches as most of them have."""
    prefixes = [places[path].prefix_tokens for path in paths]
    return [path for path in paths if places[path].prefix_tokens == statistics.mode(prefixes)]


def _trunk(graph: Graph) -> set[str]:
    """The values that everything passes through on its way from the image to the logits.

    Branches, such as those of residual blocks and maps of attention, are none.
    """
    last = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs}
    trunk, read_until = set(), last[IMAGE]
    for i, node in enumerate(graph.nodes):
        if read_until <= i:
            trunk.add(node.name)
        read_until = max(read_until, last.get(node.name, i))
    return trunk


def _resolutions(paths: Sequence[str], sides: Mapping[str, int]) -> tuple[str, ...]:
    """The last of the paths at each of the three lowest resolutions; empty if there are fewer."""
    last = {sides[path]: path for path in paths}
    lowest = sorted(last, reverse=True)[-3:]
    return tuple(last[side] for side in lowest) if len(lowest) == 3 else ()


def _inside_lower(module, path: str, sides: Mapping[str, int]) -> bool:
    """Whether a module is part of another one, no plain sequence, that returns fewer positions."""
    from torch import nn

    outer = path
    while outer := outer.rpartition(".")[0]:
        plain = type(module.get_submodule(outer)) is nn.Sequential
        if not plain and sides.get(outer, sides[path]) < sides[path]:
            return True
    return False


def _blocks(module, paths: Sequence[str], sides: Mapping[str, int]) -> list[str]:
    """The longest, and last, sequence of siblings of one class among `paths` of the last one's
    resolution."""
    lowest = {path for path in paths if sides[path] == sides[paths[-1]]}
    sequences = {}
    for path, one in module.named_modules():
        if path in lowest:
            sequences.setdefault((path.rpartition(".")[0], type(one)), []).append(path)
    return max(reversed(sequences.values()), key=len)


def _target(module, image, places: Mapping[str, Place], last: str) -> str:
    """The module that CAM methods read: the last feature map, if the logits depend on its patches.

    After the last attention of a ViT that classifies by its class token they do not. Then it is the
    last child of that block on whose patches they depend.
    """
    children = [path for path in places if path.rpartition(".")[0] == last]
    for path in (last, *reversed(children)):
        if _depends(module, image, path, places[path]):
            return path
    return last


def _depends(module, image, path: str, place: Place) -> bool:
    """Whether the logits have a gradient at the patches of a module's output."""
    import torch

    kept = []
    hook = module.get_submodule(path).register_forward_hook(
        lambda module, args, output: kept.append(output)
    )
    with torch.enable_grad():
        try:
            logits = module(image.clone().requires_grad_())
        finally:
            hook.remove()
        (gradient,) = torch.autograd.grad(logits.max(), kept[-1:], allow_unused=True)
    if gradient is None:
        return False
    return bool((gradient[:, place.prefix_tokens :] if gradient.ndim == 3 else gradient).any())


def _class_weights(graph: Graph, tensors: Tensors, place: Place, feature, logits) -> str | None:
    """The kernel of a linear layer that reads the average of the last feature map."""
    nodes = {node.name: node for node in graph.nodes}
    name = graph.logits
    while (node := nodes.get(name)) and node.operator in ("view.default", "clone.default"):
        (name,) = node.inputs
    if node is None or node.operator not in ("linear.default", "convolution.default"):
        return None
    weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
    value = feature.numpy()[0]
    if place.layout == "channels_first":
        average = value.mean((1, 2))
    elif place.layout == "channels_last":
        average = value.mean((0, 1))
    else:
        average = value[place.prefix_tokens :].mean(0)
    kernel = tensors.get(weight.name, np.zeros((0, 0)))
    if kernel.size != average.size * logits.shape[1] or weight.name not in graph.kernels():
        return None
    ours = kernel.reshape(len(kernel), -1) @ average + (0 if bias is None else tensors[bias.name])
    theirs = logits.numpy()[0]
    close = np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()
    return weight.name if close else None

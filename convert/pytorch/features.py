"""Finds what explanation methods read in a PyTorch module: its feature maps and their layers."""

import difflib
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ttame_jax.backbones.imported import IMAGE, Graph, Place
from ttame_jax.files import Tensors

MOST_PREFIX_TOKENS = 16
"""Tokens before the patches that a sequence may have to count as an image."""


def find_places(
    module,
    values: Mapping[str, str],
    outputs: Mapping[str, Any],
    size: int,
    prefix_tokens: int | None,
    name: str,
) -> dict[str, Place]:
    """The outputs with an extent in space, by name of the module.

    Args:
      module: the classifier.
      values: the name of each module's output in the graph.
      outputs: these outputs, of one image.
      size: height and width of the image.
      prefix_tokens: see `graph.read`.
      name: what to call the classifier in an error.

    Raises:
      ValueError: there are none.
    """
    known = [prefix_tokens]
    if prefix_tokens is None:
        known = [getattr(module, "num_prefix_tokens", None), None]  # timm's, or what fits
    places = {
        path: place
        for path, value in values.items()
        if (place := _place(value, outputs[path].shape, size, known))
    }
    if prefix_tokens is not None and not any(x.layout == "tokens" for x in places.values()):
        raise ValueError(
            f"no module of {name} returns a square of tokens after {prefix_tokens} others"
        )
    if not places:
        raise ValueError(
            f"{name} has no spatial features: no module on the way to its logits returns "
            "[B, C, H, W], [B, H, W, C] or square [B, tokens, C]"
        )
    return places


def _place(
    value: str, shape: Sequence[int], size: int, prefixes: Sequence[int | None]
) -> Place | None:
    """An output with an extent in space, from its shape; None for any other."""
    if len(shape) == 4 and shape[0] == 1:
        if 2 <= shape[2] == shape[3] <= size:
            return Place(value, "channels_first")
        if 2 <= shape[1] == shape[2] <= size:
            return Place(value, "channels_last")
    if len(shape) == 3 and shape[0] == 1:
        tokens = shape[1]
        for prefix in prefixes:
            if prefix is None:
                prefix = tokens - math.isqrt(tokens) ** 2
            if not 0 <= prefix <= MOST_PREFIX_TOKENS:
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


def choose_features(
    module,
    graph: Graph,
    outputs: Mapping[str, Any],
    chosen: Sequence[str] | None,
    name: str,
) -> tuple[str, ...]:
    """The modules whose outputs are the feature maps.

    Args:
      module: the classifier.
      graph: its computation, with places.
      outputs: see `find_places`.
      chosen: see `graph.read`.
      name: what to call the classifier in an error.

    Raises:
      ValueError: a chosen module does not exist or has no spatial features.
    """
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


def common_prefix_tokens(places: Mapping[str, Place], layers: Sequence[str], name: str) -> int:
    """The number of tokens before the patches in feature maps; 0 if none is of tokens.

    Raises:
      ValueError: they differ.
    """
    of_tokens = [places[path] for path in layers if places[path].layout == "tokens"]
    prefix = sorted({place.prefix_tokens for place in of_tokens}) or [0]
    if len(prefix) > 1:
        raise ValueError(
            f"{name} has feature maps with {', '.join(map(str, prefix))} tokens before the "
            "patches: choose others with --features"
        )
    return prefix[0]


def with_prefix_tokens(places: Mapping[str, Place], prefix_tokens: int) -> dict[str, Place]:
    """The places that are no tokens, or have so many before those of the patches."""
    return {
        path: place
        for path, place in places.items()
        if place.layout != "tokens" or place.prefix_tokens == prefix_tokens
    }


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


def find_target(module, image, places: Mapping[str, Place], last: str) -> str:
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


def find_class_weights(graph: Graph, tensors: Tensors, last: str, feature, logits) -> str | None:
    """The kernel of a linear layer that reads the average of the last feature map.

    Args:
      graph: the computation.
      tensors: those that it reads, in PyTorch's layout.
      last: name of the last feature map.
      feature: its value for one image.
      logits: those of the image [1, num_classes].

    Returns:
      The kernel's name; None if there is no such layer.
    """
    place = graph.places[last]
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

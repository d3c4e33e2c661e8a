"""Classifiers imported from PyTorch: a graph of ATen operators, interpreted in JAX.

`ttame convert import` writes the graph (`ttame_jax.convert.pytorch.graph`). It is data: an operator
is looked up in a table, and nothing in a file is run as code. The graph describes a single image;
batches are mapped over it.
"""

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from ttame_jax.files import Tensors
from ttame_jax.preprocessing import Preprocessing

from . import aten
from .function import FunctionBackbone

Layout = Literal["channels_first", "channels_last", "tokens"]
"""How a module's output lies in memory: [1, C, H, W], [1, H, W, C] or [1, tokens, C]."""


class Ref(NamedTuple):
    """A value of the graph as an argument."""

    name: str


class Node(NamedTuple):
    """An operator applied to earlier values and constants."""

    name: str
    operator: str
    args: list[Any]
    kwargs: dict[str, Any]

    @property
    def inputs(self) -> list[str]:
        """Names of the values it reads."""
        return [ref.name for ref in _refs([self.args, list(self.kwargs.values())])]


class Place(NamedTuple):
    """The output of a module with an extent in space.

    Attributes:
      value: its name in the graph.
      layout: its layout.
      prefix_tokens: tokens before those of the patches.
    """

    value: str
    layout: Layout
    prefix_tokens: int = 0


@dataclass(frozen=True)
class Graph:
    """The computation of one image [1, 3, H, W].

    Attributes:
      nodes: in the order of their computation. Values that no node computes are tensors, or the
        image, "image".
      logits: name of the value [1, num_classes].
      places: by name of the module, in the order of their computation.
    """

    nodes: tuple[Node, ...]
    logits: str
    places: Mapping[str, Place]

    def run(
        self, tensors: Mapping[str, jax.Array], image: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Logits [1, num_classes] of an image [1, H, W, 3], and the places' values.

        These are [1, H, W, C] or [1, tokens, C].
        """
        kernels = self.kernels()
        values: dict[str, Any] = {IMAGE: aten.ChannelsLast(image)} | {
            key: aten.Kernel(x) if key in kernels else x for key, x in tensors.items()
        }
        first = {p.value for p in self.places.values() if p.layout == "channels_first"}

        def value(arg):
            if isinstance(arg, Ref):
                return values[arg.name]
            return [value(item) for item in arg] if isinstance(arg, list) else arg

        for node in self.nodes:
            kwargs = {key: value(arg) for key, arg in node.kwargs.items()}
            result = aten.apply(node.operator, value(node.args), kwargs)
            # What is returned is what the next layer reads, as `FunctionBackbone` needs it.
            stored = node.name in first and not isinstance(result, aten.ChannelsLast)
            values[node.name] = aten.ChannelsLast(aten.channels_last(result)) if stored else result
        features = {
            name: aten.channels_last(values[place.value])
            if place.value in first
            else aten.plain(values[place.value])
            for name, place in self.places.items()
        }
        return aten.plain(values[self.logits]), features

    def check(self, tensors: Iterable[str], layers: Iterable[str]) -> None:
        """Raises ValueError unless every value is known where it is read, and every layer exists."""
        known = {IMAGE, *tensors}
        for node in self.nodes:
            if missing := set(node.inputs) - known:
                raise ValueError(f"its graph reads {missing.pop()}, which does not exist")
            known.add(node.name)
        values = {self.logits, *(place.value for place in self.places.values())}
        if missing := [*(values - known), *(set(layers) - self.places.keys())]:
            raise ValueError(f"its graph has no {missing[0]}")

    def kernels(self) -> set[str]:
        """Weights of linear layers and convolutions, which are stored as [..., in, out]."""
        computed, readers = {node.name for node in self.nodes}, {}
        for node in self.nodes:
            for name in node.inputs:
                readers.setdefault(name, []).append(node)
        return {
            name
            for name, nodes in readers.items()
            if name not in computed and all(_is_kernel(name, node) for node in nodes)
        }


IMAGE = "image"


def _is_kernel(name: str, node: Node) -> bool:
    if node.operator == "convolution.default" and (len(node.args[3]) != 2 or node.args[6]):
        return False
    return node.operator in ("convolution.default", "linear.default") and node.args[1] == Ref(name)


def _refs(value: Any) -> Iterable[Ref]:
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _refs(item)


def encode(graph: Graph) -> str:
    """A graph as JSON text."""
    nodes = [
        [n.name, n.operator, _encoded(n.args), {k: _encoded(v) for k, v in n.kwargs.items()}]
        for n in graph.nodes
    ]
    return json.dumps({"nodes": nodes, "logits": graph.logits, "places": graph.places})


def _encoded(value: Any) -> Any:
    if isinstance(value, Ref):
        return {"value": value.name}
    if isinstance(value, jnp.dtype):
        return {"dtype": value.name}
    if isinstance(value, list):
        return [_encoded(item) for item in value]
    return value


@functools.lru_cache(maxsize=8)
def decode(text: str) -> Graph:
    """The graph that `encode` wrote.

    Raises:
      ValueError: it is not such a graph, or has an operator that this version does not know.
    """
    try:
        fields = json.loads(text)
        nodes = tuple(
            Node(name, operator, _decoded(args), {k: _decoded(v) for k, v in kwargs.items()})
            for name, operator, args, kwargs in fields["nodes"]
        )
        places = {name: Place(*place) for name, place in fields["places"].items()}
        graph = Graph(nodes, fields["logits"], places)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a graph of this project: {error}") from None
    if unknown := sorted({node.operator for node in nodes} - aten.OPERATORS):
        raise ValueError(
            f"its graph has operators that this version does not know: {', '.join(unknown)}"
        )
    return graph


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        return Ref(value["value"]) if "value" in value else jnp.dtype(value["dtype"])
    return [_decoded(item) for item in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class Forward:
    """A graph as the function of a `FunctionBackbone`.

    Attributes:
      graph: as `encode` writes it.
    """

    graph: str

    def __call__(self, tensors: Mapping[str, jax.Array], images: jax.Array):
        """Tensors by name, images [B, H, W, 3] -> logits [B, num_classes] and the places' values."""
        graph = decode(self.graph)
        if images.shape[0] == 1:
            return graph.run(tensors, images)

        def of_image(image):
            logits, features = graph.run(tensors, image[None])
            return logits[0], {name: feature[0] for name, feature in features.items()}

        logits, features = jax.vmap(of_image)(images)
        return logits, {name: features[name] for name in graph.places}  # in their order


@dataclass(frozen=True, kw_only=True)
class Description:
    """An imported classifier, besides its tensors.

    Attributes:
      graph: as `encode` writes it.
      preprocessing: of its input, whose size is fixed.
      features: modules whose outputs are the feature maps, earliest first.
      target: the module whose output CAM methods read.
      prefix_tokens: tokens before those of the patches, in all places that are tokens.
      class_weights: name of the kernel of a linear layer that reads the average of the last
        feature map; None if there is no such layer.
      class_names: one for each class, or None.
    """

    graph: str
    preprocessing: Preprocessing
    features: tuple[str, ...]
    target: str
    prefix_tokens: int = 0
    class_weights: str | None = None
    class_names: tuple[str, ...] | None = None


class ImportedBackbone(FunctionBackbone):
    """A classifier imported from PyTorch by `ttame convert import`.

    Its features are outputs of PyTorch's modules, under the names that `named_modules()` gives them.

    Args:
      name: what messages and results call the classifier.
      description: what is known of it.
      tensors: those of the graph, by name.
    """

    def __init__(self, name: str, description: Description, tensors: Tensors):
        self.description = description
        super().__init__(
            Forward(description.graph),
            tensors,
            name=name,
            preprocessing=description.preprocessing,
            class_names=description.class_names,
            feature_layers=description.features,
            target_layer=description.target,
            layout="NHWC",
            prefix_tokens=description.prefix_tokens,
            any_size=False,
        )

    @property
    def graph(self) -> Graph:
        return decode(self.description.graph)

    @property
    def class_weights(self) -> jax.Array | None:
        if self.description.class_weights is None:
            return None
        kernel = self.params[self.description.class_weights]
        return kernel.reshape(kernel.shape[-2:])

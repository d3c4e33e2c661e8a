"""The record of a family: everything that is known of it besides its modules."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ttame_jax.files import Tensors

from .base import Architecture
from .tensors import Table

Call = tuple[str, dict[str, Any]]
"""A function or model name of a library, and its keyword arguments."""


@dataclass(frozen=True, kw_only=True)
class Library:
    """A family as a PyTorch library has it. PyTorch itself is not imported here.

    Attributes:
      models: the library's model of each published architecture, by our name.
      tensors: the table of tensor names of a backbone; empty if the library cannot compute it.
      feature_nodes: names of the modules whose outputs are the backbone's feature maps, earliest
        first.
      channels_last: whether those outputs are [B, H, W, C].
      options: keyword arguments besides `num_classes` that the library's constructor needs.
      build: how the library builds an architecture that has no name there; None if it cannot.
    """

    models: Mapping[str, str]
    tensors: Callable[[Any], Table]
    feature_nodes: Callable[[Any], list[str]]
    channels_last: bool = False
    options: Callable[[Any], dict[str, Any]] = lambda backbone: {}
    build: Callable[[Any], Call | None] = lambda backbone: None


@dataclass(frozen=True, kw_only=True)
class Torchvision(Library):
    """A family in torchvision.

    Attributes:
      target_node: name of the module whose output is that of the backbone's `target_layer`.
      renamed: today's key of a tensor that older published files have under another name.
    """

    target_node: Callable[[Any], str]
    renamed: Callable[[str], str] = str


@dataclass(frozen=True, kw_only=True)
class Timm(Library):
    """A family in timm. `models` are architectures with the tag of timm's default weights.

    Attributes:
      module: class name of timm's module.
      files: timm's source files (`timm.models.FILE`) that define models of this class.
      layers: class names of the layers that an architecture may consist of, besides the layers
        that all families share.
      refusals: reasons why a module of this class cannot be built here.
      read: the architecture of a module, except for its classes and preprocessing.
      image_size: the input size of a module; None is that of its pretrained configuration.
      derived: endings of the keys of tensors that timm no longer stores, but older published files
        do.
    """

    module: str
    files: tuple[str, ...]
    layers: frozenset[str]
    read: Callable[[Any], dict[str, Any]]
    refusals: Callable[[Any], Iterator[str]] = lambda module: iter(())
    image_size: Callable[[Any], int | None] = lambda module: None
    derived: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class HuggingFace:
    """A family in Hugging Face's transformers.

    Attributes:
      model_types: as in ``config.json``.
      read: the architecture that a ``config.json`` describes, except for classes and preprocessing.
      refusals: reasons why a model with that ``config.json`` cannot be built here.
      renamed: a checkpoint's tensors under timm's names; any others as they are.
    """

    model_types: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    refusals: Callable[[Mapping[str, Any]], Iterator[str]]
    renamed: Callable[[Tensors], Tensors]


@dataclass(frozen=True, kw_only=True)
class AuthorsCode:
    """A family in the authors' PyTorch code.

    Attributes:
      nodes: names of the feature maps in the graph that torchvision traces.
      models: torchvision's names of the models that the code can load; None is all.
      prefix: what precedes the keys of the attention mechanism in a checkpoint.
    """

    nodes: Callable[[Any], list[str]]
    models: tuple[str, ...] | None = None
    prefix: str = ""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of classifiers.

    Attributes:
      backbone: its class, a subclass of `Backbone` whose constructor also takes `rngs`.
      architecture: the class of its architectures.
      architectures: the architectures that have a name.
      free: fields that a caller of `load_backbone` may set, by name of the architecture.
      torchvision, timm, huggingface, authors: the family in PyTorch; None where it does not exist.
    """

    backbone: type[Any]
    architecture: type[Architecture]
    architectures: Mapping[str, Architecture]
    free: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    torchvision: Torchvision | None = None
    timm: Timm | None = None
    huggingface: HuggingFace | None = None
    authors: AuthorsCode | None = None

    @property
    def libraries(self) -> dict[str, Library]:
        """The PyTorch libraries that have the family, by name."""
        both = {"torchvision": self.torchvision, "timm": self.timm}
        return {name: library for name, library in both.items() if library is not None}

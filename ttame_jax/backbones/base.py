"""The interface of every frozen classifier: preprocessing, masking, logits and feature maps."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from ttame_jax.compilers import in_groups
from ttame_jax.labels import check_names, default_names
from ttame_jax.preprocessing import IMAGENET, Masking, Preprocessing

State = tuple[jax.Array, ...]
"""What a layer passes to the next one: its output, then any values carried alongside."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The sizes of a classifier. Families add their own fields."""

    num_classes: int = 1000
    preprocessing: Preprocessing = IMAGENET
    class_names: tuple[str, ...] | None = None


def chain(
    named: Iterable[tuple[str, Callable[..., jax.Array]]],
) -> list[tuple[str, Callable[..., State]]]:
    """Functions of one array as layers that carry nothing alongside their output."""

    def layer(function):
        return lambda *arguments: (function(*arguments),)

    return [(name, layer(function)) for name, function in named]


def _run(steps: Iterable[Callable[..., State]], state: State) -> State:
    for step in steps:
        state = step(*state)
    return state


class Backbone(nnx.Module):
    """A frozen image classifier that also returns the feature maps its explanation reads.

    It always runs in inference mode: BatchNorm uses its running statistics and there is no
    dropout. Parameters are float32.

    Args:
      name: the name `load_backbone` knows it by.
      architecture: its sizes.
      features: which of `feature_kinds` the feature maps are; None is the first.
      dtype: of the computation and of the feature maps.

    Attributes:
      num_classes: length of the logits.
      preprocessing: the preprocessing of its input.
      class_names: the names of its classes: those of the architecture, ImageNet's for 1000 classes
        without names, and None for others.
      masking: how the paper masks this classifier's input (section III-C).
      feature_kinds: the choices of feature maps that the family offers.
      compared_features: those of `feature_kinds` that the paper's ablation compares (Table VI).
      feature_layers: names of the layers (see `named_layers`) whose outputs are the feature maps.
      target_layer: name of the layer that CAM methods read.
      prefix_tokens: number of tokens before the patches in the outputs of a transformer's layers.
      rise_masks: number of masks that RISE's authors use for classifiers of this kind.
      min_size: smallest height and width of an input, in pixels.
      tpu_pixels: pixels that a TPU processes at a time (`compilers.in_groups`).
      any_size: whether inputs may have another size than that of `preprocessing`.
    """

    masking: Masking = "pixel"
    feature_kinds: ClassVar[tuple[str, ...]] = ()
    compared_features: ClassVar[tuple[str, ...]] = ()
    rise_masks: ClassVar[int] = 8000
    any_size: bool = True
    prefix_tokens: int = 0
    min_size: int = 1
    tpu_pixels: ClassVar[int | None] = None
    feature_layers: tuple[str, ...]
    target_layer: str

    def __init__(
        self,
        name: str,
        architecture: Architecture,
        *,
        features: str | None = None,
        dtype: DTypeLike = jnp.float32,
    ):
        count = architecture.num_classes
        if not isinstance(count, int | np.integer) or count < 1:
            raise ValueError(f"num_classes must be a positive integer, not {count!r}")
        if features is not None and features not in self.feature_kinds:
            known = " or ".join(map(repr, self.feature_kinds))
            raise ValueError(f"features of {name} are {known}, not {features!r}")
        if architecture.class_names is not None:
            check_names(architecture.class_names, count)
        self.name = name
        self.architecture = architecture
        self.features = features or next(iter(self.feature_kinds), None)
        self.dtype = jnp.dtype(dtype)

    @property
    def num_classes(self) -> int:
        return self.architecture.num_classes

    @property
    def preprocessing(self) -> Preprocessing:
        return self.architecture.preprocessing

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self.architecture.class_names or default_names(self.num_classes)

    def __call__(self, images: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Computes logits and feature maps of standardised images.

        Args:
          images: [B, H, W, 3], standardised by `preprocessing`.

        Returns:
          Logits [B, num_classes] in float32, and a tuple of feature maps [B, H_i, W_i, C_i] in
          `dtype`, earliest first.

        Raises:
          ValueError: the images have another shape, or a size this classifier cannot take.
        """
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"{self.name} takes images [B, H, W, 3], got {list(images.shape)}")
        self.check_size(images.shape[1], images.shape[2])
        return in_groups(self._forward, images, tpu_pixels=self.tpu_pixels)

    def _forward(self, images):
        state, features = (images.astype(self.dtype),), []
        for name, layer in self.named_layers():
            state = layer(*state)
            if name in self.feature_layers:
                features.append(self.feature_map(state[0]))
        return state[0].astype(jnp.float32), tuple(features)

    def named_layers(self) -> list[tuple[str, Callable[..., State]]]:
        """The computation layer by layer, from images in `dtype` to logits.

        Each layer takes the state of the one before as arguments. The last one, "head", returns
        (logits,). It also takes classes [K], to compute only their logits (None: all).
        """
        raise NotImplementedError

    def layer_outputs(self, images: jax.Array) -> dict[str, Any]:
        """What each layer returns for standardised images, by the layer's name in their order.

        The last one, "head", returns the logits.
        """
        state, outputs = (images.astype(self.dtype),), {}
        for name, layer in self.named_layers():
            state = outputs[name] = layer(*state)
        return outputs

    def feature_map(self, x: jax.Array) -> jax.Array:
        """A layer's output as [B, H_i, W_i, C_i]."""
        return x

    def split(
        self, layer: str | None = None
    ) -> tuple[Callable[[jax.Array], State], Callable[..., jax.Array]]:
        """Splits the computation after a layer.

        Args:
          layer: a name in `named_layers`; None is `target_layer`.

        Returns:
          ``before``: standardised images [B, H, W, 3] -> the layer's state, its output first.
          ``after``: a state -> logits [B, num_classes] in float32, or [B, K] for classes [K].

        Raises:
          ValueError: there is no such layer. ``before``: see `check_size`.
        """
        layer = layer or self.target_layer
        names, steps = zip(*self.named_layers())
        if layer not in names[:-1]:
            raise ValueError(f"{self.name} has no layer {layer!r}; it has {', '.join(names[:-1])}")
        cut = names.index(layer) + 1

        def before(images):
            self.check_size(*images.shape[1:3])
            return _run(steps[:cut], (images.astype(self.dtype),))

        def after(state, classes=None):
            state = _run(steps[cut:-1], state)
            return steps[-1](*state, classes)[0].astype(jnp.float32)

        return before, after

    def check_size(self, height: int, width: int) -> None:
        """Raises ValueError for an input size that this classifier cannot take."""
        if min(height, width) < self.min_size:
            raise ValueError(
                f"{self.name} takes images of at least {self.min_size}x{self.min_size} pixels, "
                f"got {height}x{width}"
            )
        size = self.preprocessing.image_size
        if not self.any_size and (height, width) != (size, size):
            raise ValueError(
                f"{self.name} was built for {size}x{size} pixels, got {height}x{width}; "
                "load it with the image_size you need (square images)"
            )

    def feature_shapes(self, image_size: int | None = None) -> tuple[tuple[int, int, int], ...]:
        """(H_i, W_i, C_i) of each feature map for a square input, without computing anything."""
        size = image_size or self.preprocessing.image_size
        image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        _, features = nnx.eval_shape(lambda backbone, x: backbone(x), self, image)
        return tuple(feature.shape[1:] for feature in features)

    @property
    def class_weights(self) -> jax.Array | None:
        """[C, num_classes]: the weight of each channel of the last feature map for each class.

        Only for a classifier that averages that map and feeds it to a linear layer (as CAM needs,
        Zhou et al., CVPR 2016); None for others.
        """
        return None

    def fit_tensor(self, path: str, tensor: Any) -> Any:
        """A stored tensor, adapted to this classifier's input size where that is defined."""
        return tensor

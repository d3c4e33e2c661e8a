"""What every frozen classifier offers: preprocessing, masking kind, logits and feature maps."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

Masking = Literal["pixel", "standardised"]

State = tuple[jax.Array, ...]
"""What a layer hands to the next one: its output, then whatever else goes on beside it."""


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the classifier's input. The defaults are torchvision's for ImageNet.

    The shortest side is resized (antialiased) to `resize_size` pixels, a centre square of
    `image_size` pixels is cut out, scaled to [0, 1] and standardised per channel (RGB).

    Raises:
      ValueError: `resize_size` is smaller than `image_size`.
    """

    image_size: int = 224
    resize_size: int = 256
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self):
        if self.resize_size < self.image_size:
            raise ValueError(
                f"resize_size must be at least image_size: no {self.image_size} pixels can be cut "
                f"out of {self.resize_size}"
            )

    def standardise(self, images: jax.Array) -> jax.Array:
        """Images [..., 3] in [0, 1] -> (images - mean) / std, the same shape and dtype."""
        mean, std = (jnp.asarray(values, images.dtype) for values in (self.mean, self.std))
        return (images - mean) / std

    def resized(self, image_size: int) -> "Preprocessing":
        """The same preprocessing for another input size; the share that is cropped stays."""
        resize_size = image_size * self.resize_size // self.image_size
        return replace(self, image_size=image_size, resize_size=resize_size)


def chain(
    named: Iterable[tuple[str, Callable[..., jax.Array]]],
) -> list[tuple[str, Callable[..., State]]]:
    """Functions of one array as layers: nothing goes on beside it."""

    def layer(function):
        return lambda *arguments: (function(*arguments),)

    return [(name, layer(function)) for name, function in named]


def _run(steps: Iterable[Callable[..., State]], state: State) -> State:
    for step in steps:
        state = step(*state)
    return state


CPU_PIXELS = (os.cpu_count() or 1) * 224 * 224
"""What a CPU classifies at a time: an image of the usual size for each of its cores."""


def in_groups(function: Callable[..., Any], images: jax.Array, *others: jax.Array) -> Any:
    """What a function of a batch gives, computed a few images at a time on a CPU.

    Their activations then stay in its caches, which makes a classifier and its gradient up to a
    fifth faster. Elsewhere, and outside of `jax.jit` (where a loop would be compiled at every
    call), all go through at once.

    Args:
      function: of arrays [n, ...] as those given, for any n; gives a tree of arrays [n, ...].
      images: [B, H, W, 3].
      others: what belongs to the images, [B, ...].
    """
    size = len(images)
    if jax.default_backend() == "cpu" and isinstance(images, jax.core.Tracer):
        most = max(CPU_PIXELS // (images.shape[1] * images.shape[2]), 1)
        size = next(n for n in range(min(most, size), 0, -1) if size % n == 0)
    if size == len(images):
        return function(images, *others)
    groups = [x.reshape(-1, size, *x.shape[1:]) for x in (images, *others)]
    outputs = jax.lax.map(lambda group: function(*group), groups)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)


IMAGENET = Preprocessing()


# Mean and deviation of the built-in data set: its mean colour hides a digit, as it should where
# a mask is 0; ImageNet's would leave the digit's outline on the darker canvas.
DIGITS = Preprocessing(image_size=64, resize_size=64, mean=(0.31,) * 3, std=(0.24,) * 3)


class Backbone(nnx.Module):
    """A frozen image classifier that also returns the feature maps its explanation reads.

    It always computes as in inference: BatchNorm uses its running statistics and there is no
    dropout. Parameters are float32; `dtype` is the type of computation and of feature maps.

    Attributes:
      name: the name `load_backbone` knows it by.
      num_classes: length of the logits.
      preprocessing: what it expects of its input.
      masking: how the paper masks this classifier's input with a mask E (Sec. III-C):
        "pixel", |E * I| with |.| the standardisation, or "standardised", E * |I|.
      min_size: smallest height and width of an input, in pixels.
      feature_layers: names of the layers (see `named_layers`) whose outputs are the feature maps.
      target_layer: name of the layer that CAM methods read.
      architecture: the family's `Variant`, where the name does not tell it (timm's models).
    """

    masking: ClassVar[Masking] = "pixel"
    min_size: int = 1
    feature_layers: tuple[str, ...]
    target_layer: str

    def __init__(
        self,
        name: str,
        num_classes: int,
        preprocessing: Preprocessing,
        image_size: int | None,
        dtype: DTypeLike,
        architecture: Any = None,
    ):
        if image_size is not None and image_size != preprocessing.image_size:
            preprocessing = preprocessing.resized(image_size)
        self.name = name
        self.num_classes = num_classes
        self.preprocessing = preprocessing
        self.dtype = jnp.dtype(dtype)
        self.architecture = architecture

    def __call__(self, images: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Logits and feature maps of standardised images.

        Args:
          images: [B, H, W, 3], standardised as `preprocessing` says.

        Returns:
          logits [B, num_classes] in float32, and a tuple of feature maps [B, H_i, W_i, C_i] in
          `dtype`, earliest first.

        Raises:
          ValueError: images of another shape or of a size this classifier cannot take.
        """
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"{self.name} takes images [B, H, W, 3], got {list(images.shape)}")
        self.check_size(*images.shape[1:3])
        return in_groups(self._forward, images)

    def _forward(self, images):
        state, features = (images.astype(self.dtype),), []
        for name, layer in self.named_layers():
            state = layer(*state)
            if name in self.feature_layers:
                features.append(self.feature_map(state[0]))
        return state[0].astype(jnp.float32), tuple(features)

    def named_layers(self) -> list[tuple[str, Callable[..., State]]]:
        """The family's computation, layer by layer: from images in `dtype` to logits.

        Each layer takes the state of the one before, as arguments. The last one, "head", gives
        (logits,), and takes classes [K], too, to compute theirs alone (None: all).
        """
        raise NotImplementedError

    def feature_map(self, x: jax.Array) -> jax.Array:
        """A layer's output as [B, H_i, W_i, C_i]."""
        return x

    def split(
        self, layer: str | None = None
    ) -> tuple[Callable[[jax.Array], State], Callable[..., jax.Array]]:
        """The computation up to a layer and from there on.

        Args:
          layer: a name in `named_layers`; None is `target_layer`.

        Returns:
          ``before``: standardised images [B, H, W, 3] -> the layer's state, its output first; and
          ``after``: a state -> logits [B, num_classes] in float32, or, of classes [K] alone,
          [B, K].

        Raises:
          ValueError: there is no such layer.
        """
        layer = layer or self.target_layer
        names, steps = zip(*self.named_layers())
        if layer not in names[:-1]:
            raise ValueError(f"{self.name} has no layer {layer!r}; it has {', '.join(names[:-1])}")
        cut = names.index(layer) + 1

        def before(images):
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

    def feature_shapes(self, image_size: int | None = None) -> tuple[tuple[int, int, int], ...]:
        """(H_i, W_i, C_i) of each feature map for a square input, without computing anything."""
        size = image_size or self.preprocessing.image_size
        image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        _, features = nnx.eval_shape(lambda backbone, x: backbone(x), self, image)
        return tuple(feature.shape[1:] for feature in features)

    @property
    def class_weights(self) -> jax.Array | None:
        """[C, num_classes]: what each channel of the last feature map gives to each class.

        Only for a classifier that averages that map and reads its classes off it (as CAM needs,
        Zhou et al., CVPR 2016); None for others.
        """
        return None

    @property
    def config(self) -> Mapping[str, Any]:
        """What `load_backbone` needs besides the name to build this classifier again (JSON)."""
        config = {"num_classes": self.num_classes, "preprocessing": asdict(self.preprocessing)}
        if self.architecture is not None:
            own = asdict(self.architecture).items()
            described = {key: value for key, value in own if key not in config}
            config["architecture"] = {"family": type(self).__name__, **described}
        return config

    def fit_tensor(self, path: str, tensor: Any) -> Any:
        """A stored tensor, adapted to this classifier's input size where that is defined."""
        return tensor

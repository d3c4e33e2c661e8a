"""The interface of every explanation method."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ttame_jax.backbones import Backbone
from ttame_jax.backbones.base import State

FORWARD_BATCH = 32
"""Perturbed images that a device classifies at a time. Memory grows with it and nothing else."""

Recipe = Literal["paper", "reference"]
"""As the method's paper says, or as the public code that others compare with computes it."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Explanations:
    """Explanation maps of B images for K classes each."""

    maps: jax.Array
    """``[B, K, h, w]`` float32 in [0, 1], at the resolution the method works in."""
    classes: jax.Array
    """``[B, K]`` int32: the explained classes."""
    probabilities: jax.Array
    """``[B, K]`` float32: the classifier's confidence in each of them."""


REGISTERED: dict[str, type["Method"]] = {}
"""The methods by name, in the order in which they were defined."""


class Method(nnx.Module):
    """Explains the decisions of a backbone: ``(images, classes) -> maps``.

    A method is a pure function of its arguments and of the arrays it holds, so it can run inside
    a compiled step. ``nnx.split`` separates the two.

    A subclass registers itself by its class arguments: ``class RISE(Method, name="rise",
    title="RISE")``.

    Attributes:
      name: the name on the command line.
      title: the name in tables and figures.
      backbone: the classifier to explain.
      progress: called with a number of forward passes when a method with many of them has done
        them; None is never.
    """

    name: str
    title: str
    progress: Callable[[int], Any] | None = None

    def __init_subclass__(
        cls, *, name: str | None = None, title: str | None = None, **options: Any
    ):
        super().__init_subclass__(**options)
        if name is not None:
            cls.name, cls.title = name, title or name
            REGISTERED[name] = cls

    def __init__(self, backbone: Backbone):
        self.backbone = backbone

    def __call__(self, images: jax.Array, classes: jax.Array) -> jax.Array:
        """Images ``[B, H, W, 3]`` in [0, 1], classes ``[B, K]`` -> maps ``[B, K, h, w]``.

        Maps are float32 in [0, 1], at the resolution the method works in.
        """
        raise NotImplementedError

    def report(self, passes: int) -> None:
        """Reports forward passes of one image to `progress`, from inside a compiled loop."""
        if (progress := self.progress) is not None:
            jax.debug.callback(lambda: progress(passes))

    @property
    def forward_passes(self) -> int:
        """Forward passes of the backbone for one explanation (FP in the paper's tables).

        A pass that begins or ends at an inner layer counts as one.
        """
        raise NotImplementedError

    def explain(
        self, images: jax.Array, classes: jax.Array | None = None, likeliest: int = 1
    ) -> Explanations:
        """Classifies images and explains some of their classes.

        Args:
          images: ``[B, H, W, 3]`` in [0, 1].
          classes: ``[B, K]``, or ``[K]`` for all images; None is the most probable ones.
          likeliest: how many of these, most probable first.

        Raises:
          ValueError: see `checked_images` and `checked_classes`.
        """
        images = checked_images(images)
        if classes is not None:
            classes = checked_classes(classes, self.backbone)
        logits, features = self.backbone(self.backbone.preprocessing.standardise(images))
        if classes is None:
            classes = jax.lax.top_k(logits, likeliest)[1]
        maps = self.explain_features(images, features, classes)
        classes = jnp.broadcast_to(classes, maps.shape[:2])
        probabilities = jnp.take_along_axis(jax.nn.softmax(logits), classes, axis=1)
        return Explanations(maps, classes, probabilities)

    def explain_features(
        self, images: jax.Array, features: Sequence[jax.Array], classes: jax.Array
    ) -> jax.Array:
        """The maps of images whose feature maps are known, which most methods cannot use."""
        return self(images, jnp.broadcast_to(classes, (images.shape[0], classes.shape[-1])))


def compute_maps(
    method: Method, images: jax.typing.ArrayLike, classes: jax.typing.ArrayLike
) -> jax.Array:
    """A method's maps, compiled: ``[B, H, W, 3]`` in [0, 1], ``[B, K]`` -> ``[B, K, h, w]``.

    Raises:
      ValueError: see `checked_images`, `Backbone.check_size` and `checked_classes`.
    """
    images = checked_images(images)
    method.backbone.check_size(*images.shape[1:3])
    return compiled_maps(method, images, checked_classes(classes, method.backbone))


@nnx.jit
def compiled_maps(method: Method, images: jax.Array, classes: jax.Array) -> jax.Array:
    """`compute_maps` without its checks."""
    return method(images, classes)


def checked_images(images: jax.typing.ArrayLike) -> jax.Array:
    """Returns the images as an array. The values of a tracer are not checked.

    Raises:
      ValueError: they are not floats ``[B, H, W, 3]`` in [0, 1], or there are none.
    """
    images = jnp.asarray(images)
    if images.ndim == 4 and images.shape[0] == 0:
        raise ValueError("there are no images")
    if images.ndim != 4 or images.shape[-1] != 3 or not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images must be floats [B, H, W, 3] in [0, 1], not {images.dtype} {list(images.shape)}"
        )
    # Compared one by one, since XLA's minimum and maximum may pass over NaN.
    if not isinstance(images, jax.core.Tracer) and not ((images >= 0) & (images <= 1)).all():
        values = np.asarray(images, np.float32)
        raise ValueError(
            f"images must lie in [0, 1], not {values.min():.3g} to {values.max():.3g}: "
            "divide uint8 images by 255, and do not standardise them"
        )
    return images


def checked_classes(classes: jax.typing.ArrayLike, backbone: Backbone) -> jax.Array:
    """Returns the classes as an int32 array. The values of a tracer are not checked.

    Raises:
      ValueError: they are not integers, or not classes of the backbone.
    """
    # NumPy keeps the values of 64-bit integers, which JAX would cut off.
    values = classes if isinstance(classes, jax.Array) else np.asarray(classes)
    if values.dtype.kind not in "iu":
        raise ValueError(f"classes must be integers, not {values.dtype}")
    count, known = backbone.num_classes, values.size and not isinstance(values, jax.core.Tracer)
    if known and not (0 <= values.min() and values.max() < count):
        raise ValueError(f"classes must lie in 0 to {count - 1}, the classes of {backbone.name}")
    return jnp.asarray(values, jnp.int32)


def class_gradients(after: Callable[..., jax.Array], state: State, classes: jax.Array) -> jax.Array:
    """Gradients of logits with respect to the output of a layer.

    Args:
      after: the backbone after the layer, as ``Backbone.split`` returns it.
      state: the state after the layer, its output ``[B, ...]`` first.
      classes: ``[B, K]``, whose logits are differentiated.

    Returns:
      ``[B, K, ...]`` float32.
    """

    def of_image(output, rest, classes):
        def logits(output):
            return after(tuple(x[None] for x in (output, *rest)), classes)[0]

        return jax.jacrev(logits)(output)

    output, *rest = state
    return jax.vmap(of_image)(output, rest, classes).astype(jnp.float32)


def integrate(function: Callable[[jax.Array], jax.Array], points: jax.Array) -> jax.Array:
    """The mean of a function over points ``[n]``, one at a time, so memory does not grow with n."""
    total = jnp.zeros_like(jax.eval_shape(function, points[0]))
    total, _ = jax.lax.scan(lambda sum, point: (sum + function(point), None), total, points)
    return total / len(points)


def chunk_size(perturbations: int, images: int) -> int:
    """Perturbations of each image to classify at a time: the largest divisor that fits."""
    most = max(FORWARD_BATCH // images, 1)
    return next(n for n in range(min(most, perturbations), 0, -1) if perturbations % n == 0)


def checked_recipe(name: str, recipe: Recipe) -> Recipe:
    """Returns the recipe; raises ValueError if it is not one."""
    if recipe not in get_args(Recipe):
        known = " and ".join(map(repr, get_args(Recipe)))
        raise ValueError(f"recipes of {name} are {known}, not {recipe!r}")
    return recipe

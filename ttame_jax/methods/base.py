"""The one interface of every explanation method."""

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from ttame_jax.backbones import Backbone
from ttame_jax.backbones.base import State

FORWARD_BATCH = 32
"""Perturbed images that a device classifies at a time; memory grows with it and nothing else."""

Recipe = Literal["paper", "reference"]
"""As the method's paper says, or as the public code that comparisons use computes it."""


class Method(nnx.Module):
    """Explains a backbone's decisions: ``(images, classes) -> maps``.

    A pure function of its arguments and of the arrays it holds, so that it can run inside a
    compiled step; ``nnx.split`` tells the two apart.

    Attributes:
      name: as on the command line.
      backbone: the classifier it explains.
    """

    name: str

    def __init__(self, backbone: Backbone):
        self.backbone = backbone

    def __call__(self, images: jax.Array, classes: jax.Array) -> jax.Array:
        """Images ``[B, H, W, 3]`` in [0, 1], classes ``[B, K]`` -> maps ``[B, K, h, w]``.

        Maps are float32 in [0, 1], at the resolution the method works in.
        """
        raise NotImplementedError

    @property
    def forward_passes(self) -> int:
        """Of the backbone, for one explanation (FP in the paper's tables).

        A pass that begins or ends at an inner layer counts as one, too.
        """
        raise NotImplementedError


@nnx.jit
def explain(method: Method, images: jax.Array, classes: jax.Array) -> jax.Array:
    """A method's maps, compiled: ``[B, H, W, 3]`` in [0, 1], ``[B, K]`` -> ``[B, K, h, w]``."""
    return method(images, classes)


def class_gradients(after: Callable[..., jax.Array], state: State, classes: jax.Array) -> jax.Array:
    """Gradients of logits after a layer by the layer's output.

    Args:
      after: the backbone from the layer on, as ``Backbone.split`` gives it.
      state: the layer's, its output ``[B, ...]`` first.
      classes: ``[B, K]``, whose logits.

    Returns:
      ``[B, K, ...]`` float32.
    """

    def of_image(output, rest, classes):
        def logits(output):
            return after(tuple(x[None] for x in (output, *rest)), classes)[0]

        return jax.jacrev(logits)(output)

    output, *rest = state
    return jax.vmap(of_image)(output, rest, classes).astype(jnp.float32)


def chunk_size(perturbations: int, images: int) -> int:
    """How many perturbations of each image to classify at a time, so that none are left over."""
    most = max(FORWARD_BATCH // images, 1)
    return next(n for n in range(min(most, perturbations), 0, -1) if perturbations % n == 0)


def checked_recipe(name: str, recipe: Recipe) -> Recipe:
    """The recipe, if it is one; raises ValueError otherwise."""
    if recipe not in get_args(Recipe):
        raise ValueError(f"recipes of {name} are 'paper' and 'reference', not {recipe!r}")
    return recipe

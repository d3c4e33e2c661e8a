"""Explains images with a method, compiled and with checked arguments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ttame_jax.backbones import Backbone
from ttame_jax.methods import Explanation, Method
from ttame_jax.methods.base import checked_classes, checked_images

Classes = int | str | np.ndarray | jax.Array | None


@functools.partial(jax.jit, static_argnames=("graph", "likeliest"))
def _explain(graph, state, images, classes, likeliest):
    return nnx.merge(graph, state).explain(images, classes, likeliest)


class Explainer:
    """Explains images with a method.

    Args:
      method: T-TAME (`ttame_jax.methods.TTAME`) or any other method.

    Attributes:
      method: the method.
      backbone: the classifier it explains.
    """

    def __init__(self, method: Method):
        self.method = method
        self._graph, self._state = nnx.split(method)

    @property
    def backbone(self) -> Backbone:
        return self.method.backbone

    def __call__(self, images: jax.typing.ArrayLike, classes: Classes = None) -> Explanation:
        """Explains images.

        Args:
          images: ``[B, H, W, 3]`` in [0, 1] (not standardised), of the size in
            ``backbone.preprocessing``, or any other that the backbone takes.
          classes: the classes to explain. None is the predicted class, an int one class for all
            images, an array ``[B, K]`` the classes of each image, ``"all"`` every class in order,
            ``"top5"`` (or another number) the most probable ones.

        Raises:
          ValueError: the images are not floats ``[B, H, W, 3]`` in [0, 1], or a class is not one of
            the classifier's.
        """
        images = checked_images(images)
        if isinstance(classes, str):
            wanted, likeliest = self._named_classes(classes)
        else:
            wanted, likeliest = self._checked_classes(classes, len(images)), 1
        return _explain(self._graph, self._state, images, wanted, likeliest)

    def _named_classes(self, name: str) -> tuple[jax.Array | None, int]:
        count = self.backbone.num_classes
        if name == "all":
            return jnp.arange(count), 0
        number = name.removeprefix("top")
        if number != name and number.isdecimal() and 0 < int(number) <= count:
            return None, int(number)
        raise ValueError(f"classes {name!r}: use 'all', or 'top5' (up to 'top{count}')")

    def _checked_classes(self, classes, batch: int) -> jax.Array | None:
        if classes is None:
            return None
        wanted = np.asarray(classes)
        if wanted.ndim == 0:
            wanted = np.full((batch, 1), wanted)
        if wanted.ndim != 2 or len(wanted) != batch or wanted.dtype.kind not in "iu":
            raise ValueError(
                f"classes must be an int or integers [B, K] with B = {batch}, "
                f"not {wanted.dtype} {list(wanted.shape)}"
            )
        return checked_classes(wanted, self.backbone)

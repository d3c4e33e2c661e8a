"""Backbone and attention mechanism together: explanation maps in one forward pass."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ttame_jax.attention import AttentionMechanism
from ttame_jax.backbones import Backbone
from ttame_jax.masking import min_max_scale

Classes = int | str | np.ndarray | jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Explanation:
    """Explanation maps of B images for K classes each."""

    maps: jax.Array
    """``[B, K, H_e, W_e]`` float32 in [0, 1], at the largest feature map's resolution."""
    classes: jax.Array
    """``[B, K]`` int32: what each map explains."""
    probabilities: jax.Array
    """``[B, K]`` float32: the classifier's confidence in each of them."""


def explain(
    backbone: Backbone,
    attention: AttentionMechanism,
    images: jax.Array,
    classes: jax.Array | None = None,
    likeliest: int = 1,
) -> Explanation:
    """Explains images ``[B, H, W, 3]`` in [0, 1]: the pure function behind ``Explainer``.

    Maps are min-max scaled before any sigmoid (section III-D). Classes are ``[B, K]``, or ``[K]``
    for all images alike; None is each image's `likeliest` ones, most probable first.
    """
    logits, features = backbone(backbone.preprocessing.standardise(images))
    if classes is None:
        classes = jax.lax.top_k(logits, likeliest)[1]
    maps = min_max_scale(attention(features, classes))
    classes = jnp.broadcast_to(classes, maps.shape[:2])
    probabilities = jnp.take_along_axis(jax.nn.softmax(logits), classes, axis=1)
    return Explanation(maps, classes, probabilities)


@functools.partial(jax.jit, static_argnames=("graphs", "likeliest"))
def _explain(graphs, states, images, classes, likeliest):
    backbone, attention = map(nnx.merge, graphs, states)
    return explain(backbone, attention, images, classes, likeliest)


class Explainer:
    """A classifier with its trained attention mechanism.

    Args:
      backbone: the frozen classifier.
      attention: the mechanism trained on its feature maps.
    """

    def __init__(self, backbone: Backbone, attention: AttentionMechanism):
        self.backbone = backbone
        self.attention = attention
        self._graphs, self._states = zip(*map(nnx.split, (backbone, attention)))

    def __call__(self, images: jax.typing.ArrayLike, classes: Classes = None) -> Explanation:
        """Explains images in one forward pass of the classifier.

        Args:
          images: ``[B, H, W, 3]`` in [0, 1] (not standardised), of the size that
            ``backbone.preprocessing`` names, or any other that the backbone takes.
          classes: whose maps: None is the predicted class, an int one class for all images, an
            array ``[B, K]`` each image's own, ``"all"`` every class in order, ``"top5"`` (or
            another number) the most probable ones.

        Raises:
          ValueError: if images are not ``[B, H, W, 3]`` floats in [0, 1], or a class is not one of the
            classifier's.
        """
        images = _checked_images(images)
        if isinstance(classes, str):
            wanted, likeliest = self._named_classes(classes)
        else:
            wanted, likeliest = self._checked_classes(classes, len(images)), 1
        return _explain(self._graphs, self._states, images, wanted, likeliest)

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
        count = self.backbone.num_classes
        if wanted.size and not (0 <= wanted.min() and wanted.max() < count):
            raise ValueError(
                f"classes must lie in 0 to {count - 1}, the classes of {self.backbone.name}"
            )
        return jnp.asarray(wanted, jnp.int32)


def _checked_images(images: jax.typing.ArrayLike) -> jax.Array:
    images = jnp.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images must be floats [B, H, W, 3] in [0, 1], not {images.dtype} {list(images.shape)}"
        )
    low, high = images.min(), images.max()
    if low < 0 or high > 1:
        raise ValueError(
            f"images must lie in [0, 1], not {low:.3g} to {high:.3g}: "
            "divide uint8 images by 255, and do not standardise them"
        )
    return images


def load_explainer(run_dir: str | Path, weights: str | None = None) -> Explainer:
    """Loads the explainer that a training run made, at its best checkpoint.

    Args:
      run_dir: the run's ``--output`` folder.
      weights: of the backbone, where they are no longer where the run found them.

    Raises:
      FileNotFoundError: if the folder is no run, or has no checkpoint yet.
    """
    from ttame_jax.training.checkpoints import load_attention
    from ttame_jax.training.config import load_config
    from ttame_jax.training.models import build_attention, build_backbone

    config = load_config(run_dir)
    if weights is not None:
        config = dataclasses.replace(config, weights=weights)
    backbone = build_backbone(config)
    attention = build_attention(config, backbone)
    load_attention(config.output, attention)
    return Explainer(backbone, attention)

"""Which positions of an image its class depends on, by one pass and its gradient."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ttame_jax.backbones import Backbone
from ttame_jax.backbones.vit import ViT
from ttame_jax.compilers import in_groups
from ttame_jax.masking import upsample
from ttame_jax.methods import LibraGrad


def compute_relevance(
    backbone: Backbone, images: jax.Array, classes: jax.Array, layers: Sequence[str]
) -> jax.Array:
    """The relevance of positions for the logit of one class per image, of either sign.

    For ViTs it is LibraGrad's, because plain gradients of a ViT's tokens say little. For other
    classifiers each feature map is multiplied by its gradient and summed over its channels. These
    maps have mean 0 and variance 1 per image, and are averaged.

    Args:
      backbone: the classifier.
      images: ``[B, H, W, 3]`` in [0, 1].
      classes: ``[B]``.
      layers: names of the layers whose feature maps are used, of `Backbone.feature_layers`.

    Returns:
      ``[B, h, w]`` float32, with the size of the largest of these feature maps.
    """

    def of_group(images, classes):
        if isinstance(backbone, ViT):
            return LibraGrad(backbone).relevance(images, classes)[:, 0]
        return _gradient_times_activation(backbone, images, classes, layers)

    return in_groups(of_group, images, classes[:, None], tpu_pixels=backbone.tpu_pixels)


def _gradient_times_activation(backbone, images, classes, layers):
    inputs, maps = backbone.preprocessing.standardise(images), []
    for layer in layers:  # XLA computes once what these passes have in common
        before, after = backbone.split(layer)
        output, *rest = before(inputs)

        def class_logits(output, after=after, rest=rest):
            return jnp.take_along_axis(after((output, *rest)), classes, axis=1).sum()

        products = output * jax.grad(class_logits)(output)
        maps.append(backbone.feature_map(products).sum(-1, dtype=jnp.float32))
    size = max(m.shape[1] for m in maps), max(m.shape[2] for m in maps)
    return sum(upsample(_standardised(m), size) for m in maps) / len(maps)


def _standardised(maps: jax.Array) -> jax.Array:
    mean, std = (f(maps, axis=(1, 2), keepdims=True) for f in (jnp.mean, jnp.std))
    return (maps - mean) / jnp.where(std > 0, std, 1)

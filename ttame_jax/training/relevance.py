"""Which positions of an image its class depends on, from the gradients of the classifier."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ttame_jax.backbones import Backbone
from ttame_jax.backbones.vit import ViT
from ttame_jax.compilers import in_groups
from ttame_jax.masking import standardise_maps, upsample
from ttame_jax.methods import LibraGrad


def classify_with_relevance(
    backbone: Backbone, images: jax.Array, layers: Sequence[str]
) -> tuple[jax.Array, tuple[jax.Array, ...], jax.Array]:
    """Logits and feature maps, and the relevance of positions for the logit of the model truth.

    The relevance has both signs. For a `ViT` it is LibraGrad's, because plain gradients of its tokens
    say little. For other classifiers each feature map is multiplied by its gradient and summed over
    its channels. These maps are standardised per image, and averaged. XLA merges their forward
    passes with the one that gives the logits.

    Args:
      backbone: the classifier.
      images: ``[B, H, W, 3]`` in [0, 1].
      layers: names of the layers whose feature maps are used, of `Backbone.feature_layers`. LibraGrad
        uses all blocks.

    Returns:
      What the backbone returns, and ``[B, h, w]`` float32 with the size of the largest of these
      feature maps.
    """

    def of_group(images):
        inputs = backbone.preprocessing.standardise(images)
        logits, features = backbone(inputs)
        classes = jnp.argmax(logits, axis=-1, keepdims=True)
        if isinstance(backbone, ViT):
            return logits, features, LibraGrad(backbone).relevance(images, classes)[:, 0]
        return logits, features, _gradient_times_activation(backbone, inputs, classes, layers)

    return in_groups(of_group, images, tpu_pixels=backbone.tpu_pixels)


def _gradient_times_activation(backbone, inputs, classes, layers):
    maps = []
    for layer in layers:  # XLA computes once what these passes have in common
        before, after = backbone.split(layer)
        output, *rest = before(inputs)

        def class_logits(output, after=after, rest=rest):
            return jnp.take_along_axis(after((output, *rest)), classes, axis=1).sum()

        products = output * jax.grad(class_logits)(output)
        maps.append(backbone.feature_map(products).sum(-1, dtype=jnp.float32))
    size = max(m.shape[1] for m in maps), max(m.shape[2] for m in maps)
    return sum(upsample(standardise_maps(m), size) for m in maps) / len(maps)

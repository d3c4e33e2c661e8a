"""AttnLRP (Achtibat et al., "AttnLRP: Attention-Aware Layer-Wise Relevance Propagation for
Transformers", ICML 2024, arXiv:2402.05602), as input times a gradient with other rules.
"""

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from ttame_jax.backbones import Backbone
from ttame_jax.backbones.vit import ViT
from ttame_jax.masking import min_max_scale
from ttame_jax.methods.base import Method, Recipe, checked_recipe
from ttame_jax.methods.vit_blocks import map_images, require_vit
from ttame_jax.methods.vit_rules import attention_map, classify, embed, fixed_attention, run_block


class AttnLRP(Method, name="attnlrp", title="AttnLRP"):
    """The relevance of pixels for a class's logit, summed over each patch.

    Products of matrices give half of their relevance to each factor, softmax that of its Taylor
    expansion, and activations and normalisations pass it on (section 3). The map is the positive
    part, ``[B, K, sqrt N, sqrt N]``.

    Args:
      backbone: the classifier to explain.
      recipe: ``"paper"``: relevance flows through the softmax. ``"reference"``: attention maps are
        constants, as in the authors' package for ViTs.
      gamma: how much linear layers favour what agrees with the sign of their output, in the MLPs and
        the head; 0 is the epsilon rule.
      patch_gamma: the same for the patch embedding.

    Raises:
      ValueError: the backbone is not a ViT, or an unknown recipe, or a negative gamma.
    """

    forward_passes = 1
    backbone: ViT

    def __init__(
        self,
        backbone: Backbone,
        recipe: Recipe = "paper",
        gamma: float = 0.1,
        patch_gamma: float = 0.25,
    ):
        super().__init__(require_vit(backbone, self.name))
        if min(gamma, patch_gamma) < 0:
            raise ValueError(
                f"gamma and patch_gamma of {self.name} are 0 or more, not {gamma} and {patch_gamma}"
            )
        self.recipe = checked_recipe(self.name, recipe)
        self.gamma, self.patch_gamma = gamma, patch_gamma

    def __call__(self, images: jax.Array, classes: jax.Array) -> jax.Array:
        relevance = self.relevance(images, classes)
        patches = jax.vmap(self.backbone.patches, in_axes=1, out_axes=1)(relevance)
        side = self.backbone.side
        maps = patches.sum((-3, -2, -1)).reshape(*classes.shape, side, side)
        return min_max_scale(jax.nn.relu(maps))

    def relevance(self, images: jax.Array, classes: jax.Array) -> jax.Array:
        """The relevance of each colour of each pixel.

        Args:
          images: ``[B, H, W, 3]`` in [0, 1].
          classes: ``[B, K]``.

        Returns:
          ``[B, K, H, W, 3]`` float32.
        """
        standardised = self.backbone.preprocessing.standardise(images)
        targets = jax.nn.one_hot(classes, self.backbone.num_classes)
        return map_images(self._of_image, standardised, targets).astype(jnp.float32)

    def _of_image(self, image: jax.Array, targets: jax.Array) -> jax.Array:
        """A standardised image [H, W, 3] and targets [K, num_classes] -> [K, H, W, 3]."""
        attention = fixed_attention if self.recipe == "reference" else halved_attention

        def logits(image):
            x = embed(self.backbone, image, self.patch_gamma)
            for block in self.backbone.blocks:
                x = run_block(block, x, attention, self.gamma)
            return classify(self.backbone, x, self.gamma)

        outputs, backward = jax.vjp(logits, image)
        (gradients,) = jax.vmap(backward)(targets.astype(outputs.dtype))
        return image * gradients


def halved_attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Self-attention in which each factor of a matrix product gets half of its gradient."""
    weights = attention_map(halved(query), halved(key))
    return halved(weights @ value)


def halved(x: jax.Array) -> jax.Array:
    """x with half of its gradient."""
    return (x + stop_gradient(x)) / 2

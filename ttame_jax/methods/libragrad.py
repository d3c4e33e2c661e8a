"""LibraGrad (Mehri, Soleymani Baghshah and Pilehvar, "LibraGrad: Balancing Gradient Flow for
Universally Better Vision Transformer Attributions", CVPR 2025, arXiv:2411.16760), applied to
FullGrad+: the paper's best combination.
"""

import jax
import jax.numpy as jnp

from ttame_jax.backbones import Backbone
from ttame_jax.backbones.vit import ViT
from ttame_jax.masking import min_max_scale
from ttame_jax.methods.base import Method
from ttame_jax.methods.vit_blocks import map_images, patch_maps, require_vit
from ttame_jax.methods.vit_rules import classify, fixed_attention, run_block


class LibraGrad(Method, name="libragrad", title="LibraGrad"):
    """Libra FullGrad+: input times gradient, summed over the inputs and the biases of all blocks.

    In the gradient, attention maps, the gates of the MLPs' activations and the standard deviations
    of LayerNorms are constants (section 3.5). The map is the positive part at the patches,
    ``[B, K, sqrt N, sqrt N]``.

    Raises:
      ValueError: the backbone is not a ViT.
    """

    forward_passes = 1
    backbone: ViT

    def __init__(self, backbone: Backbone):
        super().__init__(require_vit(backbone, self.name))

    def __call__(self, images: jax.Array, classes: jax.Array) -> jax.Array:
        return min_max_scale(jax.nn.relu(self.relevance(images, classes)))

    def relevance(self, images: jax.Array, classes: jax.Array) -> jax.Array:
        """The maps ``[B, K, sqrt N, sqrt N]`` with both signs, before they are scaled."""
        inputs, biases = self.attributions(images, classes)
        return patch_maps(self.backbone, inputs.sum(axis=2) + biases)

    def attributions(self, images: jax.Array, classes: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Input times gradient of each block's input, and of all biases in the blocks.

        Args:
          images: ``[B, H, W, 3]`` in [0, 1].
          classes: ``[B, K]``.

        Returns:
          ``[B, K, blocks, N]`` and ``[B, K, N]`` float32, of N tokens. The sum of the first
          block's and of the biases is the logit, up to the biases of the last LayerNorm and of the
          head, which belong to no token.
        """
        backbone = self.backbone
        standardised = backbone.preprocessing.standardise(images).astype(backbone.dtype)
        targets = jax.nn.one_hot(classes, backbone.num_classes)
        products = map_images(self._of_image, backbone.embed(standardised), targets)
        products = products.astype(jnp.float32)
        return products[:, :, :-1], products[:, :, -1]

    def _of_image(self, tokens: jax.Array, targets: jax.Array) -> jax.Array:
        """One image's tokens [N, D] and targets [K, num_classes] -> [K, blocks + 1, N]."""
        blocks = self.backbone.blocks
        tokens = tokens.astype(jnp.promote_types(tokens.dtype, jnp.float32))

        def logits(shifts, share):
            x, inputs = tokens, []
            for block, shift in zip(blocks, shifts):
                x = x + shift
                inputs.append(x)
                x = run_block(block, x, fixed_attention, share=share)
            return classify(self.backbone, x), jnp.stack(inputs)

        shifts = jnp.zeros((len(blocks), *tokens.shape), tokens.dtype)
        share = jnp.ones((len(tokens), 1), tokens.dtype)
        outputs, backward, inputs = jax.vjp(logits, shifts, share, has_aux=True)
        gradients, of_biases = jax.vmap(backward)(targets.astype(outputs.dtype))
        return jnp.concatenate([(inputs * gradients).sum(-1), of_biases.mT], axis=1)

"""Grad-CAM (Selvaraju et al., ICCV 2017) and Grad-CAM++ (Chattopadhyay et al., WACV 2018)."""

import jax
import jax.numpy as jnp

from ttame_jax.backbones import Backbone
from ttame_jax.methods.base import Recipe, checked_recipe
from ttame_jax.methods.cam import CAM


class GradCAM(CAM):
    """Channels weigh as much as a class's logit rises with them, on average over places."""

    name = "gradcam"
    forward_passes = 1

    def __call__(self, images: jax.Array, classes: jax.Array) -> jax.Array:
        before, after = self.split()
        output, *rest = before(self.backbone.preprocessing.standardise(images))
        logits, pullback = jax.vjp(lambda output: after((output, *rest)), output)
        one_hot = jax.nn.one_hot(classes.T, logits.shape[-1], dtype=logits.dtype)  # [K, B, Cls]
        (gradients,) = jax.vmap(pullback)(one_hot)
        place = jax.vmap(self.backbone.feature_map)
        gradients = place(gradients).astype(jnp.float32)  # [K, B, h, w, C]
        activations = self.backbone.feature_map(output).astype(jnp.float32)
        return self.combine(output, self.weights(activations, gradients).swapaxes(0, 1))

    def weights(self, activations: jax.Array, gradients: jax.Array) -> jax.Array:
        """Activations ``[B, h, w, C]``, gradients ``[K, B, h, w, C]`` -> ``[K, B, C]``."""
        return gradients.mean((2, 3))


class GradCAMPlusPlus(GradCAM):
    """Grad-CAM whose places count by how much of the class they alone would explain (Eq. 19).

    Args:
      backbone: the classifier to explain.
      layer: as of `CAM`.
      recipe: ``"paper"``, or ``"reference"``: pytorch-grad-cam adds 1e-6 to the denominator of
        Eq. 19. Squared gradients are often smaller than that, and then it leaves the cube of the
        gradient as the weight of a place.
    """

    name = "gradcam++"

    def __init__(
        self,
        backbone: Backbone,
        layer: str | None = None,
        recipe: Recipe = "paper",
    ):
        super().__init__(backbone, layer)
        self.epsilon = {"paper": 0.0, "reference": 1e-6}[checked_recipe(self.name, recipe)]

    def weights(self, activations: jax.Array, gradients: jax.Array) -> jax.Array:
        total = activations.sum((1, 2), keepdims=True)
        squared = gradients**2
        denominator = 2 * squared + total * squared * gradients + self.epsilon
        alpha = squared / jnp.where(denominator == 0, 1, denominator)
        return (alpha * jax.nn.relu(gradients)).sum((2, 3))

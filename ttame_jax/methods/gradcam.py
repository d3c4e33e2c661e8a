"""Grad-CAM (Selvaraju et al., ICCV 2017) and Grad-CAM++ (Chattopadhyay et al., WACV 2018)."""

import jax
import jax.numpy as jnp

from ttame_jax.backbones import Backbone
from ttame_jax.methods.base import Recipe, checked_recipe
from ttame_jax.methods.cam import CAM


class GradCAM(CAM, name="gradcam", title="Grad-CAM"):
    """Weighs channels by the gradient of a class's logit, averaged over positions."""

    forward_passes = 1

    def __call__(self, images: jax.Array, classes: jax.Array) -> jax.Array:
        activations, gradients = self.activations_and_gradients(images, classes)
        return self.combine(activations, self.weights(activations, gradients))

    def weights(self, activations: jax.Array, gradients: jax.Array) -> jax.Array:
        """Activations ``[B, h, w, C]``, gradients ``[B, K, h, w, C]`` -> ``[B, K, C]``."""
        return gradients.mean((2, 3))


class GradCAMPlusPlus(GradCAM, name="gradcam++", title="Grad-CAM++"):
    """Grad-CAM with weighted positions (Eq. 19).

    Args:
      backbone: the classifier to explain.
      layer: as for `CAM`.
      recipe: ``"paper"``, or ``"reference"``: pytorch-grad-cam adds 1e-6 to the denominator of
        Eq. 19. Squared gradients are often smaller than that, so a position's weight becomes
        the cube of its gradient.
    """

    def __init__(
        self,
        backbone: Backbone,
        layer: str | None = None,
        recipe: Recipe = "paper",
    ):
        super().__init__(backbone, layer)
        self.epsilon = {"paper": 0.0, "reference": 1e-6}[checked_recipe(self.name, recipe)]

    def weights(self, activations: jax.Array, gradients: jax.Array) -> jax.Array:
        total = activations.sum((1, 2), keepdims=True)[:, None]
        squared = gradients**2
        denominator = 2 * squared + total * squared * gradients + self.epsilon
        alpha = squared / jnp.where(denominator == 0, 1, denominator)
        return (alpha * jax.nn.relu(gradients)).sum((2, 3))

"""Integrated Gradients (Sundararajan, Taly and Yan, "Axiomatic Attribution for Deep Networks", ICML
2017).
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from ttame_jax.backbones import Backbone
from ttame_jax.masking import min_max_scale
from ttame_jax.methods.base import Method, class_gradients, integrate

Baseline = Literal["black", "mean"]
"""The image without information: black as in the paper, or the mean colour of the preprocessing."""


class IntegratedGradients(Method, name="integrated_gradients", title="Integrated Gradients"):
    """The gradient of a class's logit, integrated from a baseline to the image (Eq. 1).

    Maps have the size of the image: the positive part of the attributions' sum over colours. A few
    pixels are far above all others, so the part of a value above the 99th percentile counts for a
    hundredth of the percentile at most. SmoothGrad (Smilkov et al., 2017) cuts it off, which
    loses the order of these pixels.

    Args:
      backbone: the classifier to explain.
      steps: of the integral, which is a midpoint rule.
      baseline: where it begins.

    Raises:
      ValueError: fewer than 1 step, or an unknown baseline.
    """

    def __init__(self, backbone: Backbone, steps: int = 50, baseline: Baseline = "black"):
        super().__init__(backbone)
        if steps < 1:
            raise ValueError(f"{self.name} integrates over 1 step or more, not {steps}")
        if baseline not in get_args(Baseline):
            known = " and ".join(map(repr, get_args(Baseline)))
            raise ValueError(f"baselines of {self.name} are {known}, not {baseline!r}")
        self.steps, self.baseline = steps, baseline

    @property
    def forward_passes(self) -> int:
        return self.steps

    def __call__(self, images: jax.Array, classes: jax.Array) -> jax.Array:
        maps = jax.nn.relu(self.attributions(images, classes).sum(-1))
        return min_max_scale(compressed(maps))

    def attributions(self, images: jax.Array, classes: jax.Array) -> jax.Array:
        """The attribution of each colour of each pixel.

        Args:
          images: ``[B, H, W, 3]`` in [0, 1].
          classes: ``[B, K]``.

        Returns:
          ``[B, K, H, W, 3]`` float32. Their sum is the difference of the logits of the image and of
          the baseline, up to the error of the integral.
        """
        standardise = self.backbone.preprocessing.standardise
        end = standardise(images)
        start = standardise(jnp.zeros_like(images)) if self.baseline == "black" else 0 * end

        def logits(state, classes):
            (images,) = state
            return self.backbone(images)[0][:, classes]

        def gradients(point):
            return class_gradients(logits, (start + point * (end - start),), classes)

        points = (jnp.arange(self.steps) + 0.5) / self.steps
        return integrate(gradients, points) * (end - start)[:, None]


def compressed(maps: jax.Array) -> jax.Array:
    """Maps ``[B, K, H, W]`` of at least 0, whose values above the 99th percentile are compressed.

    They keep their order, and lie at most a hundredth of the percentile above it. A map whose
    percentile is 0 is returned as it is.
    """
    limit = jnp.quantile(maps, 0.99, (2, 3), keepdims=True)
    excess = jax.nn.relu(maps - limit)
    largest = excess.max((2, 3), keepdims=True)
    excess = 0.01 * limit * excess / jnp.where(largest > 0, largest, 1)
    return jnp.where(limit > 0, jnp.minimum(maps, limit) + excess, maps)

"""Iterated Integrated Attributions (Barkan, Elisha, Asher, Eshel and Koenigstein, "Visual
Explanations via Iterated Integrated Attributions", ICCV 2023, arXiv:2310.18585): the double
integral IIA2, over the image and over the last layer's representation of it.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ttame_jax.backbones import Backbone
from ttame_jax.backbones.vit import ViT
from ttame_jax.masking import min_max_scale
from ttame_jax.methods.base import Method, Recipe, checked_recipe, class_gradients, integrate
from ttame_jax.methods.vit_blocks import (
    class_token_row,
    map_images,
    patch_maps,
    require_class_token,
    run_block,
)


class IIA(Method, name="iia", title="IIA"):
    """Attributions integrated from the mean colour to the image, and for each image on that path
    from a reference to its representation in the last layer.

    CNN: the activations of the target layer times their gradient, ``[B, K, h, w]``. ViT: the
    positive part of attention map times gradient in each block, combined by attention rollout
    with rows that sum to 1 and read at the class token, ``[B, K, sqrt N, sqrt N]``.

    Args:
      backbone: the classifier to explain.
      layer: of a CNN, the name of the layer to integrate over; None is its ``target_layer``.
      recipe: ``"paper"``: the inner integral begins at each channel's minimum. ``"reference"``:
        the authors' code has no inner integral for CNNs (it integrates from the activations to
        the activations), and half the steps for ViTs.
      steps: of each integral, which is the mean over ``steps + 1`` points from 0 to 1; None is
        the recipe's: 10, or the reference's 5 for ViTs.

    Raises:
      ValueError: a ViT without class token, an unknown layer or recipe, or no steps.
    """

    backbone: Any  # methods for ViTs read more than `Backbone` has

    def __init__(
        self,
        backbone: Backbone,
        layer: str | None = None,
        recipe: Recipe = "paper",
        steps: int | None = None,
    ):
        if steps is not None and steps < 1:
            raise ValueError(f"{self.name} integrates over 1 step or more, not {steps}")
        super().__init__(backbone)
        self.is_vit = isinstance(backbone, ViT)
        if self.is_vit:
            require_class_token(backbone, self.name)
            if layer is not None:
                raise ValueError(f"{self.name} reads a ViT's attention maps, not layer {layer!r}")
        else:
            backbone.split(layer)  # raises if there is no such layer
        self.layer, self.recipe = layer, checked_recipe(self.name, recipe)
        self.steps = steps or (5 if self.is_vit and recipe == "reference" else 10)

    @property
    def points(self) -> jax.Array:
        """Points of the integral over the image."""
        return jnp.linspace(0, 1, self.steps + 1)

    @property
    def inner_points(self) -> jax.Array:
        """Points of the integral over the last layer."""
        inner = self.is_vit or self.recipe == "paper"
        return self.points if inner else jnp.ones(1)

    @property
    def forward_passes(self) -> int:
        return len(self.points) * len(self.inner_points)

    def __call__(self, images: jax.Array, classes: jax.Array) -> jax.Array:
        standardised = self.backbone.preprocessing.standardise(images)
        if not self.is_vit:
            maps = integrate(lambda a: self._activations(a * standardised, classes), self.points)
            return min_max_scale(maps)
        targets = jax.nn.one_hot(classes, self.backbone.num_classes)  # [B, K, num_classes]
        maps = integrate(lambda a: self._attention(a * standardised, targets), self.points)
        maps += jnp.eye(maps.shape[-1])
        maps /= maps.sum(axis=-1, keepdims=True)
        rows = jax.vmap(jax.vmap(lambda blocks: class_token_row(blocks[::-1])))(maps)
        return min_max_scale(patch_maps(self.backbone, rows))

    def _activations(self, images: jax.Array, classes: jax.Array) -> jax.Array:
        """The inner integral for standardised images, with a CNN: ``[B, K, h, w]``."""
        before, after = self.backbone.split(self.layer)
        output, *rest = before(images)
        paper, place = self.recipe == "paper", self.backbone.feature_map
        positions = tuple(range(1, output.ndim - 1))
        low = output.min(axis=positions, keepdims=True) if paper else jnp.zeros_like(output)

        def attributions(b):
            value = low + b.astype(low.dtype) * (output - low)
            gradients = class_gradients(after, (value, *rest), classes)
            gradients = jax.vmap(place, in_axes=1, out_axes=1)(gradients)  # [B, K, h, w, C]
            weights = place(jax.nn.relu(output - low) * (value if paper else 1))
            return jnp.einsum("bhwc,bkhwc->bkhw", weights, gradients).astype(jnp.float32)

        return integrate(attributions, self.inner_points)

    def _attention(self, images: jax.Array, targets: jax.Array) -> jax.Array:
        """The inner integral for standardised images, with a ViT: ``[B, K, blocks, N, N]``."""
        tokens = self.backbone.embed(images.astype(self.backbone.dtype))
        return map_images(self._attention_of_image, tokens, targets)

    def _attention_of_image(self, tokens: jax.Array, targets: jax.Array) -> jax.Array:
        """Of one image's tokens [N, D]: ``[K, blocks, N, N]``, means over heads."""
        backbone = self.backbone
        *blocks, last = backbone.blocks
        shape = (last.attn.num_heads, len(tokens), len(tokens))

        def lower(shifts):
            x, maps = tokens, []
            for block, shift in zip(blocks, shifts):
                x, trace = run_block(block, x, lambda weights, shift=shift: weights + shift)
                maps.append(trace.weights)
            return x, maps

        shifts = [jnp.zeros(shape) for _ in blocks]
        _, classify = backbone.split(f"blocks.{len(blocks)}")
        x, lower_pullback, maps = jax.vjp(lower, shifts, has_aux=True)
        last_map = run_block(last, x)[1].weights

        def attributions(b):
            def upper(x, weights):
                x, _ = run_block(last, x, lambda _: weights)
                return classify((x[None],))[0]

            _, upper_pullback = jax.vjp(upper, x, b * last_map)

            def of_class(target):
                gradient, last_gradient = upper_pullback(target)
                (gradients,) = lower_pullback(gradient)
                products = [m * g for m, g in zip(maps, gradients)]
                products.append(b * last_map * last_gradient)
                return jnp.stack([jax.nn.relu(product).mean(axis=0) for product in products])

            return jax.vmap(of_class)(targets)

        return integrate(attributions, self.inner_points)

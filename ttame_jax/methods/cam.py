"""The base of the CAM methods: a target layer, and weights for its channels."""

import jax
import jax.numpy as jnp
from flax import nnx

from ttame_jax.backbones import Backbone
from ttame_jax.masking import min_max_scale
from ttame_jax.methods.base import Method, class_gradients


class CAM(Method):
    """The positive part of a weighted sum of the target layer's channels.

    Args:
      backbone: the classifier to explain.
      layer: name of the layer to read; None is the backbone's ``target_layer``, such as the last
        convolution with its ReLU, or the first LayerNorm of a ViT's last block.

    Raises:
      ValueError: the backbone has no such layer.
    """

    def __init__(self, backbone: Backbone, layer: str | None = None):
        super().__init__(backbone)
        backbone.split(layer)  # raises if there is no such layer
        self.layer = layer or backbone.target_layer

    @property
    def channels(self) -> int:
        """Number of channels of the target layer."""
        size = self.backbone.preprocessing.image_size
        image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        output, *_ = nnx.eval_shape(lambda cam, x: cam.split()[0](x), self, image)
        return output.shape[-1]

    def split(self):
        """The backbone before and after the target layer, as ``Backbone.split`` returns it."""
        return self.backbone.split(self.layer)

    def activations_and_gradients(
        self, images: jax.Array, classes: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Activations ``[B, h, w, C]`` and the gradients of logits ``[B, K, h, w, C]``, float32."""
        before, after = self.split()
        state = before(self.backbone.preprocessing.standardise(images))
        place = self.backbone.feature_map
        gradients = jax.vmap(place, in_axes=1, out_axes=1)(class_gradients(after, state, classes))
        return self.activations(state[0]), gradients

    def activations(self, output: jax.Array) -> jax.Array:
        """The layer's output as ``[B, h, w, C]`` float32."""
        return self.backbone.feature_map(output).astype(jnp.float32)

    def combine(self, activations: jax.Array, weights: jax.Array) -> jax.Array:
        """Activations ``[B, h, w, C]`` and channel weights ``[B, K, C]`` -> maps ``[B, K, h, w]``."""
        maps = jnp.einsum("bhwc,bkc->bkhw", activations, weights)
        return min_max_scale(jax.nn.relu(maps))

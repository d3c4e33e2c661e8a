"""Ablation-CAM (Desai and Ramaswamy, WACV 2020): the drop of a logit without a channel."""

import jax
import jax.numpy as jnp

from ttame_jax.methods.base import chunk_size
from ttame_jax.methods.cam import CAM


class AblationCAM(CAM, name="ablationcam", title="Ablation-CAM"):
    """Weighs channels by the relative drop of a class's logit when the channel is set to zero.

    For each channel only the layers after the target layer run again, and the head computes only
    the requested classes. pytorch-grad-cam differs where activations can be negative, as in a
    ViT: it sets the channel to a very low value instead.
    """

    @property
    def forward_passes(self) -> int:
        return 1 + self.channels

    def __call__(self, images: jax.Array, classes: jax.Array) -> jax.Array:
        before, after = self.split()
        output, *rest = before(self.backbone.preprocessing.standardise(images))
        channels = output.shape[-1]
        size = chunk_size(channels, images.shape[0])

        def without(chunk):  # channels [c] -> logits [c, B, K]
            keep = 1 - jax.nn.one_hot(chunk, channels, dtype=output.dtype)

            def of_image(output, rest, classes):
                ablated = jax.vmap(lambda kept: output * kept)(keep)
                beside = [jnp.broadcast_to(x, (size, *x.shape)) for x in rest]
                return after((ablated, *beside), classes)

            self.report(size)
            return jax.vmap(of_image, out_axes=1)(output, rest, classes)

        logits = jax.lax.map(without, jnp.arange(channels).reshape(-1, size))
        logits = logits.reshape(channels, *classes.shape)
        whole = jnp.take_along_axis(after((output, *rest)), classes, axis=1)
        weights = (whole - logits) / jnp.where(whole == 0, 1, whole)
        return self.combine(self.activations(output), jnp.moveaxis(weights, 0, -1))

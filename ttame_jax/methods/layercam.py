"""Layer-CAM (Jiang, Zhang, Hou, Cheng and Wei, "LayerCAM: Exploring Hierarchical Class Activation
Maps for Localization", IEEE Transactions on Image Processing 2021).
"""

import jax
import jax.numpy as jnp

from ttame_jax.masking import min_max_scale
from ttame_jax.methods.cam import CAM


class LayerCAM(CAM, name="layercam", title="Layer-CAM"):
    """Weighs each position of each channel by the positive part of its own gradient (Eq. 4, 5).

    Its maps of earlier layers (``layer``) are also useful, because weights are not averaged over
    positions.
    """

    forward_passes = 1

    def __call__(self, images: jax.Array, classes: jax.Array) -> jax.Array:
        activations, gradients = self.activations_and_gradients(images, classes)
        maps = jnp.einsum("bhwc,bkhwc->bkhw", activations, jax.nn.relu(gradients))
        return min_max_scale(jax.nn.relu(maps))

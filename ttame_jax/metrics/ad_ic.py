"""Average Drop and Increase in Confidence (T-TAME, section IV-B; spec of top-v % selection).

Both compare the confidence ``psi = f(I)[y]`` in the predicted class y with ``psi'``, the
confidence after masking the image with the top v % of its explanation map.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ttame_jax.backbones import Preprocessing
from ttame_jax.masking import MaskingKind, mask_images, upsample
from ttame_jax.metrics.selection import pixel_count, relevance_rank

PERCENTAGES = (100, 50, 15)


def masked_confidences(
    predict: Callable[[jax.Array], jax.Array],
    images: jax.Array,
    maps: jax.Array,
    classes: jax.Array,
    preprocessing: Preprocessing,
    masking: MaskingKind,
    percentages: Sequence[float] = PERCENTAGES,
) -> jax.Array:
    """Confidence in a class when only the top v % of its map is left of the image.

    Args:
      predict: standardised images ``[B, H, W, 3]`` to softmax probabilities ``[B, Cls]``.
      images: ``[B, H, W, 3]`` in [0, 1].
      maps: ``[B, h, w]`` in [0, 1]; upsampled to the image, then thresholded.
      classes: ``[B]``.
      preprocessing: the backbone's.
      masking: how the map masks the image.
      percentages: the v.

    Returns:
      ``[B, len(percentages)]`` in [0, 1].
    """
    maps = upsample(maps, images.shape[1:3])
    ranks = relevance_rank(maps)
    pixels = maps.shape[1] * maps.shape[2]

    def confidence(percent: float) -> jax.Array:
        masks = jnp.where(ranks < pixel_count(percent, pixels), maps, 0)
        probabilities = predict(mask_images(images, masks, preprocessing, masking))
        return jnp.take_along_axis(probabilities, classes[:, None], axis=1)[:, 0]

    return jnp.stack([confidence(percent) for percent in percentages], axis=1)


def average_drop(confidences: np.ndarray, masked: np.ndarray) -> np.ndarray:
    """AD in %, lower is better: of confidences ``[N]`` and masked ones ``[N, P]``, ``[P]``."""
    before = confidences[:, None]
    return 100 * np.mean(np.maximum(0, before - masked) / before, axis=0)


def increase_in_confidence(confidences: np.ndarray, masked: np.ndarray) -> np.ndarray:
    """IC in %, higher is better: of confidences ``[N]`` and masked ones ``[N, P]``, ``[P]``."""
    return 100 * np.mean(masked > confidences[:, None], axis=0)

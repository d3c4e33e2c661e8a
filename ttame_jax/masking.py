"""From an explanation map to a masked image: scaling, upsampling, masking."""

import jax
import jax.numpy as jnp

from ttame_jax.preprocessing import Masking, Preprocessing

# A map with less counts as constant.
_SMALLEST_VARIANCE = 1e-12
_SMALLEST_SPAN = float(jnp.finfo(jnp.float32).tiny)
_LARGEST_UNIT = 1e30  # whose inverse does not underflow


def min_max_scale(maps: jax.Array) -> jax.Array:
    """Scales each map ``[..., H, W]`` to [0, 1] (paper, section III-D).

    A constant map becomes all zeros. A map with NaN becomes NaN.
    """
    maps = maps.astype(jnp.float32)
    low = maps.min(axis=(-2, -1), keepdims=True)
    span = maps.max(axis=(-2, -1), keepdims=True) - low
    constant = span < _SMALLEST_SPAN
    # The gradient of a quotient squares its divisor, which must not underflow: it is scaled to 1.
    unit = jax.lax.stop_gradient(1 / jnp.clip(span, _SMALLEST_SPAN, _LARGEST_UNIT))
    return jnp.where(constant, 0, (maps - low) * unit / jnp.where(constant, 1, span * unit))


def standardise_maps(maps: jax.Array) -> jax.Array:
    """Scales each map ``[..., H, W]`` to mean 0 and variance 1; float32.

    A constant map becomes all zeros, with a finite gradient.
    """
    maps = maps.astype(jnp.float32)
    maps -= maps.mean(axis=(-2, -1), keepdims=True)
    variance = jnp.mean(maps**2, axis=(-2, -1), keepdims=True)
    return maps * jax.lax.rsqrt(jnp.where(variance > _SMALLEST_VARIANCE, variance, 1))


def upsample(maps: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """Resizes maps ``[..., h, w]`` to ``[..., *size]``, bilinear with half-pixel centres.

    Equal to PyTorch's ``interpolate(mode="bilinear", align_corners=False)`` as long as no side
    shrinks.
    """
    if maps.shape[-2:] == size:
        return maps
    return jax.image.resize(maps, (*maps.shape[:-2], *size), "bilinear", antialias=False)


def mask_images(
    images: jax.Array, masks: jax.Array, preprocessing: Preprocessing, masking: Masking
) -> jax.Array:
    """Masks images and standardises them, ready for the backbone.

    Args:
      images: ``[B, H, W, 3]`` in [0, 1].
      masks: ``[B, H, W]`` in [0, 1].
      preprocessing: whose mean and standard deviation are used.
      masking: ``"pixel"`` is ``|E * I|``, the paper's masking for CNNs (Eq. 13), which makes masked
        pixels black; ``"standardised"`` is ``E * |I|``, its masking for ViTs (Eq. 14), which gives
        them the mean colour.

    Returns:
      ``[B, H, W, 3]``, standardised.
    """
    masks = masks[..., None]
    if masking == "pixel":
        return preprocessing.standardise(masks * images)
    if masking == "standardised":
        return masks * preprocessing.standardise(images)
    raise ValueError(f"unknown masking {masking!r}: use 'pixel' or 'standardised'")

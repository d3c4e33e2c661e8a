"""Bilinear interpolation at other positions than those of `masking.upsample`."""

import jax
import jax.numpy as jnp


def interpolate(maps: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Interpolates maps ``[..., h, w]`` at rows ``[H]`` and columns ``[W]``: ``[..., H, W]``."""

    def weights(places, count):  # [places, count]
        return jnp.maximum(0, 1 - jnp.abs(places[:, None] - jnp.arange(count)))

    row_weights, column_weights = map(weights, (rows, columns), maps.shape[-2:])
    return jnp.einsum("...hw,ih,jw->...ij", maps, row_weights, column_weights, precision="highest")


def aligned(old: int, new: int) -> jax.Array:
    """Positions from the centre of the first pixel to the last (``align_corners=True``)."""
    return jnp.linspace(0, old - 1, new)


def mirrored(old: int, new: int) -> jax.Array:
    """Half-pixel centres, mirrored about the centres of the outermost pixels: scikit-image's
    ``resize(mode="reflect")``."""
    centres = jnp.abs((jnp.arange(new) + 0.5) * old / new - 0.5)
    return (old - 1) - jnp.abs((old - 1) - centres)

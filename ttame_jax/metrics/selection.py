"""Which pixels are the v % most relevant: an exact count, whatever the ties."""

import jax
import jax.numpy as jnp


def pixel_count(percent: float, pixels: int) -> int:
    """The largest number of `pixels` that is not more than `percent` (0 to 100) of them."""
    if not 0 <= percent <= 100:
        raise ValueError(f"a share of the pixels must lie in 0 to 100 %, not {percent}")
    return int(pixels * percent // 100)


def relevance_rank(maps: jax.Array) -> jax.Array:
    """Place of each pixel in the order of relevance: `[B, H, W]` -> int32, 0 = most relevant.

    Equal values rank by pixel index (row by row), so that the order is the same on every device;
    NaN ranks last.
    """

    def rank(relevance):
        order = jnp.argsort(-relevance, stable=True)
        places = jnp.arange(relevance.size, dtype=jnp.int32)
        return jnp.zeros_like(places).at[order].set(places)

    return jax.vmap(rank)(maps.reshape(len(maps), -1)).reshape(maps.shape)


def top_mask(maps: jax.Array, percent: float) -> jax.Array:
    """True at the `percent` (0 to 100, a Python number) most relevant pixels of each map.

    `[B, H, W]` floats -> bool; every map keeps `floor(percent / 100 * H * W)` pixels: never more
    than the share, also where values tie (see `relevance_rank`). `top_mask(-maps, percent)` are
    the least relevant pixels. Raises ValueError for a share outside 0 to 100.
    """
    return relevance_rank(maps) < pixel_count(percent, maps.shape[-2] * maps.shape[-1])

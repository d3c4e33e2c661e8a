"""Selection of the v % most relevant pixels: an exact number, even with ties."""

import jax
import jax.numpy as jnp


def pixel_count(percent: float, pixels: int) -> int:
    """Returns `percent` (0 to 100) of the number of `pixels`, rounded down.

    Raises:
      ValueError: `percent` is outside [0, 100].
    """
    if not 0 <= percent <= 100:
        raise ValueError(f"percent must be in the range 0 to 100: got {percent}")
    return int(pixels * percent // 100)


def relevance_rank(maps: jax.Array) -> jax.Array:
    """Ranks the pixels of each map: `[B, H, W]` -> int32 `[B, H, W]`, 0 is the most relevant.

    Equal values rank by pixel index (row-major), so that the order is the same on every device.
    NaN ranks last.
    """

    def rank(relevance):
        order = jnp.argsort(-relevance, stable=True)
        places = jnp.arange(relevance.size, dtype=jnp.int32)
        return jnp.zeros_like(places).at[order].set(places)

    return jax.vmap(rank)(maps.reshape(len(maps), -1)).reshape(maps.shape)

"""Noisy linear imputation: removed pixels become the weighted mean of their neighbours.

Rong et al., "A Consistent and Efficient Evaluation Strategy for Attribution Methods" (ROAD),
ICML 2022. The weights are 1/6 for the four direct neighbours and 1/12 for the four diagonal
ones, renormalised at the image's border.

Every removed pixel i gives one equation, `(sum_j w_ij) x_i - sum_j w_ij x_j = 0` over its
neighbours j inside the image. Since w_ij = w_ji, this is a weighted graph Laplacian with the
known pixels as boundary values: symmetric and positive definite as soon as one pixel is known.
It is solved by conjugate gradients with a multigrid V-cycle as preconditioner, all images of a
batch at once. Weights are multiplied by 12, which makes them the integers 1 and 2: rounding in
float32 is then unbiased. A large hole would amplify a bias.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

RESIDUAL = 1e-5
"""Largest relative residual of an imputed image; see `relative_residual`."""

TOLERANCE = RESIDUAL / 2  # of the solver; the other half allows for rounding
MAX_ITERATIONS = 50  # 4 to 8 are enough for 224 x 224 pixels

# Weights (times 12) of the neighbours at [row + 1, column + 1]; 0 for the pixel itself.
WEIGHTS = ((1, 2, 1), (2, 0, 2), (1, 2, 1))

Fields = Sequence[Sequence[jax.Array | int]]
"""A 3 x 3 stencil like `WEIGHTS`; coefficients are numbers or, per pixel, [B, 1, H, W]."""


def noisy_linear_imputation(
    images: jax.Array, removed: jax.Array, key: jax.Array | None = None, noise: float = 0.01
) -> jax.Array:
    """Imputes removed pixels from the known ones and adds Gaussian noise.

    Args:
      images: `[B, H, W, C]`, standardised. Values at removed pixels are not used.
      removed: bool `[B, H, W]`, True at pixels to impute.
      key: a typed key, or one per image `[B]`, which makes an image's noise independent of its
        batch. None adds no noise.
      noise: standard deviation of the noise on removed pixels, in units of `images`.

    Returns:
      float32 `[B, H, W, C]`. Known pixels are unchanged. Before noise, `relative_residual` is at
      most `RESIDUAL`. An image without known pixels becomes 0, the mean colour of the data set.

    Raises:
      ValueError: `removed` is not bool or does not match `images`.
    """
    _check(images, removed)
    images = images.astype(jnp.float32)
    known = jnp.where(removed[..., None], 0, images)  # removed pixels may be NaN
    solution = _to_nhwc(_solve(_to_nchw(known), _to_nchw(removed[..., None].astype(jnp.float32))))
    if key is not None:
        keys = jax.random.split(key, len(images)) if key.ndim == 0 else key
        normal = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:]))(keys)
        solution = solution + noise * normal
    return jnp.where(removed[..., None], solution, images)


def relative_residual(images: jax.Array, removed: jax.Array) -> jax.Array:
    """Returns the relative residual of the equations that imputed images should solve.

    It is the 2-norm of the residual divided by that of the right-hand side (the contribution of
    the known pixels), and the maximum over the channels.

    Args:
      images: imputed images without noise, `[B, H, W, C]`.
      removed: bool `[B, H, W]`, True at imputed pixels.

    Returns:
      float32 `[B]`.

    Raises:
      ValueError: `removed` is not bool or does not match `images`.
    """
    _check(images, removed)
    free = _to_nchw(removed[..., None].astype(jnp.float32))
    images = _to_nchw(images.astype(jnp.float32))
    right = free * _weighted(WEIGHTS, (1 - free) * images)
    residual = right - _laplacian(free)(free * images)
    return jnp.sqrt(_ratio(_sum(residual * residual), _sum(right * right))).max((1, 2, 3))


def _check(images, removed):
    if removed.dtype != bool or removed.shape != images.shape[:3]:
        raise ValueError(
            f"removed must be bool [B, H, W] for images [B, H, W, C]: got {removed.dtype} "
            f"{removed.shape} for {images.shape}"
        )


# Below, arrays are [B, C, H, W]: rows of pixels are contiguous, and the stencils (C = 1)
# broadcast over the channels. All grids are zero outside their borders.


def _solve(known: jax.Array, free: jax.Array) -> jax.Array:
    """Preconditioned conjugate gradients, one system per image and channel.

    Args:
      known: values of the known pixels, 0 elsewhere.
      free: 1 at removed pixels, 0 elsewhere.

    The unknowns are differences from the mean of the known pixels, which keeps rounding errors
    relative to the contrast. A converged system does not change while others continue, so that a
    result does not depend on the rest of the batch.
    """
    levels = _hierarchy(free)
    mean = _sum(known) / jnp.maximum(_sum(1 - free), 1)
    right = free * _weighted(WEIGHTS, known)
    start = right - mean * free * _weighted(WEIGHTS, 1 - free)
    scale = _sum(right * right)
    target = TOLERANCE**2 * jnp.where(scale > 0, scale, _sum(start * start))

    def unfinished(state):
        step, _, _, norm, _, _ = state
        return (step < MAX_ITERATIONS) & jnp.any(norm > target)

    def iterate(state):
        step, x, residual, norm, direction, previous = state
        correction = _v_cycle(levels, residual)
        current = _sum(residual * correction)
        direction = correction + _ratio(current, previous) * direction
        change = levels[0].apply(direction)
        length = jnp.where(norm > target, _ratio(current, _sum(direction * change)), 0)
        x, residual = x + length * direction, residual - length * change
        return step + 1, x, residual, _sum(residual * residual), direction, current

    zero = jnp.zeros_like(start)
    state = (0, zero, start, _sum(start * start), zero, jnp.zeros_like(target))
    return mean + lax.while_loop(unfinished, iterate, state)[1]


class Level(NamedTuple):
    """One grid of the hierarchy."""

    apply: Callable[[jax.Array], jax.Array]  # x -> A x, [B, C, H, W]
    relax: jax.Array  # [B, 1, H, W]: factors of a Jacobi sweep; 0 where nothing is unknown


def _hierarchy(free: jax.Array) -> Sequence[Level]:
    """Grids from the image down to 3 x 3, each the Galerkin projection of the previous one."""
    diagonal = free * _weighted(WEIGHTS, jnp.ones_like(free))
    fields = [
        [-weight * free * shifted for weight, shifted in zip(*row)]
        for row in zip(WEIGHTS, _shifts(free))
    ]
    fields[1][1] = diagonal
    levels = [Level(_laplacian(free), _relaxation(fields))]
    while max(fields[1][1].shape[2:]) > 3:
        by_rows = [_galerkin(*column, axis=2) for column in zip(*fields)]  # [column][row]
        fields = [_galerkin(*row, axis=3) for row in zip(*by_rows)]
        levels.append(Level(partial(_weighted, fields), _relaxation(fields)))
    return levels


def _v_cycle(levels: Sequence[Level], residual: jax.Array) -> jax.Array:
    """Approximate solution of `A x = residual`: symmetric in `residual`, positive definite."""
    apply, relax = levels[0]
    x = relax * residual
    if len(levels) == 1:
        for _ in range(8):
            x = x + relax * (residual - apply(x))
        return x
    coarse = _v_cycle(levels[1:], _restrict(_restrict(residual - apply(x), 2), 3))
    height, width = residual.shape[2:]
    x = x + jnp.where(relax > 0, _prolong(_prolong(coarse, 2, height), 3, width), 0)
    return x + relax * (residual - apply(x))


def _relaxation(fields: Fields) -> jax.Array:
    """Factors of Jacobi sweeps that converge on every grid: 1 / max(a_ii, sum_j |a_ij| / 1.8).

    Inside a hole, the sum is twice the diagonal, and this is the usual damping by 0.9. Around
    isolated pixels, coarse grids have larger sums, and damping by the diagonal alone diverges.
    """
    diagonal = fields[1][1]
    total = sum(jnp.abs(field) for row in fields for field in row)
    return _ratio(jnp.ones_like(diagonal), jnp.maximum(diagonal, total / 1.8))


def _laplacian(free: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """A of the image's own grid. Expects and returns 0 at known pixels."""
    diagonal = free * _weighted(WEIGHTS, jnp.ones_like(free))
    return lambda x: diagonal * x - free * _weighted(WEIGHTS, x)


def _weighted(fields: Fields, x: jax.Array) -> jax.Array:
    """Applies a stencil: sums each pixel and its eight neighbours times their coefficients."""
    terms = (f * s for row in zip(fields, _shifts(x)) for f, s in zip(*row))
    return reduce(jnp.add, terms)


def _shifts(x: jax.Array) -> list[list[jax.Array]]:
    """x at [row + i, column + j] for i, j = -1, 0, 1."""
    height, width = x.shape[2:]
    padded = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    return [[padded[:, :, i : i + height, j : j + width] for j in range(3)] for i in range(3)]


# Between grids, one axis at a time. Coarse point k sits on fine point 2k; n fine points have
# n // 2 + 1 coarse ones, so that every fine point lies between two. Interpolation is linear.


def _around(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Fine values before, at and after each coarse point."""
    n = x.shape[axis]
    coarse = n // 2 + 1
    padding = [(0, 0)] * x.ndim
    padding[axis] = (1, 2 * coarse - n)
    padded = jnp.pad(x, padding)
    before, at, after = (
        lax.slice_in_dim(padded, start, start + 2 * coarse - 1, stride=2, axis=axis)
        for start in range(3)
    )
    return before, at, after


def _restrict(x: jax.Array, axis: int) -> jax.Array:
    """The transpose of `_prolong`."""
    before, at, after = _around(x, axis)
    return at + 0.5 * (before + after)


def _prolong(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Linear interpolation to `size` fine points."""
    following = lax.slice_in_dim(x, 1, None, axis=axis)
    preceding = lax.slice_in_dim(x, 0, -1, axis=axis)
    last = lax.slice_in_dim(x, -1, None, axis=axis)
    between = lax.concatenate([0.5 * (preceding + following), last], axis)  # last is cut off
    pairs = jnp.stack([x, between], axis + 1)
    shape = x.shape[:axis] + (2 * x.shape[axis],) + x.shape[axis + 1 :]
    return lax.slice_in_dim(pairs.reshape(shape), 0, size, axis=axis)


def _galerkin(lower: jax.Array, centre: jax.Array, upper: jax.Array, axis: int) -> list[jax.Array]:
    """Coefficients (to point - 1, itself, + 1) of P' A P, for P = `_prolong` along the axis."""
    l_before, l_at, l_after = _around(lower, axis)
    c_before, c_at, c_after = _around(centre, axis)
    u_before, u_at, u_after = _around(upper, axis)
    return [
        0.5 * (l_before + l_at) + 0.25 * c_before,
        c_at + 0.25 * (c_before + c_after) + 0.5 * ((l_at + l_after) + (u_before + u_at)),
        0.5 * (u_at + u_after) + 0.25 * c_after,
    ]


def _sum(x: jax.Array) -> jax.Array:
    """Sums over the pixels: [B, C, 1, 1]."""
    return x.sum((2, 3), keepdims=True)


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    """a / b, and 0 where b is not positive."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)


def _to_nchw(x: jax.Array) -> jax.Array:
    return x.transpose(0, 3, 1, 2)


def _to_nhwc(x: jax.Array) -> jax.Array:
    return x.transpose(0, 2, 3, 1)

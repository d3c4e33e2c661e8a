"""SGD with the one-cycle policy, equal to PyTorch's ``OneCycleLR`` step by step."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

PEAK_SHARE = 0.3  # pct_start: fraction of all steps during which the rate rises
DIV_FACTOR = 25.0  # peak rate / first rate
FINAL_DIV_FACTOR = 1e4  # first rate / last rate
BASE_MOMENTUM, MAX_MOMENTUM = 0.85, 0.95
WEIGHT_DECAY = 5e-4


class OneCycle(NamedTuple):
    """Two cosine phases: the rate rises to its peak at step ``0.3 * total - 1``, then falls.

    The momentum falls from 0.95 to 0.85 and rises back.
    """

    peak: float
    total_steps: int

    def learning_rate(self, step: jax.typing.ArrayLike) -> jax.Array:
        """The rate of a step (0 to ``total_steps - 1``)."""
        first = self.peak / DIV_FACTOR
        return self._anneal(step, first, self.peak, first / FINAL_DIV_FACTOR)

    def momentum(self, step: jax.typing.ArrayLike) -> jax.Array:
        """The momentum of a step (0 to ``total_steps - 1``)."""
        return self._anneal(step, MAX_MOMENTUM, BASE_MOMENTUM, MAX_MOMENTUM)

    def _anneal(self, step, first: float, middle: float, last: float) -> jax.Array:
        turn = max(PEAK_SHARE * self.total_steps - 1, 0.0)
        end = max(self.total_steps - 1, turn + 1)
        step = jnp.asarray(step, jnp.float32)
        rising = _cosine(first, middle, step / max(turn, 1e-6))
        falling = _cosine(middle, last, jnp.minimum((step - turn) / (end - turn), 1))
        return jnp.where(step < turn, rising, falling)


def _cosine(start: float, end: float, share: jax.Array) -> jax.Array:
    return end + (start - end) / 2 * (1 + jnp.cos(math.pi * share))


def _decayed(params):
    """Weights decay, including BatchNorm scales. Biases do not."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "bias" not in jax.tree_util.keystr(path), params
    )


def one_cycle_sgd(cycle: OneCycle) -> optax.GradientTransformation:
    """SGD with Nesterov momentum and weight decay 5e-4, both cycled as in ``OneCycle``."""
    sgd = optax.inject_hyperparams(optax.sgd, static_args="nesterov")
    return optax.chain(
        optax.add_decayed_weights(WEIGHT_DECAY, mask=_decayed),
        sgd(learning_rate=cycle.learning_rate, momentum=cycle.momentum, nesterov=True),
    )

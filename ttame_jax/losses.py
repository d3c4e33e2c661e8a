"""The training loss, one function per equation (T-TAME, section III-C3).

Explanation maps are Psi ``[..., H, W]`` in [0, 1]. Every function returns a float32 scalar, except
`cross_entropy` and `complement`, which return one value per image.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import optax

# Below this an explanation value counts as 0: x ** 0.3 has an infinite slope there.
_SMALLEST = 1e-12


def cross_entropy(logits: jax.Array, classes: jax.Array) -> jax.Array:
    """Cross-entropy ``[B]`` of logits ``[B, Cls]`` against classes ``[B]`` (Eq. 11, first term)."""
    logits = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, classes)


def complement(logits: jax.Array, classes: jax.Array) -> jax.Array:
    """-log(1 - p) ``[B]`` of the probabilities of classes ``[B]``, from logits ``[B, Cls]``.

    Of images that are masked by the complements of their maps it asks that what the map leaves out
    does not suffice for the class. The paper does not have this term.
    """
    logits = logits.astype(jnp.float32)
    own = jax.nn.one_hot(classes, logits.shape[-1], dtype=bool)
    others = jax.nn.logsumexp(jnp.where(own, -jnp.inf, logits), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - others


def area(maps: jax.Array, exponent: float) -> jax.Array:
    """Mean of the maps to the power of lambda 4 (Eq. 16)."""
    return jnp.mean(jnp.maximum(maps.astype(jnp.float32), _SMALLEST) ** exponent)


def variation(maps: jax.Array) -> jax.Array:
    """Half the mean, over map values, of squared differences between neighbours (Eq. 17)."""
    return _neighbour_differences(maps) / (2 * maps.size)


def reference_area(maps: jax.Array, exponent: float) -> jax.Array:
    """The area term of the authors' code: Eq. 16 with an offset inside the power."""
    return jnp.mean((maps.astype(jnp.float32) + 5e-4) ** exponent)


def reference_variation(maps: jax.Array) -> jax.Array:
    """The variation term of the authors' code: sums, not means, and a penalty on the borders.

    The sums run over all maps ``[B, K, H, W]`` and are divided by 2 B only, which is K H W times
    the weight of Eq. 17.
    """
    maps = maps.astype(jnp.float32)
    borders = (maps[..., 0, :], maps[..., -1, :], maps[..., 0], maps[..., -1])
    penalty = sum(jnp.sum(border**2) for border in borders)
    return (_neighbour_differences(maps) + 0.3 * penalty) / (2 * maps.shape[0])


def _neighbour_differences(maps: jax.Array) -> jax.Array:
    maps = maps.astype(jnp.float32)
    vertical, horizontal = jnp.diff(maps, axis=-2), jnp.diff(maps, axis=-1)
    return jnp.sum(vertical**2) + jnp.sum(horizontal**2)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a loss is made of.

    Attributes:
      area: the area term of maps and exponent.
      variation: the variation term of maps.
      scaled: whether Psi, and with it the mask, are the maps that are shown: sigmoids, min-max
        scaled. The paper trains the sigmoids, and shows and evaluates maps that are min-max scaled
        before the sigmoid.
      complement_weight: weight of the term `complement`, unless the configuration has another.
    """

    area: Callable[[jax.Array, float], jax.Array] = area
    variation: Callable[[jax.Array], jax.Array] = variation
    scaled: bool = False
    complement_weight: float = 0.0


RECIPES = {
    "paper": Recipe(),
    "reference": Recipe(reference_area, reference_variation),
    "scaled": Recipe(scaled=True),
    "complement": Recipe(scaled=True, complement_weight=0.5),
}
if TYPE_CHECKING:
    RecipeName = str
else:
    RecipeName = Literal[tuple(RECIPES)]


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Recipe and weights of the loss; the defaults are the paper's (section IV-C).

    Raises:
      ValueError: a weight is negative, the exponent is not positive, or one is not finite.
    """

    recipe: RecipeName = "paper"
    """The paper's equations (paper), those of the authors' code (reference), the paper's on maps that
    are scaled in training as they are in use (scaled), or these with a term for what the map leaves
    out (complement)."""
    cross_entropy_weight: float = 1.5
    """Lambda 1."""
    regulariser_weight: float = 2.0
    """Lambda 2."""
    variation_weight: float = 0.005
    """Lambda 3."""
    area_exponent: float = 0.3
    """Lambda 4."""
    complement_weight: float | None = None
    """Weight of -log(1 - p) of the class in the image that is masked by 1 - E. More than 0 takes one
    more pass through the classifier and its gradient. By default it is that of the recipe: 0.5 for
    complement, and 0 for the others."""

    def __post_init__(self):
        weights = ("cross_entropy", "regulariser", "variation", "complement")
        for name in (f"{weight}_weight" for weight in weights):
            weight = getattr(self, name)
            if weight is not None and not 0 <= weight < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, not {weight}")
        if not 0 < self.area_exponent < math.inf:
            raise ValueError(f"area_exponent must be positive and finite, not {self.area_exponent}")

    @property
    def resolved_complement_weight(self) -> float:
        """The weight of the term `complement`: the configured one, or else the recipe's."""
        if self.complement_weight is not None:
            return self.complement_weight
        return RECIPES[self.recipe].complement_weight


def total_loss(
    maps: jax.Array,
    entropies: jax.Array,
    config: LossConfig,
    complements: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss (Eq. 11, 15) and its unweighted terms.

    Args:
      maps: Psi ``[B, K, H, W]`` in [0, 1].
      entropies: ``[B]``, the masked images' `cross_entropy` against the model truth.
      config: recipe and weights.
      complements: ``[B]``, `complement` of the model truth in the images that are masked by 1 minus
        their maps; None if the weight of this term is 0.
    """
    recipe = RECIPES[config.recipe]
    terms = {
        "cross_entropy": entropies.mean(),
        "area": recipe.area(maps, config.area_exponent),
        "variation": recipe.variation(maps),
    }
    regulariser = terms["area"] + config.variation_weight * terms["variation"]
    loss = config.cross_entropy_weight * terms["cross_entropy"]
    loss += config.regulariser_weight * regulariser
    if complements is not None:
        terms["complement"] = complements.mean()
        loss += config.resolved_complement_weight * terms["complement"]
    return loss, terms

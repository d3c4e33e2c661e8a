"""The training loss, one function per equation (T-TAME, section III-C3).

Explanation maps are Psi ``[..., H, W]`` in [0, 1]. Every function returns a float32 scalar, except
`cross_entropy`, `complement` and `disagreement`, which return one value per image.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import optax

from ttame_jax.masking import standardise_maps

# Below this an explanation value counts as 0: x ** 0.3 has an infinite slope there.
_SMALLEST = 1e-12

EXTRA_TERMS = ("complement", "relevance")
"""The terms that the paper does not have, each the mean of one value per image."""


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


def disagreement(maps: jax.Array, relevance: jax.Array) -> jax.Array:
    """1 minus the correlation ``[B]`` of maps with relevance maps, both ``[B, H, W]``: 0 to 2.

    It asks that the values of a map rank positions as the gradients of the classifier do. The
    paper does not have this term.
    """
    return 1 - jnp.mean(standardise_maps(maps) * standardise_maps(relevance), axis=(-2, -1))


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
      regulariser_weight: lambda 2, unless the configuration has another.
      complement_weight: weight of `complement`, unless the configuration has another.
      relevance_weight: weight of `disagreement` with the relevance of positions
        (`ttame_jax.training.relevance`), unless the configuration has another.
    """

    area: Callable[[jax.Array, float], jax.Array] = area
    variation: Callable[[jax.Array], jax.Array] = variation
    scaled: bool = False
    regulariser_weight: float = 2.0
    complement_weight: float = 0.0
    relevance_weight: float = 0.0


RECIPES = {
    "paper": Recipe(),
    "reference": Recipe(reference_area, reference_variation),
    "scaled": Recipe(scaled=True),
    "complement": Recipe(scaled=True, complement_weight=0.5),
    "relevance": Recipe(scaled=True, regulariser_weight=1.0, relevance_weight=2.0),
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
    out (complement) or for the order of its values (relevance)."""
    cross_entropy_weight: float = 1.5
    """Lambda 1."""
    regulariser_weight: float | None = None
    """Lambda 2. By default it is that of the recipe: 1 for relevance, and 2 as in the paper for the
    others."""
    variation_weight: float = 0.005
    """Lambda 3."""
    area_exponent: float = 0.3
    """Lambda 4."""
    complement_weight: float | None = None
    """Weight of -log(1 - p) of the class in the image that is masked by 1 - E. More than 0 takes one
    more pass through the classifier and its gradient. By default it is that of the recipe: 0.5 for
    complement, and 0 for the others."""
    relevance_weight: float | None = None
    """Weight of 1 minus the correlation of the map with the relevance that gradients of the classifier
    give. More than 0 takes one more gradient of the classifier. By default it is that of the recipe:
    2 for relevance, and 0 for the others."""

    def __post_init__(self):
        weights = ("cross_entropy", "regulariser", "variation", *EXTRA_TERMS)
        for name in (f"{weight}_weight" for weight in weights):
            weight = getattr(self, name)
            if weight is not None and not 0 <= weight < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, not {weight}")
        if not 0 < self.area_exponent < math.inf:
            raise ValueError(f"area_exponent must be positive and finite, not {self.area_exponent}")

    def weight(self, term: str) -> float:
        """The weight of the regulariser or of one of `EXTRA_TERMS`: the configured one, or else the
        recipe's."""
        name = f"{term}_weight"
        configured = getattr(self, name)
        return getattr(RECIPES[self.recipe], name) if configured is None else configured

    def resolved(self) -> "LossConfig":
        """The configuration with the recipe's weights where none is given."""
        terms = ("regulariser", *EXTRA_TERMS)
        return dataclasses.replace(self, **{f"{term}_weight": self.weight(term) for term in terms})


def total_loss(
    maps: jax.Array,
    entropies: jax.Array,
    config: LossConfig,
    extra: Mapping[str, jax.Array] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss (Eq. 11, 15) and its unweighted terms.

    Args:
      maps: Psi ``[B, K, H, W]`` in [0, 1].
      entropies: ``[B]``, the masked images' `cross_entropy` against the model truth.
      config: recipe and weights.
      extra: ``[B]`` each, those of `EXTRA_TERMS` whose weight is not 0: `complement` of the model
        truth in the images that are masked by 1 minus their maps, and `disagreement`.
    """
    recipe = RECIPES[config.recipe]
    terms = {
        "cross_entropy": entropies.mean(),
        "area": recipe.area(maps, config.area_exponent),
        "variation": recipe.variation(maps),
    }
    regulariser = terms["area"] + config.variation_weight * terms["variation"]
    loss = config.cross_entropy_weight * terms["cross_entropy"]
    loss += config.weight("regulariser") * regulariser
    for name, values in (extra or {}).items():
        terms[name] = values.mean()
        loss += config.weight(name) * terms[name]
    return loss, terms

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ttame_jax import losses
from ttame_jax.losses import LossConfig, total_loss

pytestmark = pytest.mark.quick


def torch_loss(maps, logits, classes, recipe):
    """The spec's formulas, literally: maps [B, K, H, W], weights 1.5, 2, 0.005, 0.3."""
    cross_entropy = torch.nn.functional.cross_entropy(logits, classes)
    vertical = ((maps[:, :, 1:] - maps[:, :, :-1]) ** 2).sum()
    horizontal = ((maps[:, :, :, 1:] - maps[:, :, :, :-1]) ** 2).sum()
    if recipe == "paper":
        area = (maps**0.3).mean()
        variation = (vertical + horizontal) / (2 * maps.numel())
        return 1.5 * cross_entropy + 2 * (area + 0.005 * variation)
    area = ((maps + 5e-4) ** 0.3).mean()
    borders = sum(
        (border**2).sum()
        for border in (maps[:, :, 0], maps[:, :, -1], maps[:, :, :, 0], maps[:, :, :, -1])
    )
    variation = 0.01 * (vertical + horizontal + 0.3 * borders) / (2 * len(maps))
    return 1.5 * cross_entropy + 2 * area + variation


@pytest.mark.parametrize("recipe", ["paper", "reference"])
def test_total_loss_and_gradients_equal_the_formula_in_pytorch(recipe):
    rng = np.random.default_rng(0)
    maps = rng.uniform(size=(4, 4, 7, 5)).astype(np.float32)
    logits = rng.normal(size=(4, 10)).astype(np.float32)
    classes = np.array([3, 0, 9, 3])

    def loss(maps, logits):
        return total_loss(maps, losses.cross_entropy(logits, classes), LossConfig(recipe))[0]

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(maps, logits)
    torch_inputs = [torch.tensor(x, requires_grad=True) for x in (maps, logits)]
    expected = torch_loss(*torch_inputs, torch.tensor(classes), recipe)
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    for gradient, tensor in zip(gradients, torch_inputs):
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=1e-4, atol=1e-7)


def test_the_complement_is_minus_log_of_what_is_left_for_other_classes():
    logits = np.array([[2.0, -1.0, 0.5], [0.0, 0.0, 0.0]], np.float32)
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = -np.log([1 - shares[0, 0], 1 - shares[1, 2]])
    np.testing.assert_allclose(losses.complement(logits, np.array([0, 2])), expected, rtol=1e-6)


def test_the_complement_of_a_certain_class_is_finite_with_a_gradient():
    logits = jnp.array([[1e3, 0.0, -1e3]], jnp.bfloat16)
    value, gradient = jax.value_and_grad(
        lambda logits: losses.complement(logits, jnp.array([0])).sum()
    )(logits)
    np.testing.assert_allclose(value, 1e3, rtol=1e-2)
    np.testing.assert_allclose(np.asarray(gradient, np.float32), [[1, -1, 0]], atol=1e-2)


def test_terms_have_the_values_worked_out_by_hand():
    maps = jnp.array([[[[0.0, 1.0], [0.0, 1.0]]]])  # two horizontal steps of 1, no vertical one
    np.testing.assert_allclose(losses.area(maps, 0.3), 0.5, atol=1e-3)
    np.testing.assert_allclose(losses.variation(maps), 2 / 8)
    # borders: top 1, bottom 1, left 0, right 2
    np.testing.assert_allclose(losses.reference_variation(maps), (2 + 0.3 * 4) / 2)


def test_the_disagreement_is_one_minus_the_correlation_of_two_maps():
    maps, relevance = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    expected = [1 - np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(maps, relevance)]
    np.testing.assert_allclose(losses.disagreement(maps, relevance), expected, atol=1e-6)
    np.testing.assert_allclose(losses.disagreement(maps, 5 * maps - 2), np.zeros(3), atol=1e-6)
    np.testing.assert_allclose(losses.disagreement(maps, -maps / 1e3), np.full(3, 2), atol=1e-6)


def test_the_disagreement_with_a_constant_map_is_one_with_a_finite_gradient():
    maps = jnp.stack([jnp.full((4, 4), 0.5), jnp.eye(4)])
    for pair in ((maps, maps[::-1]), (maps[::-1], maps)):
        value, gradients = jax.value_and_grad(
            lambda maps, other: losses.disagreement(maps, other).sum(), argnums=(0, 1)
        )(*pair)
        np.testing.assert_allclose(value, 2)
        assert all(jnp.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize(
    ("config", "regulariser", "complement", "relevance"),
    [
        (LossConfig("paper"), 2, 0, 0),
        (LossConfig("scaled"), 2, 0, 0),
        (LossConfig("complement"), 2, 0.5, 0),
        (LossConfig("complement", complement_weight=0), 2, 0, 0),
        (LossConfig("paper", complement_weight=0.3), 2, 0.3, 0),
        (LossConfig("paper", regulariser_weight=0), 0, 0, 0),
        (LossConfig("relevance"), 1, 0, 2),
        (LossConfig("relevance", 1.5, 3, complement_weight=0.3, relevance_weight=1), 3, 0.3, 1),
    ],
)
def test_the_recipe_sets_weights_unless_they_are_given(config, regulariser, complement, relevance):
    weights = {"regulariser": regulariser, "complement": complement, "relevance": relevance}
    assert {term: config.weight(term) for term in weights} == weights
    resolved = config.resolved()
    assert {term: getattr(resolved, f"{term}_weight") for term in weights} == weights
    assert (resolved.recipe, resolved.area_exponent) == (config.recipe, config.area_exponent)
    maps, entropies = jnp.full((2, 2, 4, 4), 0.5), jnp.ones(2)
    extra = {"complement": jnp.full(2, 3.0), "relevance": jnp.array([0.0, 1.0])}
    without, _ = total_loss(maps, entropies, config)
    loss, terms = total_loss(maps, entropies, config, extra)
    np.testing.assert_allclose(loss - without, 3 * complement + 0.5 * relevance, rtol=1e-5)
    np.testing.assert_allclose(without - 1.5, regulariser * terms["area"], rtol=1e-5)
    assert (terms["complement"], terms["relevance"]) == (3, 0.5)


@pytest.mark.parametrize("recipe", ["paper", "reference"])
@pytest.mark.parametrize("value", [-1e4, 0.0, 1e4])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_loss_and_gradient_are_finite_for_constant_and_saturated_maps(recipe, value, dtype):
    def loss(class_maps):
        maps = jax.nn.sigmoid(class_maps)
        entropies = losses.cross_entropy(jnp.zeros((2, 3), dtype), jnp.array([0, 1]))
        return total_loss(maps, entropies, LossConfig(recipe))[0]

    result, gradient = jax.value_and_grad(loss)(jnp.full((2, 2, 4, 4), value, dtype))
    assert result.dtype == jnp.float32
    assert jnp.isfinite(result) and jnp.isfinite(gradient).all()

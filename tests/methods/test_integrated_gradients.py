"""Integrated Gradients: PyTorch's maps, and the axiom of completeness."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import run
from tiny import TINY

from ttame_jax.masking import min_max_scale
from ttame_jax.methods import IntegratedGradients, compute_maps, load_method
from ttame_jax.methods.integrated_gradients import compressed
from ttame_jax.weights import load_backbone

CLASSES = np.array([[1, 2], [3, 4]])


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module", params=["vit", pytest.param("resnet18", marks=pytest.mark.slow)])
def backbone(request):
    return load_backbone(
        request.param, **{"resnet18": {"image_size": 64}, "vit": TINY}[request.param]
    )


@pytest.fixture(scope="module")
def images(backbone):
    size = backbone.preprocessing.image_size
    return np.random.default_rng(0).uniform(size=(2, size, size, 3)).astype(np.float32)


@pytest.mark.parametrize("baseline", ["black", "mean"])
def test_attributions_add_up_to_the_difference_of_the_logits(backbone, images, baseline):
    method = IntegratedGradients(backbone, steps=50, baseline=baseline)
    mean = np.float32(backbone.preprocessing.mean if baseline == "mean" else 0)
    ends = np.stack([images[0], np.broadcast_to(mean, images[0].shape)])
    logits = run(backbone, np.asarray(backbone.preprocessing.standardise(ends)))[0]
    found = jax.jit(method.attributions)(images[:1], CLASSES[:1]).sum((2, 3, 4))
    wanted = (logits[0] - logits[1])[CLASSES[0]]
    np.testing.assert_allclose(found[0], wanted, atol=0.02 * np.abs(logits).max())


def test_maps_equal_those_of_pytorch(backbone, images):
    torch = pytest.importorskip("torch")
    from benchmarks.methods import torch_model

    module = torch_model(backbone)
    standardise, steps = backbone.preprocessing.standardise, 5
    end, start = (
        torch.from_numpy(np.array(standardise(x), np.float32).transpose(0, 3, 1, 2))
        for x in (images, 0 * images)
    )
    expected = []
    for k in range(2):
        total = torch.zeros_like(end)
        for i in range(steps):
            x = (start + (i + 0.5) / steps * (end - start)).requires_grad_()
            logits = module(x)[torch.arange(2), torch.from_numpy(CLASSES[:, k])]
            (gradient,) = torch.autograd.grad(logits.sum(), x)
            total += gradient / steps
        expected.append((total * (end - start)).sum(1).clamp(min=0).detach().numpy())
    expected = np.stack(expected, 1)
    expected = min_max_scale(compressed(jnp.asarray(expected)))
    found = compute_maps(load_method("integrated_gradients", backbone, steps=5), images, CLASSES)
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_the_largest_values_are_compressed_and_keep_their_order():
    values = np.random.default_rng(0).exponential(size=(1, 2, 20, 20)).astype(np.float32) ** 3
    limit = np.quantile(values, 0.99, (2, 3), keepdims=True)
    found = np.asarray(compressed(jnp.asarray(values)))
    np.testing.assert_array_equal(
        found.reshape(2, -1).argsort(axis=-1), values.reshape(2, -1).argsort(axis=-1)
    )
    np.testing.assert_array_equal(found[values <= limit], values[values <= limit])
    np.testing.assert_allclose(found.max((2, 3)), 1.01 * limit[..., 0, 0], rtol=1e-5)


def test_a_map_of_few_values_is_not_compressed():
    few = jnp.zeros((1, 1, 20, 20)).at[0, 0, 3, 4].set(2.0)
    np.testing.assert_array_equal(compressed(few), few)


def test_wrong_options_are_refused(backbone):
    with pytest.raises(ValueError, match="integrates over 1 step or more, not 0"):
        IntegratedGradients(backbone, steps=0)
    with pytest.raises(
        ValueError, match="baselines of integrated_gradients are 'black' and 'mean'"
    ):
        load_method("integrated_gradients", backbone, baseline="white")

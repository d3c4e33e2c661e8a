import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ttame_jax.training.optimizer import OneCycle, one_cycle_sgd

pytestmark = pytest.mark.quick

STEPS, PEAK = 100, 0.02


def torch_optimizer(tensors, total_steps=STEPS):
    decayed = [t for name, t in tensors.items() if "bias" not in name]
    rest = [t for name, t in tensors.items() if "bias" in name]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": 5e-4}, {"params": rest, "weight_decay": 0}],
        lr=PEAK,
        momentum=0.9,
        nesterov=True,
    )
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK, total_steps=total_steps, pct_start=0.3
    )


@pytest.mark.parametrize("total_steps", [STEPS, 37])
def test_rate_and_momentum_equal_pytorchs_at_every_step(total_steps):
    optimizer, schedule = torch_optimizer({"weight": torch.zeros(1)}, total_steps)
    cycle = OneCycle(PEAK, total_steps)
    for step in range(total_steps):
        group = optimizer.param_groups[0]
        np.testing.assert_allclose(cycle.learning_rate(step), group["lr"], rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(cycle.momentum(step), group["momentum"], rtol=1e-6)
        optimizer.step()
        if step < total_steps - 1:
            schedule.step()


def test_parameters_follow_pytorchs_through_a_whole_cycle():
    rng = np.random.default_rng(0)
    start = {
        "kernel": rng.normal(size=(3, 2)).astype(np.float32),
        "scale": np.ones(2, np.float32),
        "bias": rng.normal(size=2).astype(np.float32),
    }
    gradients = rng.normal(size=(STEPS, 3)).astype(np.float32)
    tensors = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    optimizer, schedule = torch_optimizer(tensors)
    transform = one_cycle_sgd(OneCycle(PEAK, STEPS))
    params = jax.tree.map(jnp.asarray, start)
    state = transform.init(params)
    update = jax.jit(transform.update)
    for step, scales in enumerate(gradients):
        grads = {name: s * np.ones_like(start[name]) for name, s in zip(start, scales)}
        updates, state = update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(grads[name])
        optimizer.step()
        if step < STEPS - 1:
            schedule.step()
    for name, tensor in tensors.items():
        np.testing.assert_allclose(params[name], tensor.detach().numpy(), rtol=2e-5, atol=2e-6)


def test_biases_do_not_decay_and_weights_and_scales_do():
    params = {"kernel": jnp.ones(2), "scale": jnp.ones(2), "bias": jnp.ones(2)}
    transform = one_cycle_sgd(OneCycle(PEAK, STEPS))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = transform.update(zeros, transform.init(params), params)
    assert (updates["bias"] == 0).all()
    assert (updates["kernel"] < 0).all() and (updates["scale"] < 0).all()


@pytest.mark.parametrize("total_steps", [1, 2, 3, 4])
def test_very_short_runs_have_finite_rates(total_steps):
    cycle = OneCycle(PEAK, total_steps)
    for step in range(total_steps):
        assert 0 < cycle.learning_rate(step) <= PEAK * (1 + 1e-6)
        assert 0.85 - 1e-6 <= cycle.momentum(step) <= 0.95 + 1e-6

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec as P

from ttame_jax.backbones.vit import gelu
from ttame_jax.mesh import AXIS, data_mesh

pytestmark = pytest.mark.quick

VALUES = np.linspace(-8, 8, 1024, dtype=np.float32)


def test_gelu_and_its_gradient_equal_pytorchs():
    tensor = torch.tensor(VALUES, requires_grad=True)
    expected = torch.nn.functional.gelu(tensor)
    expected.sum().backward()
    value, pull = jax.vjp(gelu, jnp.asarray(VALUES))
    np.testing.assert_allclose(value, expected.detach(), atol=1e-6)
    np.testing.assert_allclose(pull(jnp.ones_like(value))[0], tensor.grad, atol=1e-6)


def test_gelu_has_its_gradient_on_every_device_of_a_mesh():
    gradient = jax.grad(lambda x: gelu(x).sum())
    spread = jax.shard_map(gradient, mesh=data_mesh(), in_specs=P(AXIS), out_specs=P(AXIS))
    np.testing.assert_allclose(jax.jit(spread)(VALUES), gradient(VALUES), atol=1e-6)

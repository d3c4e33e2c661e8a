import jax
import pytest
from flax import nnx

from ttame_jax.weights import load_backbone


@pytest.fixture(scope="session")
def abstract_backbone():
    """`load_backbone` without weights that computes nothing: shapes only."""
    return lambda name, **config: nnx.eval_shape(lambda: load_backbone(name, **config))


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield

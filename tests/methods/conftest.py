import jax
import pytest


@pytest.fixture(scope="module")
def float64():
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        yield

"""Random weights without JAX's initialisers, which compile for every shape."""

import numpy as np

from ttame_jax.weights.transfer import fill, parameters


def randomised(module, seed=0):
    """An abstract module with random values that keep the activations' scale."""
    rng = np.random.default_rng(seed)

    def values(path, shape, dtype):
        if dtype == np.int32:
            return rng.integers(1, 1000, shape, dtype)
        if path.endswith(("scale", "var")):
            return rng.uniform(0.5, 1.5, shape).astype(dtype)
        scale = float(np.prod(shape[:-1])) ** -0.5 if path.endswith("kernel") else 0.2
        return scale * rng.standard_normal(shape, dtype)

    shapes = parameters(module).items()
    return fill(module, {path: values(path, v.shape, v.dtype) for path, v in shapes})

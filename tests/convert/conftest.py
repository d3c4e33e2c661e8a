import numpy as np
import pytest
from flax import nnx

from ttame_jax.config import TrainConfig
from ttame_jax.runs import build_attention, save_attention
from ttame_jax.weights import load_backbone, save_backbone
from ttame_jax.weights.transfer import fill, parameters

TINY_VIT = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 4, "num_heads": 2}


def randomised(module, seed=0):
    """An abstract module with random values that keep the activations' scale, without JAX's
    initialisers, which compile for every shape."""
    rng = np.random.default_rng(seed)

    def values(path, shape, dtype):
        if dtype == np.int32:
            return rng.integers(1, 1000, shape, dtype)
        if path.endswith(("scale", "var")):
            return rng.uniform(0.5, 1.5, shape).astype(dtype)
        scale = np.prod(shape[:-1]) ** -0.5 if path.endswith("kernel") else 0.2
        return rng.normal(0, scale, shape).astype(dtype)

    shapes = parameters(module).items()
    return fill(module, {path: values(path, v.shape, v.dtype) for path, v in shapes})


@pytest.fixture(scope="session")
def random_backbone():
    """`load_backbone` with random weights, in no time."""

    def load(name, seed=0, **config):
        return randomised(nnx.eval_shape(lambda: load_backbone(name, **config)), seed)

    return load


@pytest.fixture
def make_run(random_backbone, tmp_path):
    """Writes a run with random weights, those of its backbone in a file beside it."""

    def make(folder, backbone="vit", *, step=5, **fields):
        if backbone == "vit":
            fields.setdefault("backbone_config", {**TINY_VIT, "num_classes": 7})
        weights = tmp_path / "weights.safetensors"
        config = TrainConfig(backbone=backbone, output=folder, weights=str(weights), **fields)
        model = random_backbone(backbone, **config.backbone_config)
        save_backbone(model, weights)
        attention = randomised(nnx.eval_shape(lambda: build_attention(config, model)), seed=1)
        save_attention(folder, attention, step)
        config.save()
        return config

    return make

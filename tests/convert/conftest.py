import pytest
from flax import nnx
from random_weights import randomised

from ttame_jax.config import TrainConfig
from ttame_jax.runs import build_attention, save_attention
from ttame_jax.weights import save_backbone

TINY_VIT = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 4, "num_heads": 2}


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
        save_attention(folder, attention, step, config)
        config.save()
        return config

    return make

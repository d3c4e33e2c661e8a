"""The smallest ViT that has three blocks to explain; for `load_backbone("vit", **TINY)`."""

from pathlib import Path
from typing import Any

from ttame_jax.config import TrainConfig

TINY = {
    "image_size": 32,
    "patch_size": 8,
    "width": 32,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 5,
}


def training(dataset: str, output: Path, **fields: Any) -> TrainConfig:
    """Its training."""
    return TrainConfig(
        backbone="vit",
        backbone_config=TINY,
        weights=None,
        dataset=dataset,
        output=output,
        workers=0,
        **fields,
    )

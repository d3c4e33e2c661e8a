"""A small ViT for the built-in data set of digits; `make demo` runs it.

ttame train --backbone digits_vit --weights digits_vit.safetensors
"""

from pathlib import Path

from ttame_jax.config import TrainConfig

CONFIG = TrainConfig(
    backbone="digits_vit",
    output=Path("runs/digits_vit"),
    dataset="digits",
    flip=False,  # mirrored digits are other digits
    epochs=2,
    learning_rate=4e-3,
)

"""SqueezeNet 1.0, started from its own head: with few images the paper's start learns too little.

python train.py --backbone squeezenet1_0
"""

from pathlib import Path

from ttame_jax.training.config import TrainConfig

CONFIG = TrainConfig(
    backbone="squeezenet1_0",
    output=Path("runs/squeezenet1_0"),
    start="head",
    epochs=3,
    learning_rate=2e-3,
)

"""SqueezeNet 1.0, initialised from its head: the paper's random start needs more images.

python train.py --backbone squeezenet1_0
"""

from pathlib import Path

from ttame_jax.config import TrainConfig

CONFIG = TrainConfig(
    backbone="squeezenet1_0",
    output=Path("runs/squeezenet1_0"),
    start="head",
    epochs=3,
    learning_rate=2e-3,
)

"""VGG-16 in the paper's setting: torchvision's ImageNet weights, eight epochs at batch 32.

python train.py --backbone vgg16
"""

from pathlib import Path

from ttame_jax.config import TrainConfig

CONFIG = TrainConfig(backbone="vgg16", output=Path("runs/vgg16"))

"""ResNet-50 in the paper's setting: torchvision's ImageNet weights, eight epochs at batch 32.

python train.py --backbone resnet50
"""

from pathlib import Path

from ttame_jax.config import TrainConfig

CONFIG = TrainConfig(backbone="resnet50", output=Path("runs/resnet50"))

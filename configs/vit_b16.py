"""ViT-B-16 in the paper's setting: torchvision's ImageNet weights, eight epochs at batch 32.

python train.py --backbone vit_b16
"""

from pathlib import Path

from ttame_jax.config import TrainConfig

CONFIG = TrainConfig(backbone="vit_b16", output=Path("runs/vit_b16"))

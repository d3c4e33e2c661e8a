"""A small ViT for CIFAR-10, in timm's layout (image 32, patch 4, width 128, depth 6, 4 heads).

python train.py --backbone vit_cifar10 --weights vit_cifar10.safetensors --dataset folder:DIR
"""

from pathlib import Path

from ttame_jax.training.config import TrainConfig

CONFIG = TrainConfig(
    backbone="vit",
    backbone_config={
        "image_size": 32, "patch_size": 4, "width": 128, "depth": 6, "num_heads": 4, "num_classes": 10
    },
    output=Path("runs/vit_cifar10"),
)

"""The smallest ViT that has three blocks to explain; for `load_backbone("vit", **TINY)`."""

TINY = {
    "image_size": 32,
    "patch_size": 8,
    "width": 32,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 5,
}

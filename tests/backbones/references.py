"""The real torchvision and timm modules, with random weights that leave no term at zero."""

import math

import numpy as np
import torch
from running import run

from ttame_jax.backbones import family_of
from ttame_jax.convert.pytorch.checkpoints import numpy_state
from ttame_jax.convert.pytorch.torch_import import import_torchvision
from ttame_jax.convert.timm_table import randomise
from ttame_jax.weights import abstract_backbone, timm_models
from ttame_jax.weights.backbones import published
from ttame_jax.weights.transfer import fill, to_flax, to_torch

TINY_VIT = {"image_size": 48, "patch_size": 8, "width": 96, "depth": 4, "num_heads": 3}
CARD = {
    "input_size": (3, 64, 64),
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.25, 0.5),
}
"""The pretrained configuration of a module of timm's that has no name."""


def create(name: str, library: str, **options) -> torch.nn.Module:
    """torchvision's or timm's module of a backbone, in inference mode."""
    torchvision = import_torchvision()
    if library == "torchvision":
        model = torchvision.models.get_model(published("torchvision")[name], **options)
    else:
        import timm

        model = timm.create_model(published("timm")[name].partition(".")[0], **options)
    return model.eval()


def create_free_vit(library: str, num_classes: int = 10) -> torch.nn.Module:
    """A small ViT with the sizes of `TINY_VIT`."""
    size, patch, width, depth, heads = TINY_VIT.values()
    torchvision = import_torchvision()
    if library == "torchvision":
        return torchvision.models.VisionTransformer(
            size, patch, depth, heads, width, 4 * width, num_classes=num_classes
        ).eval()
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        size, patch, embed_dim=width, depth=depth, num_heads=heads, num_classes=num_classes
    ).eval()


def described(module: torch.nn.Module, **config):
    """Our abstract backbone, built from a module of timm's alone."""
    module.pretrained_cfg = CARD
    return abstract_backbone("timm:any", **{**timm_models.read(module, "timm:any"), **config})


def load(module: torch.nn.Module, **config):
    """Our backbone, built and filled from a module of timm's alone."""
    backbone = described(module, **config)
    return fill(backbone, to_flax(backbone, numpy_state(module.state_dict())))


def images(height: int, width: int | None = None, count: int = 2) -> np.ndarray:
    """[count, height, width, 3] with structure at several scales, roughly standardised."""
    rng = np.random.default_rng(1)
    shape = (count, height, width or height, 3)
    coarse = np.kron(rng.normal(size=(count, 4, 4, 3)), np.ones((1, 80, 80, 1)))
    return (coarse[:, : shape[1], : shape[2]] + rng.normal(size=shape)).astype(np.float32)


def outputs(
    model: torch.nn.Module,
    nodes: list[str],
    x: np.ndarray,
    prefix: int = 1,
    channels_last: bool = False,
) -> list[np.ndarray]:
    """Logits, then the outputs of the named modules as [B, H, W, C], of images [B, H, W, 3]."""
    found = {}

    def keep(node):
        return lambda module, args, output: found.__setitem__(node, output.clone())

    hooks = [model.get_submodule(node).register_forward_hook(keep(node)) for node in nodes]
    with torch.no_grad():
        logits = model(torch.from_numpy(x).permute(0, 3, 1, 2))
    for hook in hooks:
        hook.remove()
    return [logits.numpy(), *(spatial(found[node], prefix, channels_last) for node in nodes)]


def spatial(feature: torch.Tensor, prefix: int = 1, channels_last: bool = False) -> np.ndarray:
    """[B, C, H, W], a ViT's [B, prefix + N, C], or what it is already, as [B, H, W, C]."""
    if feature.ndim == 4:
        return (feature if channels_last else feature.permute(0, 2, 3, 1)).numpy()
    side = math.isqrt(feature.shape[1] - prefix)
    return feature[:, prefix:].reshape(len(feature), side, side, -1).numpy()


def assert_close(ours, theirs: np.ndarray) -> None:
    """Within 1e-5 of the largest reference value, and the reference is worth comparing with."""
    assert ours.shape == theirs.shape
    assert theirs.std() > 1e-2 * np.abs(theirs).max()
    assert np.abs(np.asarray(ours) - theirs).max() <= 1e-5 * np.abs(theirs).max()


def check(
    backbone,
    module: torch.nn.Module,
    nodes: list[str],
    x: np.ndarray,
    prefix: int = 1,
    channels_last: bool = False,
) -> None:
    """Our logits and feature maps are the module's."""
    logits, features = run(backbone, x)
    expected = outputs(module, nodes, x, prefix, channels_last)
    for ours, theirs in zip((logits, *features), expected, strict=True):
        assert_close(ours, theirs)


def check_round_trip(backbone, module: torch.nn.Module, library: str) -> None:
    """Back in PyTorch's layout, every tensor has the bytes it came with."""
    back, state = to_torch(backbone, library), numpy_state(module.state_dict())
    assert back.keys() == state.keys()
    for key, value in state.items():
        assert back[key].dtype == value.dtype and np.array_equal(back[key], value), key


def equal(
    backbone,
    module: torch.nn.Module,
    nodes: list[str],
    x: np.ndarray,
    library: str = "timm",
    prefix: int = 1,
):
    """An abstract backbone with a module's weights, which are random here, computes what the module
    computes, and gives the weights back as they were."""
    fill(backbone, to_flax(backbone, numpy_state(randomise(module).state_dict())))
    check(backbone, module, nodes, x, prefix, family_of(backbone).libraries[library].channels_last)
    check_round_trip(backbone, module, library)
    return backbone

"""Compares this project with PyTorch: maximum differences on random images."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from ttame_jax.attention import AttentionMechanism
from ttame_jax.backbones import Backbone
from ttame_jax.errors import Failure
from ttame_jax.methods import TTAME
from ttame_jax.runs import load_run
from ttame_jax.weights import load_backbone
from ttame_jax.weights.backbones import parts_of

from .export import explainer_config, torch_explainer
from .modules import libraries
from .pytorch import import_torch

CLASSES = 3
"""Number of the most probable classes whose maps are compared."""


def verify(
    target: str,
    weights: str | None = None,
    *,
    library: str | None = None,
    tolerance: float = 1e-4,
    images: int = 2,
) -> Iterator[str]:
    """Compares a run or a backbone with PyTorch's computation, in float32.

    Args:
      target: a run's folder, or a backbone's name.
      weights: of the backbone; a run's own by default.
      library: torchvision or timm; by default each that has the backbone.
      tolerance: largest difference allowed, relative to the largest value for logits and
        features, absolute for maps (in [0, 1]).
      images: number of random images.

    Yields:
      One line for each library.

    Raises:
      ValueError: no library has the backbone, or `images` or `tolerance` is not positive.
      Failure: a difference exceeds the tolerance.
      ImportError: PyTorch is not installed.
    """
    if images < 1:
        raise ValueError(f"--images must be at least 1, not {images}")
    import_torch("verify")
    if not tolerance > 0:
        raise ValueError(f"--tolerance must be positive, not {tolerance}")
    if Path(target).is_dir():
        run = load_run(Path(target), weights, precision="float32")
        backbone, attention = run.backbone, run.attention
    elif "/" in target and not parts_of(target):
        raise FileNotFoundError(f"there is no run {target}")
    else:
        backbone, attention = load_backbone(target, weights), None
    known = [library] if library else libraries(backbone)
    if not known:
        raise ValueError(f"neither torchvision nor timm has a model of {backbone.name}")
    for name in known:
        found = differences(backbone, attention, name, images)
        yield f"{name:<12}" + "  ".join(f"{what} {value:.1e}" for what, value in found.items())
        above = {what: value for what, value in found.items() if not value <= tolerance}
        if above:
            worst = max(above, key=above.__getitem__)
            raise Failure(
                f"{target} differs from {name}: {worst} by {above[worst]:.1e}, "
                f"above the tolerance of {tolerance:g}"
            )


def differences(
    backbone: Backbone,
    attention: AttentionMechanism | None,
    library: str,
    count: int = 2,
    size: int | None = None,
) -> dict[str, float]:
    """Maximum differences from the library's module with the same weights, on random images.

    Args:
      backbone: the classifier.
      attention: its attention mechanism; None compares no maps.
      library: torchvision or timm.
      count: number of images.
      size: their height and width; None is the size of the preprocessing.

    Returns:
      Relative to the largest value for logits and features; absolute for maps.
    """
    import torch

    shown = attention is not None
    if attention is None:  # any mechanism reads the features
        channels = [shape[-1] for shape in backbone.feature_shapes()]
        attention = AttentionMechanism(channels, backbone.num_classes, rngs=nnx.Rngs(0))
    module: Any = torch_explainer(
        backbone, attention, explainer_config(backbone, attention, library)
    )
    images = random_images(size or backbone.preprocessing.image_size, count)
    with jax.default_matmul_precision("highest"):
        logits, features = _forward(backbone, images)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    standardised = (pixels - module.mean) / module.std
    with torch.no_grad():
        their_logits, their_features = module.features(standardised)
    found = {"logits": _relative(logits, their_logits.numpy())}
    read = features[attention.first_layer :]
    for i, (feature, theirs) in enumerate(zip(read, their_features, strict=True), 1):
        found[f"features {i}"] = _relative(feature, theirs.permute(0, 2, 3, 1).numpy())
    if shown:
        with jax.default_matmul_precision("highest"):
            ours = _explain(TTAME(backbone, attention), images)
        with torch.no_grad():
            _, maps = module(pixels, torch.from_numpy(np.array(ours.classes, np.int64)))
        found["maps"] = float(np.abs(np.asarray(ours.maps) - maps.numpy()).max())
    return found


@nnx.jit
def _forward(backbone, images):
    return backbone(backbone.preprocessing.standardise(images))


@nnx.jit
def _explain(method, images):
    return method.explain(images, likeliest=min(CLASSES, method.backbone.num_classes))


def _relative(ours, theirs: np.ndarray) -> float:
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def random_images(size: int, count: int) -> np.ndarray:
    """[count, size, size, 3] in [0, 1], with structure at several scales."""
    rng = np.random.default_rng(0)
    images = np.zeros((count, size, size, 3))
    for cells in (2, 7, size):
        side = -(-size // cells)
        coarse = rng.uniform(size=(count, cells, cells, 3))
        images += coarse.repeat(side, axis=1).repeat(side, axis=2)[:, :size, :size]
    return (images / 3).astype(np.float32)

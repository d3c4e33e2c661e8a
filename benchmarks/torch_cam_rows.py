"""Grad-CAM and Layer-CAM in the protocol of torch-cam's published figures, as JSON.

    python benchmarks/torch_cam_rows.py --dataset folder:IMAGENETTE --split val

torch-cam's README gives AD and IC on the validation set of Imagenette. Its protocol differs from the
paper's: the maps are computed from the gradients of probabilities, not of logits, they are divided by
their maximum plus 1e-8, and masked pixels have the mean colour.
"""

from collections.abc import Callable
from dataclasses import dataclass

import common  # before JAX
import jax
import jax.numpy as jnp
import tyro

from ttame_jax.backbones import Backbone
from ttame_jax.data import load_source, select
from ttame_jax.methods.cam import CAM
from ttame_jax.metrics import Evaluator
from ttame_jax.weights import load_backbone

PUBLISHED = {
    ("resnet18", "GradCAM"): {"AD": 26.86, "IC": 22.50},
    ("resnet18", "LayerCAM"): {"AD": 17.12, "IC": 28.19},
    ("mobilenet_v3_large", "GradCAM"): {"AD": 26.78, "IC": 34.83},
    ("mobilenet_v3_large", "LayerCAM"): {"AD": 25.26, "IC": 28.82},
}
"""The README of torch-cam 0.5, in %."""


def gradcam_weights(gradients: jax.Array) -> jax.Array:
    return gradients.mean((2, 3), keepdims=True)


METHODS = {"GradCAM": gradcam_weights, "LayerCAM": jax.nn.relu}
"""The weights of activations ``[B, h, w, C]`` from their gradients ``[B, K, h, w, C]``."""


class TorchCAM(CAM):
    """A CAM method with torch-cam's gradients and scaling."""

    def __init__(self, backbone: Backbone, weights: Callable[[jax.Array], jax.Array]):
        super().__init__(backbone)
        self.weights = weights

    def split(self):
        before, after = super().split()

        def probabilities(state, classes=None):
            values = jax.nn.softmax(after(state))
            return values if classes is None else jnp.take(values, classes, axis=-1)

        return before, probabilities

    def __call__(self, images, classes):
        activations, gradients = self.activations_and_gradients(images, classes)
        maps = jax.nn.relu((activations[:, None] * self.weights(gradients)).sum(-1))
        maps -= maps.min((-2, -1), keepdims=True)
        # The gradients of a probability close to 1 vanish, and the map is then close to 0.
        return maps / (maps.max((-2, -1), keepdims=True) + 1e-8)


@dataclass(frozen=True)
class Options:
    """The images and the classifiers."""

    dataset: str = "imagenette"
    """A TFDS data set or folder:DIR."""
    split: str = "validation"
    """Split to measure on."""
    data_dir: str | None = None
    """Folder of the prepared TFDS data sets."""
    backbones: tuple[str, ...] = ("resnet18", "mobilenet_v3_large")
    """Classifiers by name."""
    weights: str = "torchvision"
    """Their weights."""
    limit: int | None = None
    """The largest number of images; they are evenly spaced in the split."""
    batch_size: int = 32
    """Images per batch, over all devices."""


def run(options: Options) -> dict:
    source = load_source(options.dataset, options.split, options.data_dir)
    indices = select(source, None, options.limit)
    rows = []
    for name in options.backbones:
        backbone = load_backbone(name, options.weights)
        for method, weights in METHODS.items():
            evaluator = Evaluator(
                TorchCAM(backbone, weights),
                source,
                masking="standardised",
                indices=indices,
                batch_size=options.batch_size,
            )
            figures = evaluator.figures()
            measured = {key: figures[f"{key}_100"] for key in ("AD", "IC")}
            published = PUBLISHED.get((name, method))
            rows.append({"backbone": name, "method": method, **measured, "published": published})
    return {"images": len(indices), "rows": rows}


if __name__ == "__main__":
    common.main(run, tyro.cli(Options, description=__doc__))

"""Seconds per image of explanation methods, here and in pytorch-grad-cam, as JSON.

    python benchmarks/methods.py --backbone squeezenet1_0 --images ILSVRC2012_img_val.tar

Both explain the same images with the same weights in one process. The results include the
difference of the maps (scaled to [0, 1], at the size of the image). Methods that the package does
not have are timed alone.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[1]))  # also without installing the project

from benchmarks.road import load_images
from ttame_jax.backbones import Backbone, family_of
from ttame_jax.convert.modules import module_config
from ttame_jax.convert.pytorch.torch_import import import_torchvision
from ttame_jax.masking import min_max_scale, upsample
from ttame_jax.methods import Method, load_method
from ttame_jax.weights import load_backbone
from ttame_jax.weights.transfer import to_torch

CAMS = ("gradcam", "gradcam++", "layercam", "scorecam", "ablationcam")
RECIPES = {"gradcam++": {"recipe": "reference"}, "scorecam": {"recipe": "reference"}}


@dataclass(frozen=True)
class Options:
    backbone: str = "squeezenet1_0"
    weights: str | None = None
    """File of its weights; random ones without it."""
    methods: tuple[str, ...] = CAMS
    """Which methods; the package has the CAM methods."""
    images: Path | None = None
    """A folder or tar file of images; two sample photographs of scikit-learn without it."""
    limit: int = 4
    """Number of images, explained as one batch."""
    rounds: int = 3
    """Timings of each, in turn; medians count."""
    image_size: int = 224
    """Side of the images."""
    package: bool = True
    """Measure pytorch-grad-cam as well."""


def main(options: Options) -> None:
    backbone = load_backbone(options.backbone, options.weights, image_size=options.image_size)
    images = load_images(options.images, options.limit, options.image_size)
    classes = np.asarray(nnx.jit(lambda backbone, x: backbone(x)[0].argmax(-1))(backbone, images))
    model = torch_model(backbone) if options.package else None
    for name in options.methods:
        method = load_method(name, backbone, **RECIPES.get(name, {}))
        print(json.dumps(measure(method, model, images, classes, options.rounds)), flush=True)


def measure(method: Method, model, images: np.ndarray, classes: np.ndarray, rounds: int) -> dict:
    """Times a method on standardised images ``[B, H, W, 3]``, and the package's beside it."""
    runs = {"seconds_per_image": lambda: our_maps(method, images, classes)}
    if model is not None and method.name in CAMS:
        theirs = package_cam(method.name, model, method.backbone)
        runs["package_seconds_per_image"] = lambda: theirs(images, classes)
    maps = {name: run() for name, run in runs.items()}  # compiles
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) / len(images))
    medians = {name: float(np.median(values)) for name, values in times.items()}
    result = {
        "method": method.name,
        "backbone": method.backbone.name,
        "device": jax.devices()[0].device_kind,
        "cpu_cores": os.cpu_count(),
        "images": len(images),
        "forward_passes": method.forward_passes,
        **medians,
    }
    if len(runs) == 2:
        ours, theirs = maps.values()
        result["ratio"] = medians["package_seconds_per_image"] / medians["seconds_per_image"]
        result |= agreement(ours, theirs)
    return result


def agreement(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """The worst image's largest difference and Pearson correlation."""
    pairs = list(zip(ours, theirs))
    return {
        "largest_difference": max(float(np.abs(a - b).max()) for a, b in pairs),
        "correlation": min(float(np.corrcoef(a.ravel(), b.ravel())[0, 1]) for a, b in pairs),
    }


@nnx.jit
def _our_maps(method, images, classes):
    preprocessing = method.backbone.preprocessing
    images = images * jnp.array(preprocessing.std) + jnp.array(preprocessing.mean)
    maps = method(images, classes[:, None])[:, 0]
    return min_max_scale(upsample(maps, images.shape[1:3]))


def our_maps(method: Method, images: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Maps ``[B, H, W]`` in [0, 1] for a class ``[B]`` of each standardised image."""
    return np.asarray(_our_maps(method, images, classes))


def torch_model(backbone: Backbone):
    """torchvision's module with the backbone's weights."""
    import_torchvision()
    import torch

    from ttame_jax.convert.standalone import create_backbone

    model = create_backbone(module_config(backbone, "torchvision"))
    tensors = to_torch(backbone, "torchvision")
    model.load_state_dict({key: torch.from_numpy(np.array(x)) for key, x in tensors.items()})
    return model.eval()


def package_cam(name: str, model, backbone: Backbone) -> Callable:
    """``(standardised images [B, H, W, 3], classes [B]) -> maps [B, H, W]`` by the package.

    Ablation-CAM sets a ViT's channels to zero, as its paper says; the package's own layer takes
    1e7 off the lowest value, once more for every image of a batch.
    """
    import_torchvision()
    import pytorch_grad_cam as package
    import torch
    from pytorch_grad_cam.ablation_layer import AblationLayer, AblationLayerVit
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    class Zeroed(AblationLayerVit):
        def __call__(self, x):
            for i in range(len(self.activations)):
                # pyrefly: ignore[bad-index]  # an array, for which NumPy's stub has a number
                self.activations[i, ..., self.indices[i]] = 0
            return self.activations

    torchvision = family_of(backbone).torchvision
    assert torchvision is not None  # it has built the model
    tokens = backbone.prefix_tokens > 0 or torchvision.channels_last
    cls = {
        "gradcam": package.GradCAM,
        "gradcam++": package.GradCAMPlusPlus,
        "layercam": package.LayerCAM,
        "scorecam": package.ScoreCAM,
        "ablationcam": package.AblationCAM,
    }[name]
    options: dict[str, Any] = {"reshape_transform": _as_places} if tokens else {}
    if name == "ablationcam":
        options["ablation_layer"] = Zeroed() if tokens else AblationLayer()
    layer = model.get_submodule(torchvision.target_node(backbone))

    def run(images, classes):
        # The package calls its targets modules, and takes any function.
        targets: list[Any] = [ClassifierOutputTarget(int(label)) for label in classes]
        with cls(model, [layer], **options) as cam:
            return cam(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), targets)

    return run


def _as_places(tokens):
    """A ViT's [B, 1 + N, D] as [B, D, sqrt N, sqrt N], or a Swin's [B, H, W, D] as [B, D, H, W]."""
    if tokens.ndim == 4:
        return tokens.permute(0, 3, 1, 2)
    side = round((tokens.shape[1] - 1) ** 0.5)
    return tokens[:, 1:].transpose(1, 2).reshape(len(tokens), -1, side, side)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

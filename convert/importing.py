"""Imports any PyTorch classifier: `ttame convert import`."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ttame_jax.backbones.imported import ImportedBackbone
from ttame_jax.errors import Failure
from ttame_jax.files import check_output_file, read_safetensors
from ttame_jax.preprocessing import IMAGENET, Preprocessing
from ttame_jax.weights import module_files
from ttame_jax.weights.backbones import TIMM
from ttame_jax.weights.imported import SUFFIX, save_imported

from .pytorch import checkpoints, import_torch, timm
from .pytorch.graph import outputs_of, read

RANDOM = "random"
"""The weights with which timm initialises a model."""

TOLERANCE = 1e-4
"""Largest difference from PyTorch, relative to the largest value."""

ROUNDINGS = 4
"""How many times PyTorch's own rounding error a difference may be, if that is more."""


def import_model(
    model: str,
    output: Path,
    *,
    weights: str | None = None,
    image_size: int | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    features: Sequence[str] | None = None,
    prefix_tokens: int | None = None,
    class_names: Sequence[str] | None = None,
) -> list[str]:
    """Imports a classifier, compares it with PyTorch and writes it.

    Args:
      model: "timm:MODEL", or "FILE.py:FUNCTION" for a function without arguments that returns an
        `nn.Module`. Importing the file runs its code.
      output: the file to write, `.safetensors`.
      weights: a file of a state dict. None is timm's published weights, or those that the function
        sets; "random" is timm's initialisation.
      image_size: height and width of the input, if they are not the model's own or 224.
      mean: of the standardisation, if it is not the model's own or ImageNet's.
      std: likewise.
      features: see `graph.read`.
      prefix_tokens: see `graph.read`.
      class_names: one for each class.

    Returns:
      Lines about what was written.

    Raises:
      ValueError: the model cannot be imported; the message says why.
      FileNotFoundError: a file does not exist, or the weights cannot be downloaded.
      Failure: JAX computes something else than PyTorch.
      ImportError: PyTorch or timm is not installed.
    """
    import_torch("convert import")
    if output.suffix != SUFFIX:
        raise ValueError(f"--output must end in {SUFFIX}, not {output.name}")
    if image_size is not None and image_size < 1:
        raise ValueError(f"--image-size must be at least 1, not {image_size}")
    if features and len({*features}) < len(features):
        raise ValueError("--features has a module twice")
    check_output_file(output)
    module, preprocessing = load_module(model, weights, image_size)
    preprocessing = dataclasses.replace(
        preprocessing, mean=mean or preprocessing.mean, std=std or preprocessing.std
    )
    description, tensors = read(module, model, preprocessing, features, prefix_tokens)
    names = None if class_names is None else tuple(class_names)
    description = dataclasses.replace(description, class_names=names)
    backbone = ImportedBackbone(str(output), description, tensors)
    found, own = _checked_differences(backbone, module, model)
    save_imported(backbone, output, model)
    return _report(backbone, output, model, found, own)


def _checked_differences(
    backbone: ImportedBackbone, module, model: str
) -> tuple[dict[str, float], dict[str, float]]:
    """The differences from PyTorch, and PyTorch's own rounding, if they are above `TOLERANCE`.

    Raises:
      Failure: they cannot be explained by rounding.
    """
    found = differences(backbone, module)
    if not _exceeds(found, TOLERANCE):
        return found, {}
    own = rounding(backbone, module)
    for what, value in found.items():
        allowed = max(TOLERANCE, ROUNDINGS * own[what])
        if not value <= allowed:  # NaN is not
            raise Failure(
                f"{model} in JAX differs from PyTorch: {what} by {value:.1e}, above {allowed:.1e}; "
                "nothing was written"
            )
    return found, own


def _report(
    backbone: ImportedBackbone,
    output: Path,
    model: str,
    found: Mapping[str, float],
    own: Mapping[str, float],
) -> list[str]:
    """Lines about a written classifier."""
    size = backbone.preprocessing.image_size
    count = sum(value.size for value in jax.tree.leaves(nnx.state(backbone)))
    maps = (
        f"{name} {'x'.join(map(str, shape))}"
        for name, shape in zip(backbone.feature_layers, backbone.feature_shapes())
    )
    return [
        f"{output}: {model}, {count:,} values, {backbone.num_classes} classes, {size}x{size} pixels",
        f"feature maps: {', '.join(maps)}",
        f"layer of CAM methods: {backbone.target_layer}",
        f"differences from PyTorch: {_listed(found)}",
        *(
            f"float32 itself differs from float64 in PyTorch: {what} by {value:.1e}"
            for what, value in own.items()
            if value > TOLERANCE
        ),
    ]


def _listed(differences: Mapping[str, float]) -> str:
    return ", ".join(f"{what} {value:.1e}" for what, value in differences.items())


def load_module(
    model: str, weights: str | None = None, image_size: int | None = None
) -> tuple[Any, Preprocessing]:
    """A PyTorch module with its weights, and its preprocessing. See `import_model`."""
    if model.startswith(TIMM):
        return _from_timm(model.removeprefix(TIMM), weights, image_size)
    import torch

    file = module_files.parse(model)
    if file is None:
        raise ValueError(f"{model!r} is neither timm:MODEL nor FILE.py:FUNCTION")
    path, function = file
    if weights == RANDOM:
        raise ValueError(f"--weights {RANDOM} is for timm:MODEL: {function} sets its own")
    module = module_files.call(path, function, {})
    if not isinstance(module, torch.nn.Module):
        raise ValueError(  # noqa: TRY004
            f"{path}: {function} must return an nn.Module, not a {type(module).__name__}"
        )
    if weights is not None:
        _load_weights(module, Path(weights), model)
    return module, IMAGENET.resized(image_size or IMAGENET.image_size)


def _from_timm(model: str, weights: str | None, image_size: int | None):
    options: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    try:
        module = timm.create(model, **options)
    except TypeError:  # it takes images of any size
        module = timm.create(model)
    pretrained: Any = module.pretrained_cfg
    preprocessing = Preprocessing(**timm.preprocessing(pretrained))
    if weights is None:
        path, described = timm.weights(model)
        preprocessing = Preprocessing(**described["preprocessing"])
        _load_weights(module, path, model)
    elif weights != RANDOM:
        _load_weights(module, Path(weights), model)
    return module, preprocessing.resized(image_size) if image_size else preprocessing


def _load_weights(module, path: Path, model: str) -> None:
    """Sets the state dict of a module. No code in the file is run."""
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}")
    safe = path if path.suffix == SUFFIX else checkpoints.converted(path)
    tensors, _ = read_safetensors(safe)
    try:
        module.load_state_dict(checkpoints.torch_state(tensors))
    except RuntimeError as error:
        reason = " ".join(str(error).partition("\n")[2].split())[:200]
        raise ValueError(f"{path} does not fit {model}: {reason}") from None


def differences(
    backbone: ImportedBackbone, module, sizes: Sequence[int] = (1, 3)
) -> dict[str, float]:
    """Largest differences from PyTorch on random images, relative to the largest value.

    Args:
      backbone: the imported classifier.
      module: the module that it was imported from.
      sizes: of the batches.

    Returns:
      By name: "logits" and the names of the feature maps.
    """
    size = backbone.preprocessing.image_size
    found = dict.fromkeys(("logits", *backbone.feature_layers), 0.0)
    for count in sizes:
        images = np.random.default_rng(count).standard_normal((count, size, size, 3), np.float32)
        with jax.default_matmul_precision("highest"):
            logits, features = _forward(backbone, images)
        expected = reference(backbone, module, images)
        for name, ours, theirs in zip(found, (logits, *features), expected, strict=True):
            found[name] = float(np.maximum(found[name], relative(ours, theirs)))  # keeps NaN
    return found


def rounding(backbone: ImportedBackbone, module, count: int = 3) -> dict[str, float]:
    """PyTorch's largest differences between float32 and float64, as `differences` has them."""
    size = backbone.preprocessing.image_size
    images = np.random.default_rng(count).standard_normal((count, size, size, 3), np.float32)
    single = reference(backbone, module, images)
    try:
        double = reference(backbone, module.double(), images.astype(np.float64))
    except RuntimeError:  # a module that computes in float32 only
        double = single
    finally:
        module.float()
    names = ("logits", *backbone.feature_layers)
    return {name: relative(a, b) for name, a, b in zip(names, single, double, strict=True)}


def _exceeds(found: Mapping[str, float], limit: float) -> bool:
    return any(not value <= limit for value in found.values())  # NaN does


@nnx.jit
def _forward(backbone, images):
    return backbone(images)


def relative(ours, theirs: np.ndarray) -> float:
    """The largest difference, relative to the largest value, if that is not 0.

    timm starts the heads of some models at 0, and so their logits.
    """
    return float(np.abs(np.asarray(ours) - theirs).max() / (np.abs(theirs).max() or 1))


def reference(backbone: ImportedBackbone, module, images: np.ndarray) -> list[np.ndarray]:
    """PyTorch's logits, and its feature maps as [B, H, W, C], of images [B, H, W, 3]."""
    import torch

    outputs, logits = outputs_of(module, torch.from_numpy(images).permute(0, 3, 1, 2))
    return [logits.numpy()] + [
        _channels_last(backbone, name, outputs[name].numpy()) for name in backbone.feature_layers
    ]


def _channels_last(backbone: ImportedBackbone, name: str, feature: np.ndarray) -> np.ndarray:
    if backbone.graph.places[name].layout == "channels_first":
        return feature.transpose(0, 2, 3, 1)
    return np.asarray(backbone.feature_map(jnp.asarray(feature)))

"""Writes docs/timm.md: which of timm's models work here.

    python -m ttame_jax.convert.timm_table

The tensors of every model are compared by name and shape. Models of up to `--limit` million
parameters are also run in both libraries, with random weights.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from ttame_jax.backbones import FAMILIES, Backbone
from ttame_jax.files import write_atomically
from ttame_jax.weights import abstract_backbone
from ttame_jax.weights.timm_models import UnsupportedModel, describe
from ttame_jax.weights.transfer import fill, parameters, to_flax, to_torch

from .pytorch.checkpoints import numpy_state
from .pytorch.timm import create
from .pytorch.torch_import import import_torchvision
from .verify import differences, random_images

HEADER = """# timm's models

`load_backbone("timm:MODEL", "timm")` takes timm's model with its own preprocessing and weights;
`ttame train --backbone timm:MODEL` trains on it. This page is written by
`python -m ttame_jax.convert.timm_table` (timm {version}), which tries every model in timm's source
files {files}.

"Difference" is the largest difference of logits and feature maps between timm and this project,
relative to the largest value, in float32 with random weights on one random image, of at most
{size}x{size} pixels for CNNs. Random weights can make a network amplify rounding errors. Where the
difference exceeded {notable:g}, BatchNorms were given the statistics of random images, and the largest
difference between float32 and float64 in PyTorch itself follows in parentheses. Models without a
figure have more than {limit:g} million parameters; their tensors agree by name and shape.

A few models (`crop_mode` squash) were trained on images squashed into a square. Here the centre
square is cropped, as for all others. Models marked with * have no classifier in timm. They need
`num_classes` and weights that have one; here they are tried with {classes} classes.
"""

SIZE = 160
"""Height and width of the largest image for models that take images of any size."""

NOTABLE = 1e-5
"""Difference above which PyTorch's own rounding error is given, too."""

CLASSES = 1000
"""Number of classes of a model that has no classifier."""


def main(output: Path = Path("docs/timm.md"), limit: float = 320, done: Path | None = None) -> None:
    """Try timm's models, print a line of JSON for each, and write the table.

    Args:
      output: The file to write.
      limit: Largest size of the models to run, in million parameters.
      done: A file of lines that an earlier call printed. Its models are not tried again.
    """
    import_torchvision()
    import timm

    files = [file for family in FAMILIES if family.timm for file in family.timm.files]
    names = sorted({name for file in files for name in timm.list_models(module=file)})
    lines = done.read_text().splitlines() if done else []
    known = {result["model"]: result for result in map(json.loads, lines)}
    for name in names:
        if name not in known:
            known[name] = survey(name, limit)
            jax.clear_caches()
        print(json.dumps(known[name]), flush=True)
    text = HEADER.format(
        version=timm.__version__,
        files=", ".join(files),
        limit=limit,
        classes=CLASSES,
        size=SIZE,
        notable=NOTABLE,
    )
    write_atomically(output, text + tables([known[name] for name in names]))


def survey(name: str, limit: float) -> dict[str, Any]:
    """What becomes of a model."""
    has_classifier = bool(create(name, device="meta").num_classes)
    try:
        config = describe(name, None if has_classifier else CLASSES)
    except UnsupportedModel as error:
        return {"model": name, "refusal": "it " + ", it ".join(error.reasons)}
    return {
        "model": name,
        "has_classifier": has_classifier,
        "image_size": config["preprocessing"]["image_size"],
        **_try(name, config, limit),
    }


def tables(results: Iterable[Mapping[str, Any]]) -> str:
    """A table of the supported models, and the names of the others by reason."""
    supported, refused = [], {}
    for result in results:
        name = result["model"]
        if "refusal" in result:
            refused.setdefault(result["refusal"], []).append(name)
            continue
        mark = "" if result["has_classifier"] else "*"
        difference = "" if result["difference"] is None else f"{result['difference']:.1e}"
        if "own" in result:
            difference += f" ({result['own']:.1e})"
        supported.append(
            f"| {name}{mark} | {result['million_parameters']:.1f} | {result['image_size']} | "
            f"{difference} |"
        )
    count = sum(map(len, refused.values()))
    lines = [
        f"\n## Supported: {len(supported)}\n",
        "| model | million parameters | input | difference |",
        "|---|---|---|---|",
        *supported,
        f"\n## Not supported: {count}\n",
        "`ttame convert import timm:MODEL` imports most of these, see [models.md](models.md).\n",
        "| reason | models |",
        "|---|---|",
        *(f"| {reason} | {', '.join(names)} |" for reason, names in refused.items()),
    ]
    return "\n".join(lines) + "\n"


def _try(name: str, config: dict, limit: float) -> dict[str, Any]:
    """Million parameters of a model, and its difference from timm's if it is run."""
    backbone = abstract_backbone(f"timm:{name}", **config)
    count = sum(math.prod(value.shape) for value in parameters(backbone).values()) / 1e6
    if count > limit:
        return {"million_parameters": count, "difference": None}
    module = randomise(create(name, config["num_classes"])).eval()
    found = {"million_parameters": count, "difference": _difference(backbone, module)}
    if found["difference"] > NOTABLE:
        images = _standardised_images(backbone)
        calibrate(module, images)
        found |= {"difference": _difference(backbone, module), "own": _rounding(module, images)}
    return found


def _difference(backbone: Backbone, module) -> float:
    """The largest difference from timm's module, whose weights the backbone gets."""
    state = numpy_state(module.state_dict())
    fill(backbone, to_flax(backbone, state))
    back = to_torch(backbone, "timm")
    if any(not np.array_equal(back[key], value) for key, value in state.items()):
        raise ValueError(f"{backbone.name} changes on the way to Flax and back")
    return float(max(differences(backbone, None, "timm", 1, _size(backbone)).values()))


def _size(backbone: Backbone) -> int:
    size = backbone.preprocessing.image_size
    return min(size, SIZE) if backbone.any_size else size


def _standardised_images(backbone: Backbone, count: int = 2):
    """Random images for PyTorch: [count, 3, H, W]."""
    import torch

    images = backbone.preprocessing.standardise(jnp.asarray(random_images(_size(backbone), count)))
    return torch.from_numpy(np.asarray(images).transpose(0, 3, 1, 2).copy())


def _rounding(module, images) -> float:
    """The largest difference of logits and last features between float32 and float64 in PyTorch."""
    import torch

    with torch.no_grad():
        single = module(images), module.forward_features(images)
        module.double()
        double = module(images.double()), module.forward_features(images.double())
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(single, double))


def calibrate(module, images) -> None:
    """Sets the statistics of BatchNorms by those of random images.

    In a network of many blocks activations otherwise grow by several orders of magnitude, and
    rounding errors with them.

    Args:
      module: with BatchNorms.
      images: [B, 3, H, W], standardised.
    """
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    def measure(norm, inputs):
        (x,) = inputs
        variance = x.var((0, 2, 3))
        norm.running_mean.copy_(x.mean((0, 2, 3)))
        norm.running_var.copy_(variance + variance.mean())  # no channel is amplified much

    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    hooks = [norm.register_forward_pre_hook(measure) for norm in norms]
    with torch.no_grad():
        module(images)
    for hook in hooks:
        hook.remove()


def randomise(module, seed: int = 0):
    """Sets random weights that keep the activations' scale, with non-trivial biases and norms."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for key, tensor in module.state_dict().items():
        if key.endswith("num_batches_tracked"):
            tensor.random_(1, 1000, generator=generator)
        elif not tensor.is_floating_point():
            continue  # indices, which are no parameters
        elif key.endswith("running_var") or (tensor.ndim == 1 and key.endswith("weight")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.ndim <= 1 or "token" in key or "pos_embed" in key:
            tensor.normal_(0, 0.2, generator=generator)
        else:
            # Gates (squeeze-and-excitation) multiply rounding errors by the size of the features.
            scale = 0.1 if ".se." in key else 1
            tensor.normal_(0, scale * math.sqrt(1.5 / tensor[0].numel()), generator=generator)
    return module


if __name__ == "__main__":
    tyro.cli(main)

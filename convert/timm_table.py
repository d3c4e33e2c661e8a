"""Writes docs/timm.md: which of timm's VGGs, ResNets and ViTs work here, each one tried.

    python -m convert.timm_table

Every model is described, and its tensors compared by name and shape. Those of up to `--limit`
million parameters are also computed in both libraries, with random weights.
"""

import functools
import math
from pathlib import Path

import numpy as np
import tyro
from flax import nnx
from tqdm import tqdm

from ttame_jax.backbones import load_backbone
from ttame_jax.files import write_atomically

from .files import numpy_state
from .timm_models import create, describe
from .torch_import import import_torchvision
from .verify import differences
from .weights import fill, parameters, to_flax, to_torch

MODULES = ("vgg", "resnet", "vision_transformer", "deit")
"""timm's files of the families that are built here."""

HEADER = """# timm's models

`load_backbone("timm:MODEL", "timm")` takes timm's model with its own preprocessing and weights;
`python train.py --backbone timm:MODEL` trains on it. This page is written by
`python -m convert.timm_table` (timm {version}), which tries every VGG, ResNet and ViT that timm
lists.

"Differs by" is the largest difference of logits and feature maps between timm and this project,
as a share of the largest value, in float32 with random weights on one random image. Models
without a figure are larger than {limit:g} million parameters: their tensors agree by name and
shape. A few (`crop_mode` squash) were trained on images squashed into a square; here, as for all
others, the centre square is cut out.
"""


def main(output: Path = Path("docs/timm.md"), limit: float = 30) -> None:
    """Try timm's models and write the table.

    Args:
      output: The file to write.
      limit: Compute models of up to so many million parameters.
    """
    import_torchvision()
    import timm

    names = sorted({name for module in MODULES for name in timm.list_models(module=module)})
    supported, refused = [], {}
    for name in tqdm(names):
        try:
            config = describe(name)
        except ValueError as error:
            reason = str(error).partition("not supported: ")[2].partition(" (VGGs")[0]
            refused.setdefault(reason, []).append(name)
            continue
        millions, difference = _try(name, config, limit)
        size = config["preprocessing"]["image_size"]
        supported.append(f"| {name} | {millions:.1f} | {size} | {difference} |")
    text = HEADER.format(version=timm.__version__, limit=limit) + tables(supported, refused)
    write_atomically(output, text)


def tables(supported: list[str], refused: dict[str, list[str]]) -> str:
    """Rows of the models that work; names of those that do not, by the reason."""
    count = sum(map(len, refused.values()))
    lines = [
        f"\n## Supported: {len(supported)}\n",
        "| model | million parameters | input | differs by |",
        "|---|---|---|---|",
        *supported,
        f"\n## Not supported: {count}\n",
        "| because | models |",
        "|---|---|",
        *(f"| {reason} | {', '.join(names)} |" for reason, names in refused.items()),
    ]
    return "\n".join(lines) + "\n"


def _try(name: str, config: dict, limit: float) -> tuple[float, str]:
    """Million parameters of a model, and its difference from timm's where it is computed."""
    backbone = nnx.eval_shape(functools.partial(load_backbone, f"timm:{name}", **config))
    count = sum(math.prod(value.shape) for value in parameters(backbone).values()) / 1e6
    if count > limit:
        return count, ""
    state = numpy_state(randomise(create(name)).state_dict())
    fill(backbone, to_flax(backbone, state))
    back = to_torch(backbone, "timm")
    if any(not np.array_equal(back[key], value) for key, value in state.items()):
        raise ValueError(f"{name} does not come back as it went")
    return count, f"{max(differences(backbone, None, 'timm', 1).values()):.1e}"


def randomise(module, seed: int = 0):
    """Weights that keep the activations' scale, and non-trivial biases, norms and statistics."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for key, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            tensor.random_(1, 1000, generator=generator)
        elif key.endswith("running_var") or (tensor.ndim == 1 and key.endswith("weight")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.ndim == 1 or "token" in key or "pos_embed" in key:
            tensor.normal_(0, 0.2, generator=generator)
        else:
            tensor.normal_(0, math.sqrt(1.5 / tensor[0].numel()), generator=generator)
    return module


if __name__ == "__main__":
    tyro.cli(main)

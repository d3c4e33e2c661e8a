"""Imports classifiers of many families from PyTorch, and writes docs/imports.md.

    python benchmarks/imports.py --output docs/imports.md
    python benchmarks/imports.py --models timm:mixer_s16_224 timm:pvt_v2_b0

Each model has random weights. Prints one line of JSON per model: the largest differences of logits
and feature maps from PyTorch relative to the largest value, and whether the gradient of a logit is
finite, or the reason why the model cannot be imported. Models known from earlier lines of `--done`
are not tried again.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import common  # noqa: F401  makes the project importable
import jax
import numpy as np
import tyro
from flax import nnx

from ttame_jax.backbones.imported import ImportedBackbone
from ttame_jax.convert.importing import load_module, reference, relative, rounding
from ttame_jax.convert.pytorch.graph import read
from ttame_jax.convert.timm_table import randomise
from ttame_jax.files import write_atomically

MODELS = (
    "bat_resnext26ts",
    "beit_base_patch16_224",
    "cait_xxs24_224",
    "coatnet_0_rw_224",
    "convit_tiny",
    "convnextv2_atto",
    "crossvit_9_240",
    "cs3darknet_m",
    "davit_tiny",
    "deit3_small_patch16_224",
    "densenet121",
    "dm_nfnet_f0",
    "edgenext_xx_small",
    "efficientformerv2_s0",
    "efficientnet_b0",
    "efficientvit_b0",
    "eva02_tiny_patch14_224",
    "fastvit_t8",
    "focalnet_tiny_srf",
    "gcvit_xxtiny",
    "ghostnet_100",
    "gmlp_s16_224",
    "halonet26t",
    "hiera_tiny_224",
    "inception_next_atto",
    "inception_v3",
    "lambda_resnet26t",
    "levit_128s",
    "mambaout_femto",
    "maxvit_pico_rw_256",
    "mixer_s16_224",
    "mobilenetv4_conv_small",
    "mobilevit_xxs",
    "mvitv2_tiny",
    "pit_ti_224",
    "pvt_v2_b0",
    "rdnet_tiny",
    "regnety_002",
    "repvgg_a0",
    "repvit_m0_9",
    "res2net50_26w_4s",
    "resmlp_12_224",
    "resnest14d",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "tiny_vit_5m_224",
    "twins_pcpvt_small",
    "vit_relpos_small_patch16_224",
    "vit_small_patch14_dinov2",
    "volo_d1_224",
    "xcit_nano_12_p16_224",
)
"""One of timm's models of each family; `--models` takes any."""

SIZE = 128
"""Height and width of the input of models that take images of any size."""

NOTABLE = 1e-5
"""Difference above which PyTorch's own rounding error is given, too."""

HEADER = """# Imported classifiers

`ttame convert import timm:MODEL` was tried on one of timm's models of each family. This page is
written by `python benchmarks/imports.py --output docs/imports.md`.

"Logits" and "features" are the largest differences from PyTorch, relative to the largest value, in
float32 with random weights on two random images. Where one exceeds 1e-5, the largest difference
between float32 and float64 in PyTorch itself follows in parentheses: random weights can make a
network amplify rounding errors. "Gradient" tells whether the gradient of a logit with respect to the
images is finite.

"""


def survey(model: str) -> dict:
    """What becomes of a model."""
    try:
        module, preprocessing = load_module(model, "random", _size(model))
        description, tensors = read(randomise(module), model, preprocessing)
    except ValueError as error:
        return {"model": model, "refusal": " ".join(str(error).split())}
    backbone = ImportedBackbone(model, description, tensors)
    size = preprocessing.image_size
    images = np.random.default_rng(0).standard_normal((2, size, size, 3), np.float32)
    with jax.default_matmul_precision("highest"):
        gradient, ours = _forward(backbone, images)
    logits, *features = map(relative, ours, reference(backbone, module, images))
    own_logits, *own = rounding(backbone, module).values()
    return {
        "model": model,
        "parameters": sum(value.size for value in tensors.values()),
        "image_size": size,
        "feature_maps": {
            name: "x".join(map(str, feature.shape[1:]))
            for name, feature in zip(backbone.feature_layers, ours[1:])
        },
        "logits": logits,
        "features": max(features),
        "rounding_of_logits": own_logits,
        "rounding_of_features": max(own),
        "gradient_is_finite": bool(np.isfinite(gradient).all()),
    }


@nnx.jit
def _forward(backbone, images):
    """The gradient of a logit, and (logits, *features)."""

    def logit(images):
        logits, features = backbone(images)
        return logits[:, 0].sum(), (logits, *features)

    return jax.grad(logit, has_aux=True)(images)


def _size(model: str) -> int | None:
    """A small input size, if the model takes images of any size."""
    module, preprocessing = load_module(model, "random")
    fixed = not module.pretrained_cfg.get("fixed_input_size")
    return SIZE if fixed and preprocessing.image_size > SIZE and _takes(module, SIZE) else None


def _takes(module, size: int) -> bool:
    import torch

    try:
        with torch.no_grad():
            module(torch.zeros(1, 3, size, size))
    except Exception:  # noqa: BLE001  whatever the module's code raises
        return False
    return True


def table(results: Iterable[dict]) -> str:
    """The page of `HEADER`."""
    imported, refused = [], []
    for result in results:
        if "refusal" in result:
            refused.append(f"| {result['model']} | {result['refusal']} |")
            continue
        maps = ", ".join(f"`{name}` {shape}" for name, shape in result["feature_maps"].items())
        finite = "finite" if result["gradient_is_finite"] else "not finite"
        imported.append(
            f"| {result['model']} | {result['parameters'] / 1e6:.1f} | {result['image_size']} | "
            f"{maps} | {_figure(result, 'logits')} | {_figure(result, 'features')} | {finite} |"
        )
    lines = [
        f"## Imported: {len(imported)}\n",
        "| model | million values | input | feature maps | logits | features | gradient |",
        "|---|---|---|---|---|---|---|",
        *imported,
        f"\n## Refused: {len(refused)}\n",
    ]
    if refused:
        lines += ["| model | reason |", "|---|---|", *refused]
    return HEADER + "\n".join(lines) + "\n"


def _figure(result: dict, what: str) -> str:
    """A difference, and PyTorch's own rounding if it is large."""
    own = f" ({result[f'rounding_of_{what}']:.1e})" if result[what] > NOTABLE else ""
    return f"{result[what]:.1e}{own}"


def main(
    models: tuple[str, ...] = tuple(f"timm:{name}" for name in MODELS),
    output: Path | None = None,
    done: Path | None = None,
) -> None:
    """Try models and write the table.

    Args:
      models: As for `ttame convert import`.
      output: The page to write; by default none.
      done: A file of lines that an earlier call printed.
    """
    lines = done.read_text().splitlines() if done else []
    known = {result["model"]: result for result in map(json.loads, lines)}
    for model in models:
        if model not in known:
            known[model] = survey(model)
            jax.clear_caches()
        print(json.dumps(known[model]), flush=True)
    if output:
        write_atomically(output, table(known[model] for model in models))
        print(f"{output} written", file=sys.stderr)


if __name__ == "__main__":
    tyro.cli(main)

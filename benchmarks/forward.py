"""Seconds of a forward pass of one of timm's models, imported, ported and in PyTorch, as JSON.

    python benchmarks/forward.py --backbone timm:vit_small_patch16_224 --batch-size 8

`ratios` are the times of this project divided by PyTorch's. `ported` is missing if no family of
this project builds the model.
"""

import contextlib

import common  # noqa: F401  makes the project importable
import jax
import numpy as np
import tyro
from common import Setting, main, median_seconds
from flax import nnx
from ours import device, select_device

from ttame_jax.backbones import Backbone
from ttame_jax.backbones.imported import ImportedBackbone
from ttame_jax.convert.importing import load_module
from ttame_jax.convert.pytorch.graph import read
from ttame_jax.weights import load_backbone
from ttame_jax.weights.timm_models import UnsupportedModel


def run(setting: Setting) -> dict:
    import torch

    select_device(setting)
    module, preprocessing = load_module(setting.backbone, "random")
    description, tensors = read(module, setting.backbone, preprocessing)
    backbones: dict[str, Backbone] = {
        "imported": ImportedBackbone(setting.backbone, description, tensors)
    }
    with contextlib.suppress(UnsupportedModel):
        backbones["ported"] = load_backbone(setting.backbone)
    size = preprocessing.image_size
    images = np.random.default_rng(0).standard_normal(
        (setting.batch_size, size, size, 3), np.float32
    )
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    def in_pytorch(count):
        with torch.inference_mode():
            for _ in range(count):
                module(pixels)

    def in_jax(backbone):
        graph, state = nnx.split(backbone)
        forward = jax.jit(lambda state, images: nnx.merge(graph, state)(images))
        on_device = jax.device_put(images)

        def repeat(count):
            for _ in range(count):
                jax.block_until_ready(forward(state, on_device))

        return repeat

    sides = {name: in_jax(backbone) for name, backbone in backbones.items()}
    seconds = median_seconds({"pytorch": in_pytorch} | sides, setting.rounds)
    ratios = {name: seconds[name] / seconds["pytorch"] for name in sides}
    return {"seconds": seconds, "ratios": ratios, **device()}


if __name__ == "__main__":
    main(run, tyro.cli(Setting, description=__doc__))

"""A run or a backbone as PyTorch files: state dicts, the authors' checkpoint, a module, ONNX."""

import dataclasses
import json
import logging
import pprint
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ttame_jax.attention import VARIANTS, AttentionMechanism
from ttame_jax.backbones import Backbone
from ttame_jax.training.checkpoints import load_attention
from ttame_jax.training.config import TrainConfig, load_config
from ttame_jax.training.models import build_attention, build_backbone

from .files import INSTALL, Tensors, torch_state, whole_folder, write_safetensors
from .layouts import attention_table
from .modules import libraries, module_config
from .reference import (
    lightning_checkpoint,
    obstacle,
    reference_attention,
    reference_hyper_parameters,
)
from .torch_import import import_torchvision
from .weights import export, layouts, to_torch


def load_run(
    run: Path, weights: str | None = None
) -> tuple[TrainConfig, Backbone, AttentionMechanism, int]:
    """A run's configuration, its two modules and the step of its best checkpoint."""
    config = load_config(run)
    if weights is not None:
        config = dataclasses.replace(config, weights=weights)
    backbone = build_backbone(config)
    attention = build_attention(config, backbone)
    return config, backbone, attention, load_attention(run, attention)


def run_to_torch(
    run: Path,
    output: Path,
    *,
    library: str | None = None,
    module: bool = False,
    onnx: bool = False,
    weights: str | None = None,
) -> list[str]:
    """Writes a run as PyTorch files into a new folder.

    Args:
      run: the run's folder.
      output: the folder, made here.
      library: torchvision or timm, that the module builds its backbone with; by default the
        first that has it.
      module: whether to write `explainer.py` and `explainer.pt` too.
      onnx: whether to write `explainer.onnx` too.
      weights: of the backbone, where they are no longer where the run found them.

    Returns:
      a line for each file, and for each that cannot be written.

    Raises:
      ValueError: the output is there, or no library has the backbone.
    """
    config, backbone, attention, step = load_run(run, weights)
    hyper_parameters = reference_hyper_parameters(config, backbone)
    state = reference_attention(backbone, attention, step)
    said = []
    with whole_folder(output) as folder:
        metadata = {"format": "pt", "hyper_parameters": json.dumps(hyper_parameters)}
        write_safetensors(folder / "attention.safetensors", state, metadata)
        said.append("attention.safetensors: the attention under the authors' names")
        if reason := obstacle(config, backbone):
            said.append(f"no attention.ckpt, which the authors' code could not load: {reason}")
        else:
            checkpoint = lightning_checkpoint(hyper_parameters, backbone, state, step)
            _save(checkpoint, folder / "attention.ckpt")
            said.append("attention.ckpt: attention and backbone as the authors' code loads them")
        for layout in layouts(backbone):
            name = f"backbone.{layout}.safetensors"
            write_safetensors(folder / name, to_torch(backbone, layout), {"format": "pt"})
            said.append(f"{name}: the backbone in {layout}'s layout")
        if module or onnx:
            said += _write_module(folder, backbone, attention, library, module, onnx)
    return said


def _write_module(
    folder: Path,
    backbone: Backbone,
    attention: AttentionMechanism,
    library: str | None,
    module: bool,
    onnx: bool,
) -> Iterator[str]:
    config = explainer_config(backbone, attention, library)
    if module:
        template = Path(__file__).with_name("standalone.py").read_text()
        literal = pprint.pformat(config, sort_dicts=False, width=96)
        source = template.replace("CONFIG: dict = {}", f"CONFIG = {literal}")
        (folder / "explainer.py").write_text(source)
        state = explainer_state(backbone, attention, config["library"])
        _save(torch_state(state), folder / "explainer.pt")
        yield f"explainer.py, explainer.pt: a module that needs torch and {config['library']} alone"
    if onnx:
        export_onnx(torch_explainer(backbone, attention, config), config, folder / "explainer.onnx")
        yield "explainer.onnx: images [B, 3, H, W] in [0, 1] to logits and the predicted maps"


def explainer_config(
    backbone: Backbone, attention: AttentionMechanism, library: str | None = None
) -> dict[str, Any]:
    """CONFIG of the standalone module (see `convert/standalone.py`).

    Raises:
      ValueError: the library, or neither, has the backbone.
    """
    known = libraries(backbone)
    if library is None and not known:
        raise ValueError(f"neither torchvision nor timm has a model of {backbone.name}")
    settings = VARIANTS[attention.variant]
    return {
        **module_config(backbone, library or known[0]),
        "attention": {
            "channels": list(attention.channels),
            "widths": list(attention.widths),
            "num_classes": backbone.num_classes,
            "skip": settings.skip,
            "batch_norm": settings.batch_norm,
            "activation": settings.activation,
            "branches": settings.branches,
        },
    }


def explainer_state(backbone: Backbone, attention: AttentionMechanism, library: str) -> Tensors:
    """The state dict of the standalone module."""
    parts = {
        "backbone": to_torch(backbone, library),
        "attention": export(attention, attention_table(attention)),
    }
    return {f"{part}.{key}": v for part, state in parts.items() for key, v in state.items()}


def torch_explainer(backbone: Backbone, attention: AttentionMechanism, config: dict[str, Any]):
    """The standalone module with its weights, in this process."""
    import_torchvision()
    from .standalone import Explainer

    explainer = Explainer(config)
    explainer.load_state_dict(torch_state(explainer_state(backbone, attention, config["library"])))
    return explainer


def export_onnx(explainer, config: dict[str, Any], path: Path) -> None:
    """Writes the module for any number of images: `images` to `logits` and `maps`.

    Raises:
      ImportError: torch's exporter lacks the packages it needs.
    """
    import torch

    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise ImportError(f"ONNX needs onnx and onnxscript: {INSTALL}") from None
    size = config["image_size"]
    images = torch.rand(2, 3, size, size)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(action="ignore"):
        torch.onnx.export(
            explainer,
            (images,),
            path,
            input_names=["images"],
            output_names=["logits", "maps"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def _save(content: Any, path: Path) -> None:
    import torch

    torch.save(content, path)

"""Exports a run as PyTorch files: state dicts, the authors' checkpoint, a module."""

import json
import pprint
from pathlib import Path
from typing import Any

from ttame_jax.attention import VARIANTS, AttentionMechanism
from ttame_jax.backbones import Backbone
from ttame_jax.files import Tensors, new_folder, write_safetensors
from ttame_jax.runs import load_run
from ttame_jax.weights.transfer import export, layouts, to_torch

from .authors import (
    LOSS_RECIPE,
    attention_state,
    attention_table,
    hyper_parameters,
    lightning_checkpoint,
    obstacle,
)
from .modules import libraries, module_config
from .pytorch import import_torch
from .pytorch.checkpoints import torch_state
from .pytorch.torch_import import import_torchvision


def run_to_torch(
    run_dir: Path,
    output: Path,
    *,
    library: str | None = None,
    module: bool = False,
    weights: str | None = None,
) -> list[str]:
    """Writes a run as PyTorch files into a new folder.

    Args:
      run_dir: the run's folder.
      output: the folder, created here.
      library: torchvision or timm, with which the module builds its backbone; by default the
        first that has it.
      module: whether to write also `explainer.py` and `explainer.pt`.
      weights: of the backbone, if they are no longer where the run found them.

    Returns:
      One line for each file, and for each that cannot be written.

    Raises:
      ValueError: the output exists, or no library has the backbone.
      ImportError: PyTorch is not installed, and the module or the checkpoint needs it.
    """
    if module:
        import_torch("the module")
    run = load_run(run_dir, weights)
    backbone, attention = run.backbone, run.attention
    settings = hyper_parameters(run.config, backbone)
    state = attention_state(backbone, attention, run.step)
    lines = []
    with new_folder(output) as folder:
        metadata = {"format": "pt", "hyper_parameters": json.dumps(settings)}
        metadata[LOSS_RECIPE] = run.config.loss.recipe
        write_safetensors(folder / "attention.safetensors", state, metadata)
        lines.append("attention.safetensors: the attention under the authors' names")
        if reason := obstacle(run.config, backbone):
            lines.append(f"no attention.ckpt, because the authors' code cannot load it: {reason}")
        else:
            checkpoint = lightning_checkpoint(settings, backbone, state, run.step)
            _save(checkpoint, folder / "attention.ckpt")
            lines.append("attention.ckpt: attention and backbone as the authors' code loads them")
        for layout in layouts(backbone):
            name = f"backbone.{layout}.safetensors"
            write_safetensors(folder / name, to_torch(backbone, layout), {"format": "pt"})
            lines.append(f"{name}: the backbone in {layout}'s layout")
        if module:
            lines.append(_write_module(folder, backbone, attention, library))
    return lines


def _write_module(
    folder: Path, backbone: Backbone, attention: AttentionMechanism, library: str | None
) -> str:
    config = explainer_config(backbone, attention, library)
    template = Path(__file__).with_name("standalone.py").read_text()
    literal = pprint.pformat(config, sort_dicts=False, width=96)
    source = template.replace("CONFIG: dict = {}", f"CONFIG = {literal}")
    (folder / "explainer.py").write_text(source)
    state = explainer_state(backbone, attention, config["library"])
    _save(torch_state(state), folder / "explainer.pt")
    return f"explainer.py, explainer.pt: a module that needs only torch and {config['library']}"


def explainer_config(
    backbone: Backbone, attention: AttentionMechanism, library: str | None = None
) -> dict[str, Any]:
    """CONFIG of the standalone module (see `convert/standalone.py`).

    Raises:
      ValueError: the library does not have the backbone, or none has.
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
        "sigmoid_maps": attention.sigmoid_maps,
    }


def explainer_state(backbone: Backbone, attention: AttentionMechanism, library: str) -> Tensors:
    """The state dict of the standalone module."""
    parts = {
        "backbone": to_torch(backbone, library),
        "attention": export(attention, attention_table(attention)),
    }
    return {f"{part}.{key}": v for part, state in parts.items() for key, v in state.items()}


def torch_explainer(backbone: Backbone, attention: AttentionMechanism, config: dict[str, Any]):
    """The standalone module with its weights."""
    import_torchvision()
    from .standalone import Explainer

    explainer = Explainer(config)
    explainer.load_state_dict(torch_state(explainer_state(backbone, attention, config["library"])))
    return explainer


def _save(content: Any, path: Path) -> None:
    torch = import_torch("writing a .ckpt")

    torch.save(content, path)

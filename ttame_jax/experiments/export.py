"""`ttame export`: a run as one file for other programs."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ttame_jax.export import onnx_model, stablehlo
from ttame_jax.files import check_output_file, write_atomically
from ttame_jax.runs import load_explainer

FORMATS = {"stablehlo": stablehlo, "onnx": onnx_model}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """A run, and the file to export it to."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""
    output: Path
    """The file to write."""
    format: Literal["stablehlo", "onnx"]
    """stablehlo: a program that JAX alone loads, on CPUs, CUDA GPUs and TPUs. onnx: a graph for ONNX
    Runtime and others."""
    likeliest: int = 1
    """Number of the most probable classes that are explained besides the given ones."""
    method: str | None = None
    """Another method to export on the run's backbone, such as gradcam."""
    weights: str | None = None
    """Weights of the backbone, if they are no longer where the run found them."""


def export_run(config: ExportConfig) -> None:
    """Writes the file and prints what it holds.

    Raises:
      FileNotFoundError: the run does not exist, or has no checkpoint yet.
      ValueError: there are fewer classes than that, or the method is unknown.
      OSError: the file cannot be written.
      ImportError: a package that the format needs is not installed.
      Failure: the method or the precision cannot be exported in this format.
    """
    check_output_file(config.output)
    explainer = load_explainer(config.run, config.weights, config.method)
    content = FORMATS[config.format](explainer, config.likeliest)
    write_atomically(config.output, content)
    size = explainer.backbone.preprocessing.image_size
    print(
        f"{config.output}: {explainer.method.name} on {explainer.backbone.name}, "
        f"{len(content) / 2**20:.1f} MiB; images [B, {size}, {size}, 3] in [0, 1] and classes [B, K]"
    )

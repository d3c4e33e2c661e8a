"""The command `ttame`. Each function is a subcommand and its docstring the help."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Annotated

import tyro
from etils import epath

from ttame_jax.config import TrainConfig, preset
from ttame_jax.convert.commands import convert
from ttame_jax.errors import one_line_errors
from ttame_jax.experiments.compare import CompareConfig, compare
from ttame_jax.experiments.evaluate import EvaluateConfig, evaluate
from ttame_jax.experiments.explain import ExplainConfig, explain_files
from ttame_jax.experiments.export import ExportConfig, export_run
from ttame_jax.experiments.lr_find import Grid, lr_find
from ttame_jax.experiments.train import train
from ttame_jax.startup import Processes, joined, use_compilation_cache


def explain(config: Annotated[ExplainConfig, tyro.conf.arg(name="")]) -> None:
    """Explain images with a trained run, or with a method that needs no training.

    Writes NAME.png (a picture) and NAME.npz (maps, classes, probabilities, labels) for every image.
    """
    explain_files(config)


def export(config: Annotated[ExportConfig, tyro.conf.arg(name="")]) -> None:
    """Export a run as one file: StableHLO that loads with JAX alone, or ONNX."""
    export_run(config)


def _evaluate(
    config: Annotated[EvaluateConfig, tyro.conf.arg(name="")],
    processes: Annotated[Processes, tyro.conf.arg(name="")],
) -> None:
    """Evaluate the maps of a run, or of another method; writes JSON and prints a table."""
    with joined(processes), one_line_errors("ttame"):
        evaluate(config)


def _compare(
    config: Annotated[CompareConfig, tyro.conf.arg(name="")],
    processes: Annotated[Processes, tyro.conf.arg(name="")],
) -> None:
    """Evaluate several methods on a run's backbone; writes tables, ROAD curves and a picture."""
    with joined(processes), one_line_errors("ttame"):
        compare(config)


def curves(figures: tyro.conf.Positional[tuple[Path, ...]], *, output: Path) -> None:
    """Draw the ROAD curves of evaluations, one line per method; writes PNG, SVG and CSV.

    Args:
      figures: JSON files that ttame evaluate --measures road wrote.
      output: Folder for road.png, road.svg and road.csv.
    """
    from ttame_jax.experiments.curves import curves as draw_curves

    draw_curves(figures, output)


def prepare(
    dataset: tyro.conf.Positional[str],
    *,
    manual_dir: Path | None = None,
    data_dir: Path | None = None,
) -> None:
    """Prepare a TFDS data set for training. Needs TensorFlow, and only once.

    Args:
      dataset: Name in TFDS, such as imagenet2012.
      manual_dir: Folder with the archives that TFDS cannot download, for imagenet2012
        ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar.
      data_dir: Folder of the prepared data sets; by default that of TFDS.
    """
    from ttame_jax.data import prepare as prepare_dataset

    prepare_dataset(dataset, data_dir, manual_dir)


def demo(output: Path = Path("demo")) -> None:
    """Train and explain a small classifier of digits, and write a page of pictures.

    Args:
      output: Folder for the runs and for index.html.
    """
    from ttame_jax.experiments.demo import run_demo

    run_demo(output)


def _train_command(default: TrainConfig):
    def command(
        config: Annotated[TrainConfig, tyro.conf.arg(name="")] = default,
        *,
        processes: Annotated[Processes, tyro.conf.arg(name="")],
    ) -> None:
        """Train an attention mechanism for a frozen classifier, or resume its run."""
        with joined(processes), one_line_errors("ttame"):
            train(config)

    return command


def _lr_find_command(default: TrainConfig):
    if default.output is not tyro.MISSING:
        folder = default.output.with_name(f"{default.output.name}_lr_find")
        default = dataclasses.replace(default, output=folder)

    def command(
        config: Annotated[TrainConfig, tyro.conf.arg(name="")] = default,
        *,
        grid: Annotated[Grid, tyro.conf.arg(name="")],
        processes: Annotated[Processes, tyro.conf.arg(name="")],
    ) -> None:
        """Search the peak rate and number of epochs by AD and IC; writes a table and a plot."""
        with joined(processes), one_line_errors("ttame"):
            lr_find(config, grid)

    return command


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line. A user error exits with a one-line message."""
    args = list(sys.argv[1:] if args is None else args)
    use_compilation_cache()
    with one_line_errors("ttame"), _paths:
        default = _preset_named_in(args)
        commands = {
            "train": _train_command(default),
            "lr-find": _lr_find_command(default),
            "explain": explain,
            "evaluate": _evaluate,
            "compare": _compare,
            "curves": curves,
            "prepare": prepare,
            "convert": convert,
            "export": export,
            "demo": demo,
        }
        tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="ttame",
            description="T-TAME: explanation maps for image classifiers in one forward pass.",
            args=args,
        )


_paths = tyro.constructors.ConstructorRegistry()


@_paths.primitive_rule
def _path_rule(info):
    """Lets every path be the address of an object: pathlib turns gs://bucket into gs:/bucket."""
    if info.type is not Path:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: epath.Path(words[0]),
        is_instance=lambda value: isinstance(value, PurePath),
        str_from_instance=lambda path: [str(path)],
    )


def _preset_named_in(args: Sequence[str]) -> TrainConfig:
    """The preset that --backbone names, which sets the defaults of ``train``."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--backbone", default=tyro.MISSING)
    return preset(parser.parse_known_args(args)[0].backbone)


if __name__ == "__main__":
    main()

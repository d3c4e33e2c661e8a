"""The command `ttame`. Only the modules of the subcommand that is called are imported."""

import argparse
import contextlib
import importlib.metadata
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Any

if TYPE_CHECKING:
    from ttame_jax.config import TrainConfig
    from ttame_jax.startup import Processes

Arguments = Sequence[str]
Command = Callable[..., Any]


def _explain(args: Arguments) -> Command:
    """Explain images with a trained run, or with a method that needs no training."""
    import tyro

    if any(word.partition("=")[0] == "--dataset" for word in args):
        return _explain_dataset()
    from ttame_jax.experiments.explain import ExplainConfig, explain_files

    def explain(config: Annotated[ExplainConfig, tyro.conf.arg(name="")]) -> None:
        """Explain images with a trained run, or with a method that needs no training.

        Writes NAME.png (a picture) and NAME.npz (maps, classes, probabilities, labels) for every
        image.

        $ ttame explain cat.jpg --backbone resnet50

        $ ttame explain photographs --run runs/vit_b16 --classes top3 --output explained

        $ ttame explain cat.jpg --backbone resnet50 --method scorecam --classes "tabby,Siamese cat"

        A whole data set is explained in batches, into Parquet files. `ttame explain --dataset NAME
        --help` lists the options.

        $ ttame explain --dataset imagenet2012 --run runs/vit_b16 --output maps
        """
        explain_files(config)

    return explain


def _explain_dataset() -> Command:
    import tyro

    from ttame_jax.experiments.explain_dataset import ExplainDatasetConfig, explain_dataset
    from ttame_jax.startup import Processes

    def explain(
        config: Annotated[ExplainDatasetConfig, tyro.conf.arg(name="")],
        processes: Annotated[Processes, tyro.conf.arg(name="")],
    ) -> None:
        """Explain a data set in batches on all devices; writes maps in Parquet files.

        $ ttame explain --dataset imagenet2012 --run runs/vit_b16 --output maps

        $ ttame explain --dataset folder:photographs --backbone resnet50 --classes top3 --output maps
        """
        with _joined(processes):
            explain_dataset(config)

    return explain


def _serve(args: Arguments) -> Command:
    """Serve a page that explains photographs live."""
    import tyro

    from ttame_jax.experiments.serve import ServeConfig, serve_page

    def serve(config: Annotated[ServeConfig, tyro.conf.arg(name="")]) -> None:
        """Serve a page that explains photographs live; needs the extra [serve].

        $ ttame serve --run runs/vit_b16
        """
        serve_page(config)

    return serve


def _export(args: Arguments) -> Command:
    """Export a run as one file: StableHLO that loads with JAX alone, or ONNX."""
    import tyro

    from ttame_jax.experiments.export import ExportConfig, export_run

    def export(config: Annotated[ExportConfig, tyro.conf.arg(name="")]) -> None:
        """Export a run as one file: StableHLO that loads with JAX alone, or ONNX.

        $ ttame export runs/vit_b16 --format stablehlo --output vit_b16.zip
        """
        export_run(config)

    return export


def _train(args: Arguments) -> Command:
    """Train an attention mechanism for a frozen classifier, or resume its run."""
    import tyro

    from ttame_jax.experiments.arguments import in_groups
    from ttame_jax.experiments.train import train as run_training
    from ttame_jax.startup import Processes

    Config = in_groups(_preset_named_in(args))

    def train(config: Config, processes: tyro.conf.OmitArgPrefixes[Processes]) -> None:
        """Train an attention mechanism for a frozen classifier, or resume its run.

        $ ttame train --backbone vit_b16

        $ ttame train --backbone resnet50 --dataset folder:photographs --epochs 3 --output runs/mine
        """
        with _joined(processes):
            run_training(config)

    return train


def _lr_find(args: Arguments) -> Command:
    """Search the peak rate and number of epochs by AD and IC."""
    import tyro

    from ttame_jax.experiments.arguments import in_groups
    from ttame_jax.experiments.lr_find import Grid
    from ttame_jax.experiments.lr_find import lr_find as search
    from ttame_jax.startup import Processes

    Config = in_groups(_preset_named_in(args, suffix="_lr_find"))

    def lr_find(
        config: Config,
        grid: tyro.conf.OmitArgPrefixes[Grid],
        processes: tyro.conf.OmitArgPrefixes[Processes],
    ) -> None:
        """Search the peak rate and number of epochs by AD and IC; writes a table and a plot.

        $ ttame lr-find --backbone resnet50 --epochs 2 --rates 3e-4,1e-3,3e-3
        """
        with _joined(processes):
            search(config, grid)

    return lr_find


def _ablate(args: Arguments) -> Command:
    """Train runs with different settings, and compare their AD and IC."""
    import tyro

    from ttame_jax.experiments.ablate import Ablation
    from ttame_jax.experiments.ablate import ablate as run_ablation
    from ttame_jax.experiments.arguments import in_groups
    from ttame_jax.startup import Processes

    Config = in_groups(_preset_named_in(args, suffix="_ablation"))

    def ablate(
        config: Config,
        ablation: tyro.conf.OmitArgPrefixes[Ablation],
        processes: tyro.conf.OmitArgPrefixes[Processes],
    ) -> None:
        """Train runs with different settings, and compare their AD and IC; writes tables and a plot.

        $ ttame ablate --backbone resnet50 --over variant --seeds 3

        $ ttame ablate --backbone vit_b16 --over masking

        $ ttame ablate --backbone vit_b16 --over loss.area-exponent 0.2 0.3 --over epochs 4 8
        """
        with _joined(processes):
            run_ablation(config, ablation)

    return ablate


def _evaluate(args: Arguments) -> Command:
    """Evaluate the maps of a run, or of another method."""
    import tyro

    from ttame_jax.experiments.evaluate import EvaluateConfig
    from ttame_jax.experiments.evaluate import evaluate as run_evaluation
    from ttame_jax.startup import Processes

    def evaluate(
        config: Annotated[EvaluateConfig, tyro.conf.arg(name="")],
        processes: Annotated[Processes, tyro.conf.arg(name="")],
    ) -> None:
        """Evaluate the maps of a run, or of another method; writes JSON and prints a table.

        $ ttame evaluate --run runs/vit_b16 --measures ad,ic,road --output vit_b16.json
        """
        with _joined(processes):
            run_evaluation(config)

    return evaluate


def _compare(args: Arguments) -> Command:
    """Evaluate several methods on a run's backbone, side by side."""
    import tyro

    from ttame_jax.experiments.compare import CompareConfig
    from ttame_jax.experiments.compare import compare as run_comparison
    from ttame_jax.startup import Processes

    def compare(
        config: Annotated[CompareConfig, tyro.conf.arg(name="")],
        processes: Annotated[Processes, tyro.conf.arg(name="")],
    ) -> None:
        """Evaluate several methods on a run's backbone; writes tables, ROAD curves and a picture.

        $ ttame compare --run runs/vit_b16 --quick --limit 500 --output comparison
        """
        with _joined(processes):
            run_comparison(config)

    return compare


def _sanity(args: Arguments) -> Command:
    """Check that maps change when the network is randomised."""
    import tyro

    from ttame_jax.experiments.sanity import SanityConfig
    from ttame_jax.experiments.sanity import sanity as run_sanity_check

    def sanity(config: Annotated[SanityConfig, tyro.conf.arg(name="")]) -> None:
        """Check that maps change when the network is randomised; needs the extra [sanity].

        The backbone is randomised layer by layer from the logits to the images, and the attention
        mechanism from the fusion to the earliest branch. Writes figures, curves and pictures.

        $ ttame sanity --run runs/vit_b16 --output sanity

        $ ttame sanity --run runs/vit_b16 --methods ttame,gradcam,gradcam++ --output sanity
        """
        run_sanity_check(config)

    return sanity


def _curves(args: Arguments) -> Command:
    """Draw the ROAD curves of evaluations."""
    import tyro

    from ttame_jax.experiments.curves import curves as draw_curves

    def curves(figures: tyro.conf.Positional[tuple[Path, ...]], *, output: Path) -> None:
        """Draw the ROAD curves of evaluations, one line per method; writes PNG, SVG and CSV.

        Args:
          figures: JSON files that ttame evaluate --measures road wrote.
          output: Folder for road.png, road.svg and road.csv.
        """
        draw_curves(figures, output)

    return curves


def _figures(args: Arguments) -> Command:
    """Draw the maps of several classifiers or classes as a figure for print."""
    import tyro

    from ttame_jax.experiments.figures import FiguresConfig
    from ttame_jax.experiments.figures import figures as draw_figures

    def figures(config: Annotated[FiguresConfig, tyro.conf.arg(name="")]) -> None:
        """Draw the maps of several classifiers or classes as a figure for print: SVG, PDF and PNG.

        $ ttame figures cat.jpg dog.jpg --run runs/vgg16 runs/resnet50 runs/vit_b16

        $ ttame figures cat.jpg --run runs/vit_b16 --classes top2

        $ ttame figures --run runs/vit_b16 --split validation --classes mistakes --limit 4
        """
        draw_figures(config)

    return figures


def _report(args: Arguments) -> Command:
    """Evaluate a run and write its report, one HTML file."""
    import tyro

    from ttame_jax.experiments.report import ReportConfig
    from ttame_jax.experiments.report import report as write_report

    def report(config: Annotated[ReportConfig, tyro.conf.arg(name="")]) -> None:
        """Evaluate a run and write its report, one HTML file that needs no network.

        $ ttame report --run runs/vit_b16

        $ ttame report --run runs/vit_b16 --dataset folder:photographs --output vit_b16.html
        """
        write_report(config)

    return report


def _prepare(args: Arguments) -> Command:
    """Prepare a TFDS data set for training."""
    import tyro

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
        from ttame_jax.data.tfds_source import prepare as prepare_dataset

        prepare_dataset(dataset, data_dir, manual_dir)

    return prepare


def _convert(args: Arguments) -> Command:
    """Convert weights and runs between PyTorch and this project."""
    from ttame_jax.convert.commands import convert

    return convert


def _demo(args: Arguments) -> Command:
    """Train and explain a small classifier of digits, and write the report of its run."""

    def demo(output: Path = Path("demo")) -> None:
        """Train and explain a small classifier of digits, and write the report of its run.

        Args:
          output: Folder for the classifier, its run, a few pictures and index.html, the report.
        """
        from ttame_jax.experiments.demo import run_demo

        run_demo(output)

    return demo


COMMANDS: dict[str, Callable[[Arguments], Command]] = {
    "explain": _explain,
    "serve": _serve,
    "export": _export,
    "train": _train,
    "evaluate": _evaluate,
    "compare": _compare,
    "sanity": _sanity,
    "curves": _curves,
    "figures": _figures,
    "report": _report,
    "lr-find": _lr_find,
    "ablate": _ablate,
    "prepare": _prepare,
    "convert": _convert,
    "demo": _demo,
}
"""Subcommands by name. Each is called with its arguments, imports what it needs and returns the
function that is the command. Its own docstring is the command's line in ``ttame --help``."""


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line. A user error exits with a one-line message."""
    args = list(sys.argv[1:] if args is None else args)
    name = _parser().parse_args(args[:1]).command

    from ttame_jax.errors import one_line_errors

    with one_line_errors("ttame"):
        _run(name, args[1:])


class _Version(argparse.Action):
    """Looks the version up only when it is asked for: a checkout need not be installed."""

    def __call__(self, parser, *_):
        print(f"ttame-jax {importlib.metadata.version('ttame-jax')}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    """The parser of the subcommand's name, and of `--help` and `--version`."""
    parser = argparse.ArgumentParser(
        prog="ttame",
        description="T-TAME: explanation maps for image classifiers in one forward pass.",
        epilog="ttame COMMAND --help lists the options of a command.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.__doc__, add_help=False)
    return parser


def _run(name: str, args: Sequence[str]) -> None:
    import tyro

    from ttame_jax.startup import use_compilation_cache

    use_compilation_cache()
    with _paths() as registry:
        command = COMMANDS[name](args)
        tyro.cli(command, prog=f"ttame {name}", args=args, registry=registry)


def _paths() -> Any:
    """Lets every path be the address of an object: pathlib turns gs://bucket into gs:/bucket."""
    import tyro
    from etils import epath

    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def path_rule(info):
        if info.type is not Path:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=lambda words: epath.Path(words[0]),
            is_instance=lambda value: isinstance(value, PurePath),
            str_from_instance=lambda path: [str(path)],
        )

    return registry


@contextlib.contextmanager
def _joined(processes: "Processes") -> Iterator[None]:
    """Runs a command together with other processes, and ends a failure in one line before theirs."""
    from ttame_jax.errors import one_line_errors
    from ttame_jax.startup import joined

    with joined(processes), one_line_errors("ttame"):
        yield


def _preset_named_in(args: Sequence[str], suffix: str = "") -> "TrainConfig":
    """The preset that --backbone names, which sets the defaults of ``train``.

    Args:
      args: the command line.
      suffix: of the name of its folder.
    """
    import dataclasses

    import tyro

    from ttame_jax.config import preset

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--backbone", default=tyro.MISSING)
    config = preset(parser.parse_known_args(args)[0].backbone)
    if config.output is tyro.MISSING:
        return config
    folder = config.output.with_name(config.output.name + suffix)
    return dataclasses.replace(config, output=folder)


if __name__ == "__main__":
    main()

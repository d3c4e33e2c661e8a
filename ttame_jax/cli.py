"""The command `ttame`: each function is a subcommand, its docstring the help."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Annotated

import numpy as np
import tyro
from etils import epath

from ttame_jax.errors import one_line_errors
from ttame_jax.experiments.compare import CompareConfig, compare
from ttame_jax.experiments.evaluate import EvaluateConfig, evaluate
from ttame_jax.experiments.lr_find import Grid, lr_find
from ttame_jax.files import save_arrays
from ttame_jax.startup import Processes, joined, use_compilation_cache
from ttame_jax.training.config import TrainConfig, preset


def explain(
    images: tyro.conf.Positional[tuple[Path, ...]],
    *,
    run: Path,
    output: Path,
    classes: str = "predicted",
    method: str | None = None,
    weights: str | None = None,
) -> None:
    """Explain images with a trained run, or with another method on its backbone.

    Writes NAME.png (the image, and each map over it) and NAME.npz (maps, classes,
    probabilities) for every image.

    Args:
      images: Image files.
      run: The run's folder, as ttame train wrote it.
      output: Folder for the results.
      classes: What to explain: predicted, top5 (or another number), or class ids as 3,17.
      method: The run's own by default, or gradcam, gradcam++, scorecam, ablationcam, rise, iia or
        transformer_lrp.
      weights: Of the backbone, where they are no longer where the run found them.
    """
    from ttame_jax.data import preprocess
    from ttame_jax.explainer import load_explainer
    from ttame_jax.methods import load_method

    names = _output_names(images)
    explainer = load_explainer(run, weights)
    other = method and load_method(method, explainer.backbone, explainer.attention)
    wanted = _parse_classes(classes)
    for path, name in zip(images, names):
        picture = preprocess(path, explainer.backbone.preprocessing)
        _explain_one(explainer, other, picture, wanted, output / name)


def _output_names(images: Sequence[Path]) -> list[str]:
    """The files' stems; whole paths where two files share one."""
    if not images:
        raise ValueError("no image given: ttame explain IMAGE... --run DIR --output DIR")
    stems = [path.stem for path in images]
    if len(set(stems)) == len(stems):
        return stems
    return [str(path).strip("/").replace("/", "_") for path in images]


def _parse_classes(text: str) -> str | np.ndarray | None:
    """What the explainer takes: None (predicted), a name, or class ids ``[1, K]``."""
    if text == "predicted":
        return None
    ids = text.split(",")
    return np.array([ids], int) if all(part.strip().isdecimal() for part in ids) else text


def _explain_one(explainer, other, picture: np.ndarray, classes, stem: Path) -> None:
    from ttame_jax import methods
    from ttame_jax.plots import explanation_figure, save_figure

    images = picture[None].astype(np.float32) / 255
    explanation = explainer(images, classes)
    if other:
        maps = methods.explain(other, images, explanation.classes)
        explanation = dataclasses.replace(explanation, maps=maps)
    arrays = {
        field.name: np.asarray(getattr(explanation, field.name)[0])
        for field in dataclasses.fields(explanation)
    }
    titles = [f"class {i}: {p:.1%}" for i, p in zip(arrays["classes"], arrays["probabilities"])]
    save_figure(explanation_figure(picture, arrays["maps"], titles), f"{stem}.png")
    save_arrays(f"{stem}.npz", **arrays)
    print(f"{stem}.png: {', '.join(titles)}")


def _evaluate(
    config: Annotated[EvaluateConfig, tyro.conf.arg(name="")],
    processes: Annotated[Processes, tyro.conf.arg(name="")],
) -> None:
    """Measure a run's maps, or another method's, by AD, IC, ROAD; writes JSON, prints a table."""
    with joined(processes), one_line_errors("ttame"):
        evaluate(config)


def _compare(
    config: Annotated[CompareConfig, tyro.conf.arg(name="")],
    processes: Annotated[Processes, tyro.conf.arg(name="")],
) -> None:
    """Measure several methods on a run's backbone; writes tables, ROAD curves and a picture."""
    with joined(processes), one_line_errors("ttame"):
        compare(config)


def curves(figures: tyro.conf.Positional[tuple[Path, ...]], *, output: Path) -> None:
    """Draw the ROAD curves of evaluations, a line a method; writes PNG, SVG and CSV.

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
    """Prepare a TFDS data set once, so that training can read it; needs TensorFlow.

    Args:
      dataset: Name in TFDS, such as imagenet2012.
      manual_dir: Folder with the archives that TFDS cannot download, for imagenet2012
        ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar.
      data_dir: Where TFDS keeps its data sets; its usual folder by default.
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
    def train(
        config: Annotated[TrainConfig, tyro.conf.arg(name="")] = default,
        *,
        processes: Annotated[Processes, tyro.conf.arg(name="")],
    ) -> None:
        """Train an attention mechanism for a frozen classifier, or resume its run."""
        from ttame_jax.training.loop import train as run

        with joined(processes), one_line_errors("ttame"):
            run(config)

    return train


def _lr_find_command(default: TrainConfig):
    if default.output is not tyro.MISSING:
        folder = default.output.with_name(f"{default.output.name}_lr_find")
        default = dataclasses.replace(default, output=folder)

    def search(
        config: Annotated[TrainConfig, tyro.conf.arg(name="")] = default,
        *,
        grid: Annotated[Grid, tyro.conf.arg(name="")],
        processes: Annotated[Processes, tyro.conf.arg(name="")],
    ) -> None:
        """Search the peak rate and number of epochs by AD and IC; writes a table and a plot."""
        with joined(processes), one_line_errors("ttame"):
            lr_find(config, grid)

    return search


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line; a mistake in it ends with one line that says what to do."""
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
    """Every path may be an address in a bucket: pathlib would make gs:/bucket of gs://bucket."""
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
    """What the flags of ``train`` start from: the preset that --backbone names."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--backbone", default=tyro.MISSING)
    return preset(parser.parse_known_args(args)[0].backbone)


if __name__ == "__main__":
    main()

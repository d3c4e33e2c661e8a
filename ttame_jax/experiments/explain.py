"""`ttame explain`: explanation maps of image files, as pictures and arrays."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ttame_jax.data import preprocess
from ttame_jax.explainer import Classes, Explainer
from ttame_jax.files import save_arrays
from ttame_jax.plots import explanation_figure, save_figure
from ttame_jax.preprocessing import to_float
from ttame_jax.runs import load_explainer


def explain_files(
    images: Sequence[Path],
    run: Path,
    output: Path,
    classes: str = "predicted",
    method: str | None = None,
    weights: str | None = None,
) -> None:
    """Writes NAME.png (the image and its overlays) and NAME.npz (an `Explanation`) per image.

    Args:
      images: image files.
      run: the run's folder.
      output: folder for the results.
      classes: predicted, top5 (or another number), or class ids as 3,17.
      method: a method to explain the run's backbone with; None is the run's own.
      weights: of the backbone, if they are no longer where the run found them.

    Raises:
      ValueError: no image, an unknown method, or unknown classes.
      FileNotFoundError: the run or an image does not exist.
      UnreadableImage: a file is not an image.
    """
    names = _output_names(images)
    explainer = load_explainer(run, weights, method)
    wanted = _parse_classes(classes)
    for path, name in zip(images, names):
        _explain_file(explainer, path, wanted, output / name)


def _output_names(images: Sequence[Path]) -> list[str]:
    """The files' stems, or whole paths if two files have the same stem."""
    if not images:
        raise ValueError("no image given: ttame explain IMAGE... --run DIR --output DIR")
    stems = [path.stem for path in images]
    if len(set(stems)) == len(stems):
        return stems
    return [str(path).strip("/").replace("/", "_") for path in images]


def _parse_classes(text: str) -> Classes:
    """The argument of the explainer: None (predicted), a name, or class ids ``[1, K]``."""
    if text == "predicted":
        return None
    ids = text.split(",")
    return np.array([ids], int) if all(part.strip().isdecimal() for part in ids) else text


def _explain_file(explainer: Explainer, path: Path, classes: Classes, stem: Path) -> None:
    picture = preprocess(path, explainer.backbone.preprocessing)
    explanation = explainer(to_float(picture[None]), classes)
    arrays = {
        field.name: np.asarray(getattr(explanation, field.name)[0])
        for field in dataclasses.fields(explanation)
    }
    titles = [f"class {i}: {p:.1%}" for i, p in zip(arrays["classes"], arrays["probabilities"])]
    save_figure(explanation_figure(picture, list(arrays["maps"]), titles), f"{stem}.png")
    save_arrays(f"{stem}.npz", **arrays)
    print(f"{stem}.png: {', '.join(titles)}")

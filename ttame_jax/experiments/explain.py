"""`ttame explain`: explanation maps of image files, as pictures and arrays."""

import collections
import dataclasses
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ttame_jax.data import preprocess
from ttame_jax.data.transforms import MAX_PIXELS
from ttame_jax.explainer import Classes, Explainer
from ttame_jax.files import check_output_folder, save_arrays
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
    max_pixels: int = MAX_PIXELS,
) -> None:
    """Writes NAME.png (the image and its overlays) and NAME.npz (an `Explanation`) per image.

    NAME is the image's own name without its extension. If two results would have the same name, or
    a result the name of one of the images, a longer name is chosen and printed.

    Args:
      images: image files.
      run: the run's folder.
      output: folder for the results.
      classes: predicted, top5 (or another number), or class ids as 3,17.
      method: a method to explain the run's backbone with; None is the run's own.
      weights: of the backbone, if they are no longer where the run found them.
      max_pixels: images with more pixels are refused.

    Raises:
      ValueError: no image, an unknown method, or unknown classes.
      FileNotFoundError: the run or an image does not exist.
      OSError: `output` cannot be written.
      UnreadableImage: a file is not an image.
    """
    check_output_folder(output)
    stems = _output_stems(images, output)
    wanted = _parse_classes(classes)
    explainer = load_explainer(run, weights, method)
    # All at once, so that a bad file is found before a slow method starts.
    preprocessing = explainer.backbone.preprocessing
    pictures = [preprocess(path, preprocessing, max_pixels) for path in images]
    for picture, stem in zip(pictures, stems):
        _explain_picture(explainer, picture, wanted, stem)


def _output_stems(images: Sequence[Path], output: Path) -> list[Path]:
    """The paths of the results without extensions. No two are the same, and none is an image's."""
    if not images:
        raise ValueError("no image given: ttame explain IMAGE... --run DIR --output DIR")
    counts = collections.Counter(path.stem for path in images)
    taken = {_key(path) for path in images}
    stems = []
    for path in images:
        name = path.stem
        if counts[name] > 1:
            name = str(path).strip("/").replace("/", "_")
        numbered = itertools.chain([name], (f"{name}_{i}" for i in itertools.count(2)))
        for stem in (output / name for name in numbered):
            files = {_key(Path(f"{stem}{suffix}")) for suffix in (".png", ".npz")}
            if not files & taken:
                break
        taken |= files
        stems.append(stem)
        if stem.name != path.stem:
            print(f"{path}: the name {path.stem} is taken, writing {stem}.png and {stem}.npz")
    return stems


def _key(path: Path) -> str:
    """The same for all paths of a file, on file systems that ignore case as well."""
    return os.path.realpath(path).casefold()


def _parse_classes(text: str) -> Classes:
    """The argument of the explainer: None (predicted), a name, or class ids ``[1, K]``."""
    if text == "predicted":
        return None
    ids = text.split(",")
    if not all(part.strip().isdecimal() for part in ids):
        return text
    if max(map(int, ids)) >= 2**31:
        raise ValueError(f"there is no class {max(map(int, ids))}: class ids are below 2**31")
    return np.array([ids], int)


def _explain_picture(
    explainer: Explainer, picture: np.ndarray, classes: Classes, stem: Path
) -> None:
    explanation = explainer(to_float(picture[None]), classes)
    arrays = {
        field.name: np.asarray(getattr(explanation, field.name)[0])
        for field in dataclasses.fields(explanation)
    }
    titles = [f"class {i}: {p:.1%}" for i, p in zip(arrays["classes"], arrays["probabilities"])]
    save_figure(explanation_figure(picture, list(arrays["maps"]), titles), f"{stem}.png")
    save_arrays(f"{stem}.npz", **arrays)
    print(f"{stem}.png: {', '.join(titles)}")

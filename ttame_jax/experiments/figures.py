"""`ttame figures`: maps of several classifiers and classes, for print (Fig. 14, 17 and 18)."""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

from ttame_jax.data import Source, select, thin
from ttame_jax.data.transforms import decode, open_picture
from ttame_jax.errors import Damaged
from ttame_jax.experiments.cost import estimate, is_slow
from ttame_jax.experiments.evaluate import Selection
from ttame_jax.experiments.explain import Drawing, MethodConfig, find_images, parse_classes
from ttame_jax.explainer import Classes, Explainer
from ttame_jax.explanation import Explanation
from ttame_jax.files import check_output_folder
from ttame_jax.labels import readable
from ttame_jax.plots import Panel, picture_grid, save_figure
from ttame_jax.runs import load_config

MISTAKES = "mistakes"
"""The choice of misclassified images, with their true class and the most probable other one."""

FORMATS = ("svg", "pdf", "png")
RESOLUTION = 300  # dots per inch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classifiers:
    """The classifiers of runs, and others without a run."""

    run: tuple[Path, ...] = ()
    """Folders of runs, as ttame train wrote them."""
    backbone: tuple[str, ...] = ()
    """Names of classifiers without a run, such as resnet50 or timm:MODEL."""
    weights: tuple[str, ...] = ()
    """Weights of each --backbone: a file, torchvision, timm or timm:MODEL. The default is the
    published ones."""

    def __post_init__(self):
        if not (self.run or self.backbone):
            raise ValueError(
                "give one or more runs (--run), or backbones to explain without training"
            )
        if len(self.weights) not in (0, len(self.backbone)):
            raise ValueError(
                f"--weights must be given for each of {len(self.backbone)} backbones, or for none, "
                f"not for {len(self.weights)}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FiguresConfig(Drawing, Selection, MethodConfig, Classifiers):
    """Images to explain, classifiers and a method."""

    images: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Image files, or folders of them. Without any, the images are those of the data set."""
    classes: str = "predicted"
    """Classes to explain: predicted, top2 (or another number), ids and names, separated by commas;
    or mistakes, the true class of misclassified images and the most probable other one, which needs
    a data set."""
    limit: int | None = 6
    """The largest number of images. They are evenly spaced in the data set; mistakes are drawn at
    random."""
    output: Path = Path("figures")
    """Folder for the figure, which is named after the classes: predicted.svg, .pdf and .png."""

    def __post_init__(self):
        for part in (Classifiers, MethodConfig, Selection, Drawing):
            part.__post_init__(self)
        if self.images and self.dataset is not None:
            raise ValueError("give either images or --dataset")
        if not (self.images or self.dataset or self.run):
            raise ValueError("no image given: ttame figures IMAGE... --backbone NAME, or --dataset")
        if self.images and self.classes == MISTAKES:
            raise ValueError(
                "the true classes of files are unknown: --classes mistakes needs --dataset"
            )


def figures(config: FiguresConfig) -> None:
    """Draws a figure of maps and writes it as SVG, PDF and PNG.

    Each classifier has a row, and each image a column for each class, below the image (Fig. 14, 17
    and 18). With several classes of a single classifier, each image has a row instead.

    Raises:
      ValueError: unknown classes, an unknown method, or no image is misclassified.
      FileNotFoundError: a run, the weights, the images or the data set do not exist.
      UnreadableImage: a file is not an image.
      Damaged: no image of the data set can be read.
    """
    check_output_folder(config.output)
    photographs = _photographs(config)
    explainers = _explainers(config)
    for explainer in explainers:
        if is_slow(explainer.method):
            print(estimate(explainer.method, images=1))
    explain = _mistakes if config.classes == MISTAKES else _explained
    explained = list(explain(config, photographs, explainers))
    if not explained:
        raise Damaged("none of the images can be read")
    if len(explainers) == 1 and len(explained[0].explanations[0].classes) > 1:
        rows = [("", [_photograph(one), *_maps(config, one, 0)]) for one in explained]
        figure = picture_grid(rows, "width", config.colour_map)
    else:
        rows = _columns(config, _names(config, explainers), explained)
        figure = picture_grid(rows, "height", config.colour_map)
    stem = config.output / (config.classes if config.classes.isalnum() else "classes")
    for kind in FORMATS:
        save_figure(figure, f"{stem}.{kind}", RESOLUTION)
    print(f"{stem}.{', .'.join(FORMATS)}")


class Photograph(NamedTuple):
    """A picture, and its label (-1 is unknown) if it is in a data set."""

    image: Image.Image
    label: int = -1
    source: Source | None = None

    @property
    def title(self) -> str:
        """The name of the true class; empty if it is unknown."""
        return self.source.label_name(self.label) if self.source else ""

    def true_class(self, explainer: Explainer) -> int | None:
        """The classifier's class of the label, by its name if both have names."""
        names = self.source.class_names if self.source else None
        if names and explainer.class_names and self.label >= 0:
            return _class_of(names[self.label], explainer)
        return self.label if 0 <= self.label < explainer.backbone.num_classes else None


def _class_of(name: str, explainer: Explainer) -> int | None:
    """The class that a data set names. Unlike a user's, a name of digits is not an id."""
    if not name.isdecimal():
        with contextlib.suppress(ValueError):
            return explainer.class_ids([name])[0]
    (name,), known = readable([name]), explainer.class_names or ()
    return known.index(name) if name in known else None


class Explained(NamedTuple):
    """A photograph, the explanation of each classifier, and its true class for each of them."""

    photograph: Photograph
    explanations: Sequence[Explanation]
    true_classes: Sequence[int | None]


def _photographs(config: FiguresConfig) -> Iterator[Photograph]:
    """The images, which are read one by one. For mistakes, all of them in random order."""
    if config.images:
        files = find_images(config.images, config.output)
        if len(files) > (limit := config.limit or len(files)):
            print(f"{limit} of {len(files)} images: raise --limit to draw more")
        chosen = [files[i] for i in thin(np.arange(len(files)), limit)]
        return (Photograph(open_picture(path, config.max_pixels)) for path in chosen)
    run = load_config(config.run[0]) if config.run else None
    source = config.source(run, config.max_pixels)
    mistakes = config.classes == MISTAKES
    indices = select(source, config.list, None if mistakes else config.limit)
    if mistakes:
        indices = np.random.default_rng(0).permutation(indices)
    return _read(source, indices)


def _read(source: Source, indices: np.ndarray) -> Iterator[Photograph]:
    """The images of a data set. Unreadable ones are left out with a warning."""
    for index in indices.tolist():
        try:
            one = source[index]
            image = decode(one["image"], max_pixels=source.max_pixels)
        except OSError:
            warnings.warn(f"skipping an unreadable image: {source.name(index)}", stacklevel=2)
        else:
            yield Photograph(image, one["label"], source)


def _explainers(config: FiguresConfig) -> list[Explainer]:
    """The explainers of the runs, followed by those of the backbones."""
    weights = config.weights or (None,) * len(config.backbone)
    return [
        *(config.load(run=run) for run in config.run),
        *(config.load(backbone=name, weights=file) for name, file in zip(config.backbone, weights)),
    ]


def _names(config: FiguresConfig, explainers: Sequence[Explainer]) -> list[str]:
    """The labels of the explainers' rows: backbone and method, or the folder if runs share both."""
    names = [explainer.backbone.name for explainer in explainers]
    methods = [explainer.method.title for explainer in explainers]
    if len({*zip(names, methods)}) < len(explainers):
        names = [*(run.name for run in config.run), *names[len(config.run) :]]
    return [f"{name}\n{method}" for name, method in zip(names, methods)]


def _explained(
    config: FiguresConfig, photographs: Iterable[Photograph], explainers: Sequence[Explainer]
) -> Iterator[Explained]:
    """Explains the chosen classes of each photograph."""
    classes = [parse_classes(config.classes, explainer) for explainer in explainers]
    for photograph in tqdm(photographs, unit="image"):
        explanations = [
            _explain(config, explainer, photograph, of_one)
            for explainer, of_one in zip(explainers, classes)
        ]
        yield Explained(photograph, explanations, [*map(photograph.true_class, explainers)])


def _mistakes(
    config: FiguresConfig, photographs: Iterable[Photograph], explainers: Sequence[Explainer]
) -> Iterator[Explained]:
    """Photographs that a classifier is wrong about: their true and the most probable other class.

    Raises:
      ValueError: there is none.
    """
    found = seen = 0
    for photograph in tqdm(photographs, unit="image"):
        true = [photograph.true_class(explainer) for explainer in explainers]
        if None in true:
            continue
        seen += 1
        likeliest = [
            _explain(config, explainer, photograph, "top2").classes.tolist()
            for explainer in explainers
        ]
        if all(one == first for one, (first, _) in zip(true, likeliest)):
            continue
        pairs = [
            np.array([one, first if first != one else second])
            for one, (first, second) in zip(true, likeliest)
        ]
        explanations = [
            _explain(config, explainer, photograph, pair)
            for explainer, pair in zip(explainers, pairs)
        ]
        yield Explained(photograph, explanations, true)
        found += 1
        if found == config.limit:
            return
    if not found:
        raise ValueError(
            f"no image is misclassified, of {seen} whose label is one of the classifier's classes"
        )


def _explain(
    config: FiguresConfig, explainer: Explainer, photograph: Photograph, classes: Classes
) -> Explanation:
    return explainer.explain_picture(photograph.image, classes, config.view, config.max_pixels)


def _columns(
    config: FiguresConfig, labels: Sequence[str], explained: Sequence[Explained]
) -> list[tuple[str, list[Panel]]]:
    """The photographs, each above the maps of its classes in a row per classifier."""
    photographs = [_photograph(one, len(one.explanations[0].classes)) for one in explained]
    rows = [("", photographs)]
    for i, name in enumerate(labels):
        rows.append((name, [panel for one in explained for panel in _maps(config, one, i)]))
    return rows


def _photograph(explained: Explained, span: int = 1) -> Panel:
    """The photograph and its true class."""
    return Panel(np.asarray(explained.photograph.image), explained.photograph.title, span)


def _maps(config: FiguresConfig, explained: Explained, i: int) -> list[Panel]:
    """The overlays of the i-th classifier's classes, with their names and probabilities."""
    explanation, true = explained.explanations[i], explained.true_classes[i]
    return [
        Panel(
            explanation.overlay(k, config.opacity, config.colour_map),
            f"{name}\n{probability:.1%}{' (true class)' if class_id == true else ''}",
        )
        for k, (name, probability, class_id) in enumerate(
            zip(explanation.labels, explanation.probabilities, explanation.classes)
        )
    ]

"""`ttame explain`: explanation maps of image files, as pictures and arrays."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from ttame_jax import pictures
from ttame_jax.data.sources import IMAGE_SUFFIXES, images_below
from ttame_jax.data.transforms import MAX_PIXELS, UnreadableImage, open_picture
from ttame_jax.data.views import ViewName
from ttame_jax.experiments.cost import estimate, is_slow
from ttame_jax.explainer import Classes, Explainer
from ttame_jax.explaining import METHOD, open_explainer
from ttame_jax.explanation import Explanation, Style
from ttame_jax.files import check_output_folder
from ttame_jax.labels import read_names
from ttame_jax.methods import list_methods

AHEAD = 8
"""Pictures that are decoded, and results that are written, while another is explained."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classifier:
    """The classifier of a run, or one without a run."""

    run: Path | None = None
    """Folder of a run, as ttame train wrote it."""
    backbone: str | None = None
    """Without a run: name of the classifier, such as resnet50 or timm:MODEL."""
    weights: str | None = None
    """Weights of the backbone: a file, torchvision, timm or timm:MODEL. The default is the run's, or
    else the published ones."""
    backbone_config: dict[str, int | str] = dataclasses.field(default_factory=dict)
    """Options of the backbone as name and value, such as num_classes 10."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """A method, and what its classifiers are shown."""

    method: Annotated[
        str | None,
        tyro.conf.arg(
            help=f"Method to explain with: {', '.join(list_methods())}. The default is the run's "
            f"own, or {METHOD} without a run."
        ),
    ] = None
    view: ViewName | None = None
    """What the classifier is shown: the whole picture, or the centre crop of its evaluation. The
    default is whole for classifiers that take inputs of any size, and crop for others, which are
    shown square tiles for whole."""
    class_names: Path | None = None
    """File with one class name per line. The default is the run's or the classifier's own names, or
    ImageNet's for 1000 classes."""
    method_config: dict[str, int | float | str] = dataclasses.field(default_factory=dict)
    """Options of the method as name and value, such as masks 1000 or layer blocks.10."""
    max_pixels: int = MAX_PIXELS
    """Images with more pixels are refused."""

    def __post_init__(self):
        if self.max_pixels < 1:
            raise ValueError(f"--max-pixels must be at least 1, not {self.max_pixels}")

    def load(self, **classifier) -> Explainer:
        """Loads the explainer of a classifier. Errors are those of `open_explainer`.

        Args:
          **classifier: the arguments `run`, `backbone`, `weights` and `backbone_config` of
            `open_explainer`.
        """
        names = None if self.class_names is None else read_names(self.class_names)
        return open_explainer(
            **classifier,
            method=self.method,
            method_config=self.method_config,
            class_names=names,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExplainerConfig(MethodConfig, Classifier):
    """A classifier and a method."""

    def open(self) -> Explainer:
        """Loads the explainer. Errors are those of `open_explainer`."""
        return self.load(
            run=self.run,
            backbone=self.backbone,
            weights=self.weights,
            backbone_config=self.backbone_config,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing:
    """How maps are drawn over their pictures."""

    opacity: float = pictures.OPACITY
    """Share of the heatmap in an overlay, from 0 to 1."""
    colour_map: str = pictures.COLOUR_MAP
    """Colour map of Matplotlib: inferno, viridis, turbo, or jet as in the paper."""

    def __post_init__(self):
        if not 0 <= self.opacity <= 1:
            raise ValueError(f"--opacity must lie in 0 to 1, not {self.opacity}")
        pictures.check_colour_map(self.colour_map)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExplainConfig(Drawing, ExplainerConfig):
    """Images to explain, a classifier and a method."""

    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files, or folders of them."""
    classes: str = "predicted"
    """Classes to explain: predicted, top5 (or another number), all, or ids and names, separated by
    commas."""
    output: Path = Path("explained")
    """Folder for the results."""
    style: Style = "figure"
    """What is drawn: a figure with all classes; or, of the first class and at the picture's size,
    its overlay, its heatmap, or a transparent heatmap."""

    def __post_init__(self):
        ExplainerConfig.__post_init__(self)
        Drawing.__post_init__(self)


def explain_files(config: ExplainConfig) -> None:
    """Writes NAME.png (a picture) and NAME.npz (the arrays of an `Explanation`) per image.

    NAME is the image's own name without its extension. If two results would have the same name, or
    a result the name of one of the images, a longer name is chosen and printed. Unreadable images
    of a folder are skipped and listed at the end.

    Raises:
      ValueError: no image, an unknown method, or unknown classes.
      FileNotFoundError: the run or an image does not exist.
      OSError: the output cannot be written.
      UnreadableImage: a file given by name is not an image.
    """
    check_output_folder(config.output)
    images = find_images([Path(path) for path in config.images], config.output)
    stems = _output_stems(images, config.output)
    explainer = config.open()
    classes = parse_classes(config.classes, explainer)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        # All at once, so that a bad file is found before a slow method starts.
        for _ in threads.map(functools.partial(_check, config, explainer), _named(config)):
            pass
        with _passes_shown(explainer, len(images)) as explainer:
            skipped = _explain_all(config, explainer, classes, list(zip(images, stems)), threads)
    for path, error in skipped:
        print(f"skipped {path}: {error}", file=sys.stderr)
    if len(skipped) == len(images):
        raise UnreadableImage(f"none of the {len(images)} images can be read")


@contextlib.contextmanager
def _passes_shown(explainer: Explainer, images: int) -> Iterator[Explainer]:
    """The explainer, which shows the forward passes of each image if there are many of them."""
    method = explainer.method
    if not is_slow(method):
        yield explainer
        return
    print(estimate(method, images), file=sys.stderr)
    total = images * method.forward_passes
    with tqdm(total=total, unit="pass", desc=method.name, leave=False, position=1) as bar:
        method.progress = bar.update
        yield Explainer(method, explainer.class_names)


def _check(config: ExplainConfig, explainer: Explainer, path: Path) -> None:
    """Refuses an image that cannot be explained."""
    picture = open_picture(path, config.max_pixels)
    try:
        explainer.check_view(picture, config.view)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _named(config: ExplainConfig) -> list[Path]:
    """The images that are given by name, not by their folder."""
    return [Path(path) for path in config.images if not path.is_dir()]


def find_images(paths: Sequence[Path], output: Path) -> list[Path]:
    """The image files among the paths and in the folders among them, at any depth.

    Earlier results in the output folder are left out, unless that is the folder itself.
    """
    if not paths:
        raise ValueError("no image given: ttame explain IMAGE... --run DIR")
    found, results = [], Path(output).resolve()
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(
            file
            for file in images_below(path)
            if results == path.resolve() or results not in file.resolve().parents
        )
        if not inside:
            raise ValueError(f"no images in {path} ({', '.join(sorted(IMAGE_SUFFIXES))})")
        found += inside
    return found


def _explain_all(
    config: ExplainConfig,
    explainer: Explainer,
    classes: Classes,
    work: Sequence[tuple[Path, Path]],
    threads: concurrent.futures.Executor,
) -> list[tuple[Path, Exception]]:
    """Explains and writes all images; decodes and writes in threads. Returns what was skipped."""
    skipped, several = [], len(work) > 1
    named = set(_named(config))
    decoded = _ahead(threads, lambda path: open_picture(path, config.max_pixels), work)
    written = collections.deque()
    with tqdm(total=len(work), unit="image", disable=not several) as bar:
        for (path, stem), picture in decoded:
            try:
                explanation = explainer.explain_picture(
                    picture.result(), classes, config.view, config.max_pixels
                )
            except (UnreadableImage, ValueError) as error:
                if path in named:
                    raise
                skipped.append((path, error))
            else:
                written.append(threads.submit(_write, explanation, stem, config))
                bar.write(f"{stem}.png: {explanation.summary}", file=sys.stdout)
                _say_what_is_hidden(path, explanation, bar)
            if len(written) > AHEAD:
                written.popleft().result()
            bar.update()
        for result in written:
            result.result()
    return skipped


def _ahead(
    threads: concurrent.futures.Executor, decode, work: Iterable[tuple[Path, Path]]
) -> Iterator[tuple[tuple[Path, Path], concurrent.futures.Future]]:
    """Yields each item of work with the future of its picture, a few of which are decoded ahead."""
    waiting: collections.deque = collections.deque()
    for item in work:
        waiting.append((item, threads.submit(decode, item[0])))
        if len(waiting) > AHEAD:
            yield waiting.popleft()
    yield from waiting


def _write(explanation: Explanation, stem: Path, config: ExplainConfig) -> None:
    explanation.save(f"{stem}.npz")
    explanation.save(
        f"{stem}.png", style=config.style, opacity=config.opacity, colour_map=config.colour_map
    )


def _say_what_is_hidden(path: Path, explanation: Explanation, bar: tqdm) -> None:
    """Says so if the classifier was shown less than half of a picture."""
    height, width = explanation.image.shape[:2]
    left, top, right, bottom = explanation.box
    share = (right - left) * (bottom - top) / (height * width)
    if share < 0.5:
        bar.write(
            f"{path}: the classifier was shown {share:.0%} of the picture; --view whole explains "
            "all of it",
            file=sys.stderr,
        )


def _output_stems(images: Sequence[Path], output: Path) -> list[Path]:
    """The paths of the results without extensions. No two are the same, and none is an image's."""
    counts = collections.Counter(path.stem for path in images)
    taken = {_key(path) for path in images}
    stems = []
    for path in images:
        name = path.stem
        if counts[name] > 1:
            name = str(path).lstrip("./").replace("/", "_")
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


def parse_classes(text: str, explainer: Explainer) -> Classes:
    """The argument of the explainer: None (predicted), all or top5, or a list of ids and names."""
    if text == "predicted":
        return None
    if text == "all" or text.startswith("top") and text.removeprefix("top").isdecimal():
        return text
    known = {name.casefold() for name in explainer.class_names or ()}
    one_name = text.strip().casefold() in known  # it may have a comma
    return explainer.class_ids([text] if one_name else text.split(","))

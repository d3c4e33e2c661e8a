"""Sources of images, read one record at a time. Folders are here, TFDS is in `tfds_source`."""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
from etils import epath

from ttame_jax import labels
from ttame_jax.data.transforms import MAX_PIXELS
from ttame_jax.files import digest, in_bucket

_STAND_INS = {"validation": ("validation", "val", "test")}
_SPLIT_FOLDERS = ("train", "validation", "val", "test")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_IMAGE_NAME = re.compile(rf".*({'|'.join(map(re.escape, IMAGE_SUFFIXES))})(?!\S)", re.IGNORECASE)


class Source(ABC):
    """Encoded images by index. Sources can be pickled for the loader's worker processes.

    Attributes:
      class_names: the names of the labels, or None.
      has_boxes: whether records have boxes.
      max_pixels: images with more pixels count as unreadable.
    """

    class_names: list[str] | None = None
    has_boxes: bool = False
    max_pixels: int = MAX_PIXELS

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> dict:
        """Returns one record.

        Returns:
          `image`: the encoded image, bytes.
          `label`: int, -1 if unknown.
          `boxes`: if the data set has boxes, float32 [N, 4]: ymin, xmin, ymax, xmax as fractions
            of the image's height and width. N may be 0.

        Raises:
          OSError: the file cannot be read.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """Returns an image's name in warnings and lists: its file name, if there is one."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """What the images are, wherever they are stored: their number and a name or a digest."""

    def label_name(self, label: int) -> str:
        """Returns the name of a label, with ImageNet's own for a WordNet id. Empty if unknown."""
        return "" if label < 0 else labels.label(label, labels.readable(self.class_names or ()))

    def indices_of(self, names: Iterable[str]) -> np.ndarray:
        """Returns the indices (int64 [N]) of the images with these names, in the given order.

        Names without an image are skipped: a published list may name more images than a sample of
        the data set has.
        """
        names = list(dict.fromkeys(names))
        found, missing = {}, set(names)
        for index in range(len(self)):
            if not missing:
                break
            if (name := self.name(index)) in missing:
                missing.remove(name)
                found[name] = index
        return np.array([found[name] for name in names if name in found], np.int64)


def load_source(
    dataset: str,
    split: str,
    data_dir: str | Path | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Source:
    """Opens one split of a data set.

    Args:
      dataset: a TFDS name ("imagenet2012", "cifar10:3.0.2"), "folder:DIR", or "digits", the
        built-in data set, which is generated on first use.
      split: in TFDS's syntax, such as "train" or "validation[:200]". Without such a split,
        "validation" falls back to "val" or "test".
      data_dir: the folder of prepared data sets. None selects TFDS's default.
      max_pixels: images with more pixels count as unreadable.

    Raises:
      FileNotFoundError: `data_dir` does not exist, or the data set is not prepared; the message
        names the command to prepare it.
      ValueError: the data set or split does not exist, or has no images.
    """
    here = data_dir is not None and not in_bucket(data_dir)
    if here and not Path(data_dir).expanduser().is_dir():
        raise FileNotFoundError(f"no folder {data_dir} of prepared data sets (--data-dir)")
    kind, _, folder = dataset.partition(":")
    if kind != "folder" or not split.isidentifier():
        _tfds_source().check_split(split)
    source = (
        FolderSource(folder, split)
        if kind == "folder"
        else _tfds_source().TfdsSource(dataset, split, data_dir)
    )
    if not len(source):
        raise ValueError(f"the split {split!r} of {dataset} has no images")
    source.max_pixels = max_pixels
    return source


def select(source: Source, names: str | Path | None = None, limit: int | None = None) -> np.ndarray:
    """Returns the indices (int64 [N]) of the images in a list, evenly thinned to a limit.

    Args:
      source: the images.
      names: a text file with one `FILENAME LABEL` per line, like the authors' lists. None selects
        all images.
      limit: the largest number of images. None disables the limit.

    Raises:
      ValueError: the source has no image of the list.
    """
    indices = np.arange(len(source))
    if names is not None:
        try:
            lines = read_text(names).splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{names} is not a list of images: it is not a text file") from error
        wanted = [_listed(line) for line in lines if line.strip()]
        indices = source.indices_of(wanted)
        print(f"{len(indices)} of the {len(wanted)} images of {names} are in {source}")
        if not len(indices):
            raise ValueError(f"no image of {names} is in {source}: choose another split")
    return thin(indices, limit)


def read_text(path: str | Path) -> str:
    """A text file, with or without the byte order mark that spreadsheets write."""
    return epath.Path(path).read_bytes().decode("utf-8-sig")


def _listed(line: str) -> str:
    """The file name in a line of a list. One with an image's extension may have spaces."""
    name = _IMAGE_NAME.match(line.strip())
    return name[0] if name else line.split()[0]


def thin(indices: np.ndarray, limit: int | None) -> np.ndarray:
    """Returns at most `limit` of the indices, evenly spaced. None returns all of them."""
    if limit is None or limit >= len(indices):
        return indices
    return indices[np.linspace(0, len(indices) - 1, limit).astype(int)]


def images_below(root: Path) -> Iterator[Path]:
    """The image files in a folder, at any depth. Links are followed, hidden folders left out."""
    real_parents = {str(root): {os.path.realpath(root)}}
    for folder, subfolders, files in os.walk(root, followlinks=True):
        parents = real_parents.pop(folder)
        for name in [*subfolders]:
            path = os.path.join(folder, name)
            real = os.path.realpath(path)
            if name.startswith(".") or real in parents:  # a link to a parent would never end
                subfolders.remove(name)
            else:
                real_parents[path] = parents | {real}
        for name in files:
            path = Path(folder, name)
            if path.suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                yield path


class FolderSource(Source):
    """Images in a folder, with or without subfolders for splits and classes.

    A split is the subfolder with its name. In a folder without split folders, every split is the
    whole folder. Images are in one subfolder per class, at any depth, or directly in the folder
    (label -1). Names are paths relative to the split's folder, and images are sorted by name.
    """

    def __init__(self, folder: str | Path, split: str):
        root = Path(folder).expanduser()
        if not root.is_dir():
            raise FileNotFoundError(f"no folder {root}")
        available = [name for name in _SPLIT_FOLDERS if (root / name).is_dir()]
        if available:
            if "+" in split:
                raise ValueError(f"{split!r}: the splits of a folder cannot be added")
            split = existing_split(split, available, f"folder:{folder}")
            root = root / split.partition("[")[0]
        names = sorted(path.relative_to(root).as_posix() for path in images_below(root))
        if not names:
            raise ValueError(f"no images in {root} ({', '.join(sorted(IMAGE_SUFFIXES))})")
        classes = sorted({name.partition("/")[0] for name in names if "/" in name})
        self.class_names = classes or None
        self._labels = {name: label for label, name in enumerate(classes)}
        self._folder = root
        self._names = names[_slice_of(split, len(names))]

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> dict:
        name = self._names[index]
        label = self._labels.get(name.partition("/")[0], -1)
        return {"image": (self._folder / name).read_bytes(), "label": label}

    def name(self, index: int) -> str:
        return self._names[index]

    @property
    def fingerprint(self) -> str:
        return f"{len(self)} images with names of digest {digest(self._names)}"

    def __repr__(self) -> str:
        return str(self._folder)


def existing_split(split: str, available: Iterable[str], dataset: str) -> str:
    """Returns the split with each name that does not exist replaced by its stand-in."""

    def existing(match: re.Match) -> str:
        for name in _STAND_INS.get(match[0], (match[0],)):
            if name in available:
                return name
        raise ValueError(f"{dataset} has no split {match[0]!r}; it has: {', '.join(available)}")

    return re.sub(r"(?<![\w\[])\w+(?=$|[\[+])", existing, split)


def _slice_of(split: str, size: int) -> slice:
    """Returns the slice of `size` images that a TFDS split such as "train[:10%]" selects."""
    return slice(size) if "[" not in split else _tfds_source().slice_of(split, size)


def _tfds_source() -> ModuleType:
    """The module for TFDS, which folders do not need."""
    from ttame_jax.data import tfds_source

    return tfds_source

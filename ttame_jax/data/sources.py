"""Where images come from: prepared TFDS data sets and plain folders, read one record at a time."""

import importlib.util
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from ttame_jax.data.digits import Digits  # importing it registers it with TFDS

_STAND_INS = {"validation": ("validation", "val", "test")}
_SPLIT_FOLDERS = ("train", "validation", "val", "test")
_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_NAME_FEATURES = ("file_name", "filename", "image/filename", "id")


class Source(ABC):
    """Encoded images by index. Sources can be pickled, for the loader's worker processes."""

    class_names: list[str] | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> dict:
        """Returns one record, its image still encoded.

        `image` (bytes), `label` (int, -1 where unknown) and, where the set has boxes, `box`
        (float32 [4]: ymin, xmin, ymax, xmax as fractions of the image's height and width).
        Raises OSError where the file cannot be read.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """Returns what to call an image in warnings and lists: its file name where there is one."""

    def indices_of(self, names: Iterable[str]) -> np.ndarray:
        """Returns the indices (int64) of the images of these names, in the order of the names.

        Names that no image has are left out: a published list may name more than a sample holds.
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


def load_source(dataset: str, split: str, data_dir: str | Path | None = None) -> Source:
    """Opens one split of a data set.

    Args:
      dataset: a TFDS name ("imagenet2012", "cifar10:3.0.2"), "folder:DIR" or "digits", the
        built-in set, which is generated on first use.
      split: in TFDS's syntax, such as "train" or "validation[:200]". A set without a split
        "validation" gives its split "val" or "test" instead.
      data_dir: TFDS's folder of prepared data sets; by default its usual one.

    Raises:
      FileNotFoundError: the data are not there; the message names the command that brings them.
      ValueError: there is no such data set or split, or it holds no images.
    """
    kind, _, folder = dataset.partition(":")
    if kind == "folder":
        return FolderSource(folder, split)
    return TfdsSource(dataset, split, data_dir)


def select(source: Source, names: str | Path | None = None, limit: int | None = None) -> np.ndarray:
    """Returns the indices (int64) of the images that a list names, evenly thinned to a limit.

    Args:
      source: the images.
      names: a text file with `FILENAME LABEL` a line, as the authors' lists; None is all images.
      limit: how many at most; None is no limit.

    Raises:
      ValueError: no image of the list is there.
    """
    indices = np.arange(len(source))
    if names is not None:
        lines = epath.Path(names).read_text().splitlines()
        wanted = [line.split()[0] for line in lines if line.strip()]
        indices = source.indices_of(wanted)
        print(f"{len(indices)} of the {len(wanted)} images of {names} are in {source}")
        if not len(indices):
            raise ValueError(f"no image of {names} is in {source}: choose another split")
    return thin(indices, limit)


def thin(indices: np.ndarray, limit: int | None) -> np.ndarray:
    """At most `limit` of the indices (None: all), evenly spread."""
    if limit is None or limit >= len(indices):
        return indices
    return indices[np.linspace(0, len(indices) - 1, limit).astype(int)]


class TfdsSource(Source):
    """A split of a data set prepared by TFDS in a random-access format."""

    def __init__(self, dataset: str, split: str, data_dir: str | Path | None = None):
        builder = _builder(dataset, data_dir)
        if isinstance(builder, Digits) and not builder.info.splits:
            builder = _builder(dataset, data_dir, file_format="array_record")
            builder.download_and_prepare()
        splits = builder.info.splits
        if not splits:
            raise FileNotFoundError(
                f"{dataset} is not prepared in {builder.data_dir}; run: "
                f"{_prepare_command(dataset, data_dir)}"
            )
        self._split = _existing_split(split, splits, dataset)
        self._dataset = dataset
        features = builder.info.features
        self._image = _feature_of_type(features, tfds.features.Image)
        if self._image is None:
            raise ValueError(f"{dataset} has no image feature; its features: {sorted(features)}")
        self._label = _feature_of_type(features, tfds.features.ClassLabel)
        self._box = _feature_of_type(features, tfds.features.BBoxFeature)
        self._name = next((name for name in _NAME_FEATURES if name in features), None)
        if self._label is not None and features[self._label].num_classes:
            self.class_names = features[self._label].names
        try:
            self._records = builder.as_data_source(
                self._split, decoders={self._image: tfds.decode.SkipDecoding()}
            )
        except NotImplementedError as error:
            raise FileNotFoundError(
                f"{dataset} in {builder.data_dir} cannot be read by index "
                f"({builder.info.file_format.value}); prepare it in another folder: "
                f"{_prepare_command(dataset, None)}"
            ) from error

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        features = self._records[index]
        label = -1 if self._label is None else int(features[self._label])
        record = {"image": features[self._image], "label": label}
        if self._box is not None:
            record["box"] = features[self._box]
        return record

    def name(self, index: int) -> str:
        if self._name is None:
            return f"{self}[{index}]"
        name = self._records[index][self._name]
        return name.decode() if isinstance(name, bytes) else str(name)

    def __repr__(self) -> str:
        return f"{self._dataset}/{self._split}"


class FolderSource(Source):
    """Images in a folder, with or without folders for splits and for classes.

    A split is the sub-folder of its name; a folder without any split folders is all one split.
    Images lie in one sub-folder per class, in any depth, or directly in the folder (label -1).
    Names are paths relative to the split's folder, and images are ordered by them.
    """

    def __init__(self, folder: str | Path, split: str):
        root = Path(folder).expanduser()
        if not root.is_dir():
            raise FileNotFoundError(f"no folder {root}")
        available = [name for name in _SPLIT_FOLDERS if (root / name).is_dir()]
        if available:
            split = _existing_split(split, available, f"folder:{folder}")
            root = root / split.partition("[")[0]
        names = sorted(
            path.relative_to(root).as_posix()
            for path in root.rglob("*")
            if path.suffix.lower() in _IMAGE_SUFFIXES and not path.name.startswith(".")
        )
        if not names:
            raise ValueError(f"no images in {root} ({', '.join(sorted(_IMAGE_SUFFIXES))})")
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

    def __repr__(self) -> str:
        return str(self._folder)


def prepare(name: str, data_dir: str | Path | None = None, manual_dir: str | Path | None = None):
    """Prepares a TFDS data set, by TFDS's own builder, in the format this project reads.

    Prints the folder and the number of images of each split. A data set that is there already
    is left as it is.

    Args:
      name: a TFDS name.
      data_dir: folder of prepared data sets; by default TFDS's usual one.
      manual_dir: folder of the archives of sets that must be downloaded by hand, as ImageNet.

    Raises:
      ValueError: there is no such data set.
      ModuleNotFoundError: TensorFlow is missing, which TFDS needs for preparing.
      FileNotFoundError: archives are missing.
    """
    builder = _builder(name, data_dir, file_format="array_record")
    already = bool(builder.info.splits)
    if not already:
        if importlib.util.find_spec("tensorflow") is None:
            raise ModuleNotFoundError(
                "preparing a data set needs TensorFlow; run: pip install 'ttame-jax[prepare]'"
            )
        _prepare(builder, manual_dir)
    images = ", ".join(
        f"{split}: {info.num_examples}" for split, info in builder.info.splits.items()
    )
    print(f"{name} {'was already' if already else 'is'} prepared in {builder.data_dir} ({images})")


def _prepare(builder, manual_dir: str | Path | None):
    config = tfds.download.DownloadConfig(manual_dir=manual_dir and Path(manual_dir).expanduser())
    try:
        builder.download_and_prepare(download_config=config)
    except AssertionError as error:  # what TFDS raises where the archives are missing
        instructions = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
        if instructions is None:
            raise
        where = manual_dir or "--manual-dir DIR"
        raise FileNotFoundError(
            f"{builder.name} needs archives in {where}: {' '.join(instructions.split())}"
        ) from error


def _builder(dataset: str, data_dir: str | Path | None, **kwargs):
    try:
        return tfds.builder(dataset, data_dir=data_dir, **kwargs)
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(
            f"unknown data set {dataset!r}: give a TFDS name "
            "(https://www.tensorflow.org/datasets/catalog), 'folder:DIR' or 'digits'"
        ) from error


def _prepare_command(dataset: str, data_dir: str | Path | None) -> str:
    return f"ttame prepare {dataset} --manual-dir DIR --data-dir {data_dir or 'DIR'}"


def _feature_of_type(features, kind: type) -> str | None:
    return next((name for name, feature in features.items() if type(feature) is kind), None)


def _existing_split(split: str, available: Iterable[str], dataset: str) -> str:
    """Returns the split with each name in it replaced by its stand-in where it does not exist."""

    def existing(match: re.Match) -> str:
        for name in _STAND_INS.get(match[0], (match[0],)):
            if name in available:
                return name
        raise ValueError(f"{dataset} has no split {match[0]!r}; it has: {', '.join(available)}")

    return re.sub(r"(?<![\w\[])\w+(?=$|[\[+])", existing, split)


def _slice_of(split: str, size: int) -> slice:
    """Returns the part of `size` images that a TFDS split such as "train[:10%]" means."""
    name = split.partition("[")[0]
    whole = tfds.core.SplitInfo(name=name, shard_lengths=[size], num_bytes=0)
    (part,) = tfds.core.ReadInstruction.from_spec(split).to_absolute({name: whole})
    return slice(part.from_, part.to)

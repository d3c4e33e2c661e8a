"""Sources of images: prepared TFDS data sets and plain folders, read one record at a time."""

import functools
import importlib.util
import operator
import re
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from ttame_jax.data.digits import Digits  # importing it registers it with TFDS
from ttame_jax.data.transforms import MAX_PIXELS
from ttame_jax.errors import Damaged
from ttame_jax.files import digest, in_bucket

_STAND_INS = {"validation": ("validation", "val", "test")}
_SPLIT_FOLDERS = ("train", "validation", "val", "test")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_NAME_FEATURES = ("file_name", "filename", "image/filename", "id")


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
    try:
        tfds.core.ReadInstruction.from_spec(split)
    except ValueError as error:
        raise ValueError(
            f"{split!r} is not a split: write train, train[:10%] or train[100:200]"
        ) from error
    kind, _, folder = dataset.partition(":")
    source = (
        FolderSource(folder, split) if kind == "folder" else TfdsSource(dataset, split, data_dir)
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
            lines = epath.Path(names).read_text().splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{names} is not a list of images: it is not a text file") from error
        wanted = [line.split()[0] for line in lines if line.strip()]
        indices = source.indices_of(wanted)
        print(f"{len(indices)} of the {len(wanted)} images of {names} are in {source}")
        if not len(indices):
            raise ValueError(f"no image of {names} is in {source}: choose another split")
    return thin(indices, limit)


def thin(indices: np.ndarray, limit: int | None) -> np.ndarray:
    """Returns at most `limit` of the indices, evenly spaced. None returns all of them."""
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
        if _size_of(splits, self._split) < 1:
            raise ValueError(f"the split {split!r} of {dataset} has no images")
        self._dataset, self._full_name = dataset, builder.info.full_name
        features = builder.info.features
        self._image = _feature_of_type(features, tfds.features.Image)
        if self._image is None:
            raise ValueError(f"{dataset} has no image feature; its features: {sorted(features)}")
        self._label = _feature_of_type(features, tfds.features.ClassLabel)
        self._boxes = _path_to_boxes(features)
        self.has_boxes = self._boxes is not None
        self._name = next((name for name in _NAME_FEATURES if name in features), None)
        if self._label is not None and features[self._label].num_classes:
            self.class_names = features[self._label].names
        try:
            self._records: Any = builder.as_data_source(
                # pyrefly: ignore[bad-argument-type]  # TFDS's decorator hides the signature
                self._split,
                decoders={self._image: tfds.decode.SkipDecoding()},
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
        if self._boxes is not None:
            boxes = functools.reduce(operator.getitem, self._boxes, features)
            record["boxes"] = np.reshape(boxes, (-1, 4)).astype(np.float32)
        return record

    def name(self, index: int) -> str:
        if self._name is None:
            return f"{self}[{index}]"
        name = self._records[index][self._name]
        return name.decode() if isinstance(name, bytes) else str(name)

    @property
    def fingerprint(self) -> str:
        return f"{len(self)} images of {self._full_name}/{self._split}"

    def __repr__(self) -> str:
        return f"{self._dataset}/{self._split}"


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
            split = _existing_split(split, available, f"folder:{folder}")
            root = root / split.partition("[")[0]
        names = sorted(
            path.relative_to(root).as_posix()
            for path in root.rglob("*")
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
        )
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


def prepare(name: str, data_dir: str | Path | None = None, manual_dir: str | Path | None = None):
    """Prepares a TFDS data set with TFDS's own builder, in the format that this project reads.

    Prints the folder and the number of images of each split. A data set that is already prepared
    is not changed.

    Args:
      name: a TFDS name.
      data_dir: the folder of prepared data sets. None selects TFDS's default.
      manual_dir: the folder of archives that must be downloaded manually, as for ImageNet.

    Raises:
      ValueError: the data set does not exist.
      ModuleNotFoundError: TensorFlow, which TFDS needs to prepare data sets, is not installed.
      FileNotFoundError: archives are missing.
      Damaged: an archive is damaged.
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
    except tarfile.TarError as error:
        raise Damaged(
            f"an archive of {builder.name} in {manual_dir} is damaged: {error}"
        ) from error
    except AssertionError as error:  # TFDS raises it if the archives are missing
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
    except (ValueError, AssertionError) as error:  # of names, and of configurations or versions
        raise ValueError(
            f"unknown data set {dataset!r}, or its configuration or version: give a TFDS name "
            "(https://www.tensorflow.org/datasets/catalog), 'folder:DIR' or 'digits'"
        ) from error


def _prepare_command(dataset: str, data_dir: str | Path | None) -> str:
    return f"ttame prepare {dataset} --manual-dir DIR --data-dir {data_dir or 'DIR'}"


def _feature_of_type(features, kind: type) -> str | None:
    return next((name for name, feature in features.items() if type(feature) is kind), None)


def _path_to_boxes(feature) -> tuple[str, ...] | None:
    """Returns the keys from a record to its boxes, such as ("objects", "bbox"), or None.

    Only boxes in TFDS's default format count: ymin, xmin, ymax, xmax as fractions.
    """
    if type(feature) is tfds.features.BBoxFeature:
        return () if feature.bbox_format == tfds.features.BBoxFeature().bbox_format else None
    if type(feature) is tfds.features.Sequence:
        return _path_to_boxes(feature.feature)
    if type(feature) is tfds.features.FeaturesDict:
        for name, inner in feature.items():
            if (path := _path_to_boxes(inner)) is not None:
                return (name, *path)
    return None


def _existing_split(split: str, available: Iterable[str], dataset: str) -> str:
    """Returns the split with each name that does not exist replaced by its stand-in."""

    def existing(match: re.Match) -> str:
        for name in _STAND_INS.get(match[0], (match[0],)):
            if name in available:
                return name
        raise ValueError(f"{dataset} has no split {match[0]!r}; it has: {', '.join(available)}")

    return re.sub(r"(?<![\w\[])\w+(?=$|[\[+])", existing, split)


def _size_of(splits, split: str) -> int:
    """The number of records in a split; 0 if it lies outside the data set."""
    try:
        return splits[split].num_examples
    except ValueError:
        return 0


def _slice_of(split: str, size: int) -> slice:
    """Returns the slice of `size` images that a TFDS split such as "train[:10%]" selects."""
    name = split.partition("[")[0]
    whole = tfds.core.SplitInfo(name=name, shard_lengths=[size], num_bytes=0)
    (part,) = tfds.core.ReadInstruction.from_spec(split).to_absolute({name: whole})
    return slice(part.from_, part.to)

"""Data sets prepared by TFDS, and how they are prepared."""

import functools
import importlib.util
import operator
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from ttame_jax.data.digits import Digits  # importing it registers it with TFDS
from ttame_jax.data.sources import Source, existing_split
from ttame_jax.errors import Damaged

_NAME_FEATURES = ("file_name", "filename", "image/filename", "id")


def check_split(split: str) -> None:
    """Raises ValueError if a split is not one in TFDS's syntax."""
    try:
        tfds.core.ReadInstruction.from_spec(split)
    except ValueError as error:
        raise ValueError(
            f"{split!r} is not a split: write train, train[:10%] or train[100:200]"
        ) from error


def slice_of(split: str, size: int) -> slice:
    """Returns the slice of `size` images that a TFDS split such as "train[:10%]" selects."""
    name = split.partition("[")[0]
    whole = tfds.core.SplitInfo(name=name, shard_lengths=[size], num_bytes=0)
    (part,) = tfds.core.ReadInstruction.from_spec(split).to_absolute({name: whole})
    return slice(part.from_, part.to)


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
        self._split = existing_split(split, splits, dataset)
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


def _size_of(splits, split: str) -> int:
    """The number of records in a split; 0 if it lies outside the data set."""
    try:
        return splits[split].num_examples
    except ValueError:
        return 0

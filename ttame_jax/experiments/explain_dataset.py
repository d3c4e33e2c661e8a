"""`ttame explain --dataset`: explanation maps of a whole data set, in Parquet files."""

import collections
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from ttame_jax.data import Source, select
from ttame_jax.data.evaluation import EvaluationBatches, in_batches
from ttame_jax.errors import Damaged
from ttame_jax.experiments.cost import estimate, images_per_batch, is_slow
from ttame_jax.experiments.evaluate import Selection
from ttame_jax.experiments.explain import ExplainerConfig, parse_classes
from ttame_jax.explainer import Explainer
from ttame_jax.files import check_output_folder, digest, locked, to_json, write_atomically
from ttame_jax.mesh import AXIS
from ttame_jax.methods import Explanations, Method
from ttame_jax.preprocessing import to_float
from ttame_jax.runs import load_config
from ttame_jax.weights import transfer

INFO = "_explanations.json"
"""File that says what the maps in a folder are. Readers of Parquet skip such a name."""

AHEAD = 2
"""Batches that are explained while the results of an earlier one are copied."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExplainDatasetConfig(Selection, ExplainerConfig):
    """The images of a data set, a classifier and a method."""

    dataset: str = dataclasses.field()  # without the default that it inherits
    """A TFDS data set, folder:DIR or digits."""
    classes: str = "predicted"
    """Classes to explain: predicted, top5 (or another number), all, or ids and names, separated by
    commas."""
    output: Path
    """Folder for the Parquet files. The same command resumes an interrupted one."""
    batch_size: int = 32
    """Images per batch, over the devices of a process. Methods with many forward passes use smaller
    batches."""
    shard_size: int = 4096
    """Images per file."""

    def __post_init__(self):
        Selection.__post_init__(self)
        ExplainerConfig.__post_init__(self)
        if self.view == "whole":
            raise ValueError("--view whole: the images of a data set are explained as crops")
        for name in ("batch_size", "shard_size"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")


def explain_dataset(config: ExplainDatasetConfig) -> None:
    """Writes the maps of all images of a data set, with names, classes and probabilities.

    Files that are already there are not computed again. Each process of several explains every
    n-th file's images on its own devices.

    Raises:
      ValueError: an option is wrong, or the folder has maps of other settings.
      FileNotFoundError: the run or the images do not exist.
      Damaged: too many images are unreadable.
      Failure: another process writes to the folder.
    """
    check_output_folder(config.output)
    mesh = Mesh(np.array(jax.local_devices()), (AXIS,))
    if config.batch_size % mesh.size:
        raise ValueError(
            f"--batch-size {config.batch_size} does not divide over {mesh.size} devices"
        )
    source = config.source(load_config(config.run) if config.run else None, config.max_pixels)
    indices = select(source, config.list, config.limit)
    explainer = config.open()
    classes, likeliest = explainer.resolve(parse_classes(config.classes, explainer))
    explain = _Program(explainer.method, classes, likeliest, mesh, config.batch_size)
    with locked(config.output):
        _settle(config, explainer, classes, source, indices)
        if is_slow(explainer.method):
            _say(estimate(explainer.method, len(indices)))
        _write(config, source, indices, explain)


def _write(
    config: ExplainDatasetConfig, source: Source, indices: np.ndarray, explain: "_Program"
) -> None:
    """Explains the images of the files that are missing."""
    shards = _shards(config.output, indices, config.shard_size)
    mine = shards[jax.process_index() :: jax.process_count()]
    finished = {path: pq.read_metadata(path).num_rows for path, _ in mine if path.exists()}
    shape = (explain.batch_size,)
    left = {path: in_batches(part, shape) for path, part in mine if path not in finished}
    done = sum(len(part) for path, part in mine if path in finished)
    batches = EvaluationBatches(
        source,
        explain.preprocessing,
        np.concatenate([in_batches(indices[:0], shape), *left.values()]),
        before=(done, done - sum(finished.values())),
    )
    total = sum(len(part) for _, part in mine)
    with tqdm(total=total, initial=done, unit="image", disable=jax.process_index() > 0) as bar:
        columns = _explained(explain, source, batches, bar)
        for path, its_batches in left.items():
            write_atomically(path, _parquet([*itertools.islice(columns, len(its_batches))]))
    _say(f"{len(indices)} images, {len(shards)} files: {config.output}")


def _say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, file=sys.stderr)


def _settle(
    config: ExplainDatasetConfig,
    explainer: Explainer,
    classes: np.ndarray | None,
    source: Source,
    indices: np.ndarray,
) -> None:
    """Writes what the maps are, or checks that those in the folder are the same."""
    settings = {
        "backbone": explainer.backbone.name,
        "method": explainer.method.name,
        "options": config.method_config,
        "classes": config.classes if classes is None else classes.tolist(),
        "preprocessing": json.loads(to_json(dataclasses.asdict(explainer.backbone.preprocessing))),
        "precision": str(explainer.backbone.dtype),
        "arrays": transfer.digest(explainer.method),
        "images": f"{source.fingerprint}, selection {digest([indices])}",
        "shard_size": config.shard_size,
    }
    path = config.output / INFO
    if path.exists():
        try:
            there = json.loads(path.read_text())["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise Damaged(f"{path} is damaged: choose another --output") from error
        differing = [name for name, value in settings.items() if there.get(name) != value]
        if differing:
            raise ValueError(
                f"{config.output} has maps of another setting ({', '.join(differing)}): choose "
                "another --output"
            )
    elif jax.process_index() == 0:
        info = {
            "settings": settings,
            "class_names": explainer.class_names,
            "labels": source.class_names,
            "image_size": explainer.backbone.preprocessing.image_size,
        }
        write_atomically(path, to_json(info, indent=2) + "\n")


def _shards(output: Path, indices: np.ndarray, size: int) -> list[tuple[Path, np.ndarray]]:
    """The files and the images of each."""
    parts = np.split(indices, range(size, len(indices), size))
    return [
        (output / f"maps-{i:05d}-of-{len(parts):05d}.parquet", part) for i, part in enumerate(parts)
    ]


class _Program:
    """Explains batches, sharded over the devices of this process."""

    def __init__(
        self,
        method: Method,
        classes: np.ndarray | None,
        likeliest: int,
        mesh: Mesh,
        largest_batch: int,
    ):
        graph, state = nnx.split(method)

        def explain(state, images):
            chosen = None if classes is None else jax.numpy.asarray(classes[0])
            return nnx.merge(graph, state).explain(to_float(images), chosen, likeliest)

        self._step = jax.jit(
            jax.shard_map(
                explain, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P(AXIS), check_vma=False
            )
        )
        self._state = jax.device_put(state, NamedSharding(mesh, P()))
        self._sharding = NamedSharding(mesh, P(AXIS))
        self.preprocessing = method.backbone.preprocessing
        self.batch_size = images_per_batch(method, largest_batch, mesh.size)

    def __call__(self, images: np.ndarray) -> Explanations:
        return self._step(self._state, jax.device_put(images, self._sharding))


def _explained(
    explain: _Program, source: Source, batches: EvaluationBatches, bar: tqdm
) -> Iterator[dict[str, np.ndarray]]:
    """The columns of each batch. Unreadable images are left out."""
    running = collections.deque()
    for batch in batches:
        running.append((batch, explain(batch["image"])))
        if len(running) > AHEAD:
            yield _columns(source, *running.popleft(), bar)
    while running:
        yield _columns(source, *running.popleft(), bar)


def _columns(
    source: Source, batch: dict[str, np.ndarray], explained: Explanations, bar: tqdm
) -> dict[str, np.ndarray]:
    """The name of each image, its index in the split and its label (-1 if unknown); the explained
    classes [n, K], their probabilities [n, K] and their maps [n, K, h, w]."""
    explained, valid = jax.device_get(explained), batch["valid"]
    bar.update(int((batch["index"] >= 0).sum()))
    index = batch["index"][valid]
    return {
        "name": np.array([source.name(i) for i in index.tolist()], object),
        "index": index,
        "label": batch["label"][valid],
        "classes": explained.classes[valid],
        "probabilities": explained.probabilities[valid],
        "maps": explained.maps[valid],
    }


def _parquet(batches: Sequence[dict[str, np.ndarray]]) -> bytes:
    """A Parquet file of the batches' columns, those of arrays as fixed-shape tensors."""
    columns = {}
    for name in batches[0]:
        values = np.concatenate([batch[name] for batch in batches])
        kind = pa.string() if values.dtype == object else None  # which an empty array does not tell
        columns[name] = _tensors(values) if values.ndim > 1 else pa.array(values, kind)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def _tensors(values: np.ndarray) -> pa.ExtensionArray:
    """Arrow's array of tensors. Its `from_numpy_ndarray` does not take an empty array."""
    kind = pa.fixed_shape_tensor(pa.from_numpy_dtype(values.dtype), values.shape[1:])
    size = kind.storage_type.list_size
    storage = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), size)
    return pa.ExtensionArray.from_storage(kind, storage)

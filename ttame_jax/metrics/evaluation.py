"""Measures an explanation method image by image, data-parallel, and averages over the images."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ttame_jax.data import Source, evaluation_batches
from ttame_jax.masking import upsample
from ttame_jax.mesh import AXIS, data_mesh, gather, replicate, shard_batch
from ttame_jax.methods import Method
from ttame_jax.metrics.base import (
    Metric,
    Rows,
    Sample,
    load_metrics,
    measure_sample,
    pixels_inside,
)
from ttame_jax.preprocessing import Masking, to_float


class Evaluator:
    """Measures a method's maps for the classes that its backbone predicts.

    Results depend neither on the number of devices nor on the batch size.

    Args:
      method: the method to measure.
      source: the images.
      masking: how a map masks an image for AD and IC. None selects the backbone's own masking.
      metrics: names of the metrics, see `list_metrics`.
      indices: the images of the source to measure. None selects all of them.
      batch_size: images per batch, over all devices of all processes. A batch is no larger than
        all images need.
      seed: seed of ROAD's noise.

    Raises:
      ValueError: a metric does not exist or needs boxes that the source does not have, or the
        batch size is not divisible by the number of devices.
    """

    def __init__(
        self,
        method: Method,
        source: Source,
        *,
        masking: Masking | None = None,
        metrics: Sequence[str] = ("ad", "ic"),
        indices: Sequence[int] | np.ndarray | None = None,
        batch_size: int = 32,
        seed: int = 0,
    ):
        self.method, self.source, self.metrics = method, source, tuple(metrics)
        self.masking = masking or method.backbone.masking
        self.indices, self.seed = indices, seed
        self.mesh = data_mesh()
        if batch_size % self.mesh.size:
            raise ValueError(
                f"--batch-size {batch_size} does not divide over {self.mesh.size} devices"
            )
        images = len(source) if indices is None else len(indices)
        self.batch_size = min(batch_size, -(-images // self.mesh.size) * self.mesh.size)
        loaded = load_metrics(self.metrics)
        needing_boxes = [metric.name for metric in loaded if metric.needs]
        if needing_boxes and not source.has_boxes:
            raise ValueError(
                f"{source} has no boxes: give them with --boxes FILE, or remove the metric "
                f"{needing_boxes[0]!r}"
            )
        self._boxes = bool(needing_boxes)
        self._step = _compiled(nnx.graphdef(method), self.mesh, self.masking, self.metrics)

    def __call__(self, state: nnx.State | None = None) -> Rows:
        """Returns the rows of all images. `state` replaces the method's own, as in training."""
        parts = list(self.batches(state=state))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def figures(self, state: nnx.State | None = None) -> dict[str, Any]:
        """Returns the means in % under flat names, such as `{"AD_100": 8.7, "AD_50": 9.3}`."""
        return flatten_dict(summarise(self(state), self.metrics), sep="_")

    def batches(
        self,
        indices: Sequence[int] | np.ndarray | None = None,
        done: int = 0,
        state: nnx.State | None = None,
    ) -> Iterator[Rows]:
        """Yields the rows batch by batch, of all images or of the given ones.

        `done` is the number of other images that an interrupted evaluation has measured.

        Raises:
          Damaged: too many images are unreadable.
          ValueError: a map is not finite.
        """
        state = replicate(nnx.state(self.method) if state is None else state, self.mesh)
        key = jax.random.key(self.seed)
        for batch in evaluation_batches(
            self.source,
            self.method.backbone.preprocessing,
            self.batch_size // jax.process_count(),
            indices=self.indices if indices is None else indices,
            boxes=self._boxes,
            before=(done, 0),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        ):
            del batch["label"]
            batch = {name: shard_batch(values, self.mesh) for name, values in batch.items()}
            rows = {"index": batch["index"], **self._step(state, batch, key)}
            rows, valid = gather((rows, batch["valid"]))
            finite = rows.pop("finite") | ~valid
            if not finite.all():
                name = self.source.name(int(rows["index"][~finite][0]))
                raise ValueError(f"the map of {name} is not finite")
            yield {name: values[valid] for name, values in rows.items()}


@functools.lru_cache(maxsize=8)
def _compiled(
    graph: nnx.GraphDef, mesh: Mesh, masking: Masking, metrics: tuple[str, ...]
) -> jax.stages.Wrapped:
    """Measures a batch; the same program for every evaluator of the same structure.

    Tracing takes seconds, and a search over learning rates has an evaluator for each rate.
    """
    loaded = load_metrics(metrics)

    def step(state, batch, key):
        return _measure(nnx.merge(graph, state), batch, key, masking, loaded)

    # ROAD's solver iterates on each device until that device's images converge, which the
    # check of varying manual axes cannot follow.
    return jax.jit(
        jax.shard_map(
            step, mesh=mesh, in_specs=(P(), P(AXIS), P()), out_specs=P(AXIS), check_vma=False
        )
    )


def _measure(
    method: Method,
    batch: Mapping[str, jax.Array],
    key: jax.Array,
    masking: Masking,
    metrics: Sequence[Metric],
) -> dict[str, jax.Array]:
    """Returns the rows of a batch from `evaluation_batches`, without their indices."""

    def predict(standardised):
        return jax.nn.softmax(method.backbone(standardised)[0])

    images, preprocessing = to_float(batch["image"]), method.backbone.preprocessing
    boxes, size = batch.get("boxes"), images.shape[1:3]
    probabilities = predict(preprocessing.standardise(images))
    classes = probabilities.argmax(axis=-1)
    sample = Sample(
        predict=predict,
        images=images,
        maps=upsample(method(images, classes[:, None])[:, 0], size),
        classes=classes,
        confidence=probabilities.max(axis=-1),
        preprocessing=preprocessing,
        masking=masking,
        index=batch["index"],
        key=key,
        boxes=boxes,
        inside=None if boxes is None else pixels_inside(boxes, size),
    )
    finite = jnp.isfinite(sample.maps).all(axis=(1, 2))
    return measure_sample(sample, metrics) | {"finite": finite}


def summarise(rows: Rows, metrics: Sequence[str]) -> dict[str, Any]:
    """Returns means over the rows in %: `{"AD": {"100": ...}, "ROAD": {"MoRF": {...}, ...}}`."""
    return {metric.key: metric.summarise(rows) for metric in load_metrics(metrics)}


def intervals(rows: Rows, metrics: Sequence[str], resamples: int = 1000) -> dict[str, Any]:
    """Returns bootstrap 95 % intervals: the tree of `summarise` with leaves `[low, high]`."""
    return bootstrap(rows, lambda rows: summarise(rows, metrics), resamples)


def bootstrap(
    rows: Rows, summarise: Callable[[Rows], dict[str, Any]], resamples: int = 1000
) -> dict[str, Any]:
    """Returns bootstrap 95 % intervals of a summary of rows: its tree, with leaves `[low, high]`.

    Arguments are those of `replicates`.
    """
    return jax.tree.map(interval, replicates(rows, summarise, resamples))


def interval(values: np.ndarray) -> list[float]:
    """Returns the 95 % interval of values, `[low, high]`. NaN is left out."""
    return np.nanpercentile(values, (2.5, 97.5)).tolist()


def replicates(
    rows: Rows, summarise: Callable[[Rows], dict[str, Any]], resamples: int = 1000
) -> dict[str, Any]:
    """Returns a summary of rows for resampled images.

    The images of each resampling depend on the number of images only. Differences between the
    replicates of two methods on the same images are therefore those of a paired bootstrap.

    Args:
      rows: one for each image.
      summarise: returns a tree of numbers.
      resamples: number of resamplings of the images.

    Returns:
      The tree, with leaves `[resamples]`.
    """
    rng, count = np.random.default_rng(0), len(rows["index"])
    trees = []
    for _ in range(resamples):
        chosen = rng.integers(count, size=count)
        trees.append(summarise({name: x[chosen] for name, x in rows.items()}))
    return jax.tree.map(lambda *values: np.array(values), *trees)

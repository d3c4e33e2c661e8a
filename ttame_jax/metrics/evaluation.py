"""Measures an explanation method image by image, data-parallel, and sums the images up."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from ttame_jax.data import Source, evaluation_batches
from ttame_jax.masking import MaskingKind, upsample
from ttame_jax.mesh import AXIS, data_mesh, gather, replicate, shard_batch
from ttame_jax.methods import Method
from ttame_jax.metrics.ad_ic import (
    PERCENTAGES,
    average_drop,
    increase_in_confidence,
    masked_confidences,
)
from ttame_jax.metrics.auc import deletion, insertion
from ttame_jax.metrics.pointing import in_box, peak
from ttame_jax.metrics.road import PROTOCOLS, road

Measure = Literal["ad", "ic", "road", "road_reference", "insertion", "deletion", "pointing"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
ROAD_PROTOCOLS = {"road": "paper", "road_reference": "reference"}
AREAS = {"insertion": insertion, "deletion": deletion}
Rows = dict[str, np.ndarray]
"""Arrays with a row an image: ``index``, ``class``, ``confidence``, and what was measured."""


class Evaluator:
    """Measures a method for the classes that its backbone predicts.

    Results depend neither on the number of devices nor on the batch size.

    Args:
      method: what is measured.
      source: the images.
      masking: how a map masks an image for AD and IC; None is the backbone's own kind.
      measures: which ones; pointing needs a source with boxes.
      indices: the images of the source to measure; None is all of them.
      batch_size: images at a time, over all devices of all processes.
      seed: of ROAD's noise.

    Raises:
      ValueError: if the batch does not divide over the devices, or pointing finds no boxes.
    """

    def __init__(
        self,
        method: Method,
        source: Source,
        *,
        masking: MaskingKind | None = None,
        measures: Sequence[Measure] = ("ad", "ic"),
        indices: Sequence[int] | None = None,
        batch_size: int = 32,
        seed: int = 0,
    ):
        self.method, self.source, self.measures = method, source, tuple(measures)
        self.masking = masking or method.backbone.masking
        self.indices, self.batch_size, self.seed = indices, batch_size, seed
        self.mesh = data_mesh()
        if batch_size % self.mesh.size:
            raise ValueError(
                f"--batch-size {batch_size} does not divide over {self.mesh.size} devices"
            )
        if "pointing" in measures and "box" not in source[0]:
            raise ValueError(f"{source} has no boxes: leave out the measure 'pointing'")
        self._step = self._compile()

    def __call__(self, state: nnx.State | None = None) -> Rows:
        """All rows; `state` stands in for the method's own arrays, as in training."""
        parts = list(self.batches(state))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def batches(
        self, state: nnx.State | None = None, indices: Sequence[int] | None = None
    ) -> Iterator[Rows]:
        """The rows a batch at a time, of all images or of those given."""
        state = replicate(nnx.state(self.method) if state is None else state, self.mesh)
        key = jax.random.key(self.seed)
        for batch in evaluation_batches(
            self.source,
            self.method.backbone.preprocessing,
            self.batch_size // jax.process_count(),
            indices=self.indices if indices is None else indices,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        ):
            image, index, valid = (
                shard_batch(batch[name], self.mesh) for name in ("image", "index", "valid")
            )
            rows = {"index": index, **self._step(state, image, index, key)}
            rows, valid = gather((rows, valid))
            rows = {name: values[valid] for name, values in rows.items()}
            if "pointing" in self.measures:
                rows["pointing"] = in_box(rows.pop("peak"), self._boxes(rows["index"]))
            yield rows

    def _boxes(self, indices: Sequence[int]) -> np.ndarray:
        return np.stack([self.source[int(index)]["box"] for index in indices])

    def _compile(self):
        graph = nnx.graphdef(self.method)
        masking, measures = self.masking, self.measures

        def step(state, images, index, key):
            method = nnx.merge(graph, state)
            images = images.astype(jnp.float32) / 255
            return measure(method, images, index, key, masking, measures)

        specs = (P(), P(AXIS), P(AXIS), P())
        # ROAD's solver loops until each device is done with its own images, which the check of
        # what varies over devices cannot follow.
        return jax.jit(
            jax.shard_map(step, mesh=self.mesh, in_specs=specs, out_specs=P(AXIS), check_vma=False)
        )


def measure(
    method: Method,
    images: jax.Array,
    index: jax.Array,
    key: jax.Array,
    masking: MaskingKind,
    measures: Sequence[Measure],
) -> dict[str, jax.Array]:
    """The rows (without ``index``) of a batch of images ``[B, H, W, 3]`` in [0, 1]."""
    preprocessing = method.backbone.preprocessing

    def predict(standardised):
        return jax.nn.softmax(method.backbone(standardised)[0])

    standardised = preprocessing.standardise(images)
    probabilities = predict(standardised)
    classes = jnp.argmax(probabilities, axis=-1)
    maps = method(images, classes[:, None])[:, 0]
    rows = {"class": classes, "confidence": probabilities.max(axis=-1)}
    if {"ad", "ic"} & set(measures):
        rows["masked"] = masked_confidences(predict, images, maps, classes, preprocessing, masking)
    if "pointing" in measures:
        rows["peak"] = peak(maps, images.shape[1:3])
    maps = upsample(maps, images.shape[1:3])
    for name in AREAS.keys() & set(measures):
        rows[name] = AREAS[name](predict, standardised, maps, classes)
    for name in ROAD_PROTOCOLS.keys() & set(measures):
        protocol = PROTOCOLS[ROAD_PROTOCOLS[name]]
        scores = road(predict, standardised, maps, classes, index, key, protocol)
        rows[f"{name}_morf"], rows[f"{name}_lerf"] = scores
    return rows


def summarise(rows: Mapping[str, np.ndarray], measures: Sequence[Measure]) -> dict[str, dict]:
    """Means in % over the images: ``{"AD": {"100": ...}, "IC": ..., "ROAD": {"MoRF": ...}}``."""
    summary = {}
    for name, function in (("ad", average_drop), ("ic", increase_in_confidence)):
        if name in measures:
            values = function(rows["confidence"], rows["masked"])
            summary[name.upper()] = _named(PERCENTAGES, values)
    for name, protocol in ROAD_PROTOCOLS.items():
        if name in measures:
            summary[name.upper()] = {
                order: _with_mean(
                    PROTOCOLS[protocol].percentages, 100 * rows[f"{name}_{order.lower()}"].mean(0)
                )
                for order in ("MoRF", "LeRF")
            }
    for name in ("insertion", "deletion", "pointing"):
        if name in measures:
            summary[name] = {"mean": 100 * float(rows[name].mean())}
    return summary


def _named(percentages: Sequence[float], values: np.ndarray) -> dict[str, float]:
    return {str(percent): float(value) for percent, value in zip(percentages, values)}


def _with_mean(percentages: Sequence[float], values: np.ndarray) -> dict[str, float]:
    return {"mean": float(values.mean()), **_named(percentages, values)}


def intervals(
    rows: Mapping[str, np.ndarray], measures: Sequence[Measure], resamples: int = 1000
) -> dict[str, dict]:
    """Bootstrap 95 % intervals of the means: `summarise`'s tree with ``[low, high]`` as leaves."""
    rng = np.random.default_rng(0)
    count = len(rows["index"])
    trees = []
    for _ in range(resamples):
        chosen = rng.integers(count, size=count)
        trees.append(summarise({name: x[chosen] for name, x in rows.items()}, measures))
    return jax.tree.map(lambda *v: np.percentile(v, (2.5, 97.5)).tolist(), *trees)

"""Measuring a run's maps at the end of each epoch."""

import functools

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ttame_jax.data import Batches, Source, evaluation_batches
from ttame_jax.methods import TTAME
from ttame_jax.metrics.evaluation import make_measure_step, measure_all, summarise
from ttame_jax.training.config import TrainConfig
from ttame_jax.training.step import TrainState


class Validation:
    """AD and IC of the maps on part of the validation split, as they are after an epoch."""

    def __init__(self, config: TrainConfig, source: Source, method: TTAME, mesh: Mesh):
        self.indices = spread(len(source), config.validation_images)
        self.source, self.mesh, self.method = source, mesh, method
        self.batch_size = config.batch_size
        self.step = make_measure_step(method, mesh, config.masking or method.backbone.masking)

    def measure(self, backbone_state: nnx.State, state: TrainState) -> dict[str, float]:
        """``{"AD_100": ..., "IC_15": ...}`` in %."""
        attention = nnx.merge_state(state.params, state.batch_stats)
        method_state = nnx.State({"backbone": backbone_state, "attention": attention})
        measured = measure_all(
            functools.partial(self.step, method_state), self._batches(), self.mesh
        )
        return {
            f"{name}_{percent}": float(value)
            for name, values in summarise(measured).items()
            for percent, value in values.items()
        }

    def _batches(self) -> Batches:
        return evaluation_batches(
            self.source,
            self.method.backbone.preprocessing,
            self.batch_size // jax.process_count(),
            indices=self.indices,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )


def spread(total: int, wanted: int) -> np.ndarray:
    """At most `wanted` indices, evenly spread over `total`."""
    return np.unique(np.linspace(0, total - 1, min(wanted, total)).astype(int))

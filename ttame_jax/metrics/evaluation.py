"""Measures an explanation method image by image: the step on the devices, and its summary."""

from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ttame_jax.masking import MaskingKind
from ttame_jax.mesh import AXIS, gather, shard_batch
from ttame_jax.methods import Method
from ttame_jax.metrics.ad_ic import (
    PERCENTAGES,
    average_drop,
    increase_in_confidence,
    masked_confidences,
)


def make_measure_step(method: Method, mesh: Mesh, masking: MaskingKind) -> Callable:
    """Compiles the measuring of a method, for the class that the backbone predicts.

    Returns:
      ``measure(state, images) -> {"confidence": [B], "masked": [B, P]}``, with ``state`` from
      ``nnx.state(method)`` and images uint8 ``[B, H, W, 3]`` sharded on the batch.
    """
    graph = nnx.graphdef(method)

    def local_measure(state, images):
        method = nnx.merge(graph, state)
        preprocessing = method.backbone.preprocessing
        images = images.astype(jnp.float32) / 255

        def predict(standardised):
            return jax.nn.softmax(method.backbone(standardised)[0])

        probabilities = predict(preprocessing.standardise(images))
        classes = jnp.argmax(probabilities, axis=-1)
        maps = method(images, classes[:, None])[:, 0]
        masked = masked_confidences(predict, images, maps, classes, preprocessing, masking)
        return {"confidence": probabilities.max(axis=-1), "masked": masked}

    return jax.jit(
        jax.shard_map(local_measure, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P(AXIS))
    )


def measure_all(
    measure: Callable[[jax.Array], Mapping[str, jax.Array]],
    batches: Iterable[Mapping[str, np.ndarray]],
    mesh: Mesh,
) -> dict[str, np.ndarray]:
    """Measures every valid image of the batches, whatever process read it.

    Args:
      measure: sharded images to arrays of a row an image.
      batches: of ``evaluation_batches``.
      mesh: of all devices.

    Returns:
      The arrays with a row a valid image, and their ``"index"``.
    """
    parts = []
    for batch in batches:
        images, index, valid = (shard_batch(batch[k], mesh) for k in ("image", "index", "valid"))
        rows, valid = gather(({**measure(images), "index": index}, valid))
        parts.append({name: values[valid] for name, values in rows.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def summarise(measured: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """``{"AD": {"100": ...}, "IC": {...}}`` in %, over the images that were measured."""
    measures = {"AD": average_drop, "IC": increase_in_confidence}
    return {
        name: dict(zip(map(str, PERCENTAGES), measure(measured["confidence"], measured["masked"])))
        for name, measure in measures.items()
    }

"""The scale of a classifier's feature maps, measured on the first batches of training images."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ttame_jax.backbones import Backbone
from ttame_jax.data.loader import Batches
from ttame_jax.mesh import AXIS, shard_batch
from ttame_jax.preprocessing import to_float

IMAGES = 64
"""The scale is measured on at least this number of images, in whole batches."""


def measure_feature_scale(
    backbone: Backbone,
    state: nnx.State,
    mesh: Mesh,
    batches: Batches,
    batch_size: int,
    first_layer: int = 0,
) -> np.ndarray:
    """The root mean square of each feature map over images, positions and channels.

    It does not depend on the number of devices and processes.

    Args:
      backbone: the classifier.
      state: its arrays, replicated over the mesh.
      mesh: the mesh over which the images are sharded.
      batches: this process's part of each global batch.
      batch_size: images in a global batch.
      first_layer: index of the first feature map to measure.

    Returns:
      float32 ``[n - first_layer]``, one value per feature map, earliest first.

    Raises:
      ValueError: a feature map is 0 everywhere or not finite.
    """
    graph = nnx.graphdef(backbone)

    def local(state, images):
        classify = nnx.merge(graph, state)
        _, features = classify(classify.preprocessing.standardise(to_float(images)))
        squares = [jnp.square(x.astype(jnp.float32)).mean() for x in features[first_layer:]]
        return jax.lax.pmean(jnp.stack(squares), AXIS)

    mean_squares = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P()))
    measured = [
        np.asarray(mean_squares(state, shard_batch(next(batches)["image"], mesh)))
        for _ in range(-(-IMAGES // batch_size))
    ]
    scale = np.sqrt(np.mean(measured, axis=0))
    if not (np.isfinite(scale) & (scale > 0)).all():
        raise ValueError(
            f"--scale-features needs feature maps that are finite and not 0 everywhere: those of "
            f"{backbone.name} have root mean squares of {', '.join(f'{x:.3g}' for x in scale)}"
        )
    return scale

"""The exported function, its inputs, and what its users need to know."""

import json
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ttame_jax.errors import Failure
from ttame_jax.explainer import Explainer

Outputs = dict[str, jax.Array]

# In JAX 0.9 the error is in `jax.core`.
_errors: Any = jax.errors if hasattr(jax.errors, "InconclusiveDimensionOperation") else jax.core

MOST_BYTES = 2**31 - 2**24
"""Of the weights. Protocol buffers and FlatBuffers hold 2 GiB, with the program."""

OUTPUTS = ("logits", "maps", "likeliest", "likeliest_maps")
"""Names of the outputs, in their order in an ONNX graph."""


def program(
    explainer: Explainer, likeliest: int = 1
) -> tuple[Callable[[jax.Array, jax.Array], Outputs], tuple[jax.ShapeDtypeStruct, ...]]:
    """An explainer as a function of arrays.

    Args:
      explainer: with its weights.
      likeliest: number of the most probable classes that are explained in any case.

    Returns:
      ``explain(images, classes)`` for images ``[b, H, W, 3]`` float32 in [0, 1], of the size in
      ``backbone.preprocessing``, and classes ``[b, k]`` int32; and the shapes of both, with
      symbolic ``b`` and ``k``. The function returns ``logits`` ``[b, num_classes]``, ``maps``
      ``[b, k, h, w]`` in [0, 1], ``likeliest`` ``[b, likeliest]`` int32, the most probable class
      first, and their ``likeliest_maps``.

    Raises:
      ValueError: there are fewer classes than that.
      Failure: the weights are too large for a file; or the program depends on the number of images,
        raised by the function.
    """
    method, backbone = explainer.method, explainer.backbone
    if not 0 < likeliest <= backbone.num_classes:
        raise ValueError(
            f"likeliest must lie in 1 to {backbone.num_classes}, the number of classes, not "
            f"{likeliest}"
        )

    size = sum(x.nbytes for x in jax.tree.leaves(nnx.state(method)))
    if size > MOST_BYTES:
        raise Failure(
            f"{backbone.name} has {size / 2**30:.1f} GiB of weights: an exported file holds less "
            "than 2 GiB"
        )

    def explain(images, classes):
        try:
            logits, features = backbone(backbone.preprocessing.standardise(images))
            first = jax.lax.top_k(logits, likeliest)[1]
            # Explained together, so that methods that run the backbone again do so once.
            both = jnp.concatenate([first, classes], axis=1)
            maps = method.explain_features(images, features, both)
        except _errors.InconclusiveDimensionOperation as error:
            raise Failure(
                f"{method.name} cannot be exported: its program or that of {backbone.name} depends on "
                "the number of images"
            ) from error
        return dict(zip(OUTPUTS, (logits, maps[:, likeliest:], first, maps[:, :likeliest])))

    batch, count = jax.export.symbolic_shape("b, k")
    size = backbone.preprocessing.image_size
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)
    return explain, (images, jax.ShapeDtypeStruct((batch, count), jnp.int32))


def metadata(explainer: Explainer, map_size: tuple[int, int]) -> dict[str, Any]:
    """What a user of an exported file needs to know.

    Args:
      explainer: the exported one.
      map_size: height and width of its maps.

    Returns:
      Values for JSON: ``backbone``, ``method`` (of a trained mechanism, its variant),
      ``class_names`` (None if there are none), ``num_classes``, ``preprocessing`` (the standardisation
      is part of the exported function), ``map_size`` and ``ttame_jax`` (the version).
    """
    backbone, preprocessing = explainer.backbone, explainer.backbone.preprocessing
    values = {
        "backbone": backbone.name,
        "method": explainer.method.name,
        "num_classes": backbone.num_classes,
        "class_names": explainer.class_names,
        "preprocessing": vars(preprocessing),
        "map_size": map_size,
        "ttame_jax": version("ttame-jax"),
    }
    return json.loads(json.dumps(values))

"""Which parameters each layer of a classifier reads, from its program."""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from .base import Backbone
from .program import read_inputs


def layer_parameters(backbone: Backbone) -> dict[str, list[str]]:
    """The layers of a classifier from the images to the logits, and what each of them reads.

    It is found from the program of the classifier, and therefore for every backbone, also for
    imported ones. A layer whose name extends that of the next one, such as ``blocks.0.norm1`` before
    ``blocks.0``, is a part of that one. Layers without parameters are left out, and a parameter that
    several layers read belongs to the first of them.

    Returns:
      ``{layer: paths}`` with the dotted paths of floating-point arrays in the backbone's state.
    """
    graph, state = nnx.split(backbone)
    flat = nnx.to_flat_state(state)
    paths, variables = [path for path, _ in flat], [variable for _, variable in flat]
    size = backbone.preprocessing.image_size
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    names = []

    def outputs(values, image):
        new = [variable.replace(value) for variable, value in zip(variables, values)]
        whole = nnx.merge(graph, nnx.from_flat_state(zip(paths, new)))
        layers = whole.layer_outputs(image)
        names.extend(layers)
        return list(layers.values())

    values = [variable.get_value() for variable in variables]
    abstract = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in values]
    floating = {i for i, value in enumerate(values) if jnp.issubdtype(value.dtype, jnp.floating)}
    layers: dict[str, list[str]] = {}
    known: set[int] = set()
    parts: list[int] = []
    reads = read_inputs(outputs, abstract, image)
    for (name, following), read in zip(itertools.pairwise([*names, ""]), reads, strict=True):
        parts += sorted((read & floating) - known)
        known |= read
        if parts and not name.startswith(f"{following}."):
            layers[name] = [".".join(map(str, paths[i])) for i in parts]
            parts = []
    return layers

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TINY

from ttame_jax.backbones import FunctionBackbone
from ttame_jax.backbones.dependencies import layer_parameters
from ttame_jax.preprocessing import Preprocessing
from ttame_jax.weights import abstract_backbone
from ttame_jax.weights.transfer import parameters

pytestmark = pytest.mark.quick


def test_every_array_belongs_to_one_layer_in_the_order_of_the_computation():
    backbone = abstract_backbone("vit", **TINY)
    layers = layer_parameters(backbone)
    assert [*layers] == ["embed", "blocks.0", "blocks.1", "blocks.2", "head"]
    assert sorted(path for paths in layers.values() for path in paths) == sorted(
        parameters(backbone)
    )
    assert {path.rpartition(".")[0] for path in layers["head"]} == {"norm", "head"}
    assert all(path.startswith("blocks.1.") for path in layers["blocks.1"])
    assert "blocks.1.norm1.scale" in layers["blocks.1"]  # which is a layer of its own


def test_layers_without_arrays_and_counters_are_left_out():
    layers = layer_parameters(abstract_backbone("resnet18"))
    assert len(layers) == 10 and "stem.pool" not in layers
    paths = {path.rpartition(".")[2] for paths in layers.values() for path in paths}
    assert paths == {"kernel", "scale", "bias", "mean", "var"}


def test_arrays_of_a_function_belong_to_the_first_feature_that_needs_them():
    def forward(params, images):
        first = jax.jit(lambda x: jnp.abs(x @ params["a"]))(images)
        second = first @ params["b"] + params["shared"]
        return second.mean((1, 2)) @ params["c"] + params["shared"].sum(), {
            "first": first,
            "second": second,
        }

    params = {name: np.ones((3, 3), np.float32) for name in "abc"}
    params |= {"shared": np.ones(3, np.float32), "unused": np.ones(1, np.float32)}
    backbone = FunctionBackbone(
        forward, params, preprocessing=Preprocessing(image_size=4, resize_size=4)
    )
    order = sorted(params)
    layers = layer_parameters(backbone)
    assert {
        name: sorted(order[int(path.removeprefix("leaves."))] for path in paths)
        for name, paths in layers.items()
    } == {"first": ["a"], "second": ["b", "shared"], "head": ["c"]}

"""MobileNetV2 and V3 against torchvision's and timm's modules, float32."""

from dataclasses import asdict
from functools import partial

import jax
import numpy as np
import pytest
from references import check, check_round_trip, create, images, load

from ttame_jax.backbones.mobilenetv3 import FAMILY
from ttame_jax.convert.authors import authors_nodes
from ttame_jax.convert.modules import module_config
from ttame_jax.convert.pytorch import timm
from ttame_jax.convert.pytorch.checkpoints import numpy_state
from ttame_jax.convert.pytorch.torch_import import import_torchvision
from ttame_jax.convert.timm_table import randomise
from ttame_jax.weights import abstract_backbone, timm_models
from ttame_jax.weights.transfer import fill, layouts, to_flax

NODES = {
    "mobilenet_v2": ["features.6", "features.13", "features.17"],
    "mobilenet_v3_small": ["features.3", "features.8", "features.12"],
    "mobilenet_v3_large": ["features.6", "features.12", "features.16"],
}


@pytest.mark.parametrize(
    "name",
    [
        "mobilenet_v2",
        "mobilenet_v3_small",
        pytest.param("mobilenet_v3_large", marks=pytest.mark.slow),
    ],
)
def test_mobilenet_equals_torchvision(name):
    module = randomise(create(name, "torchvision", num_classes=10))
    backbone = abstract_backbone(name, num_classes=10)
    fill(backbone, to_flax(backbone, numpy_state(module.state_dict())))
    check(backbone, module, NODES[name], images(65, 96))
    check_round_trip(backbone, module, "torchvision")


# MobileNetV4's blocks with both, one and none of the two depthwise convolutions.
BLOCKS = [
    ["ds_r1_k3_s1_e1_c8_se0.25_nre"],
    ["ir_r1_k3_s2_e3_c12_nre"],
    ["ir_r2_k5_s2_e3_c16_se0.25"],
    ["uir_r1_a3_k5_s2_e4_c24", "uir_r1_a3_k0_s1_e2_c24", "uir_r1_a0_k0_s1_e2_c24"],
    ["uir_r1_a5_k0_s2_e4_c32"],
    ["cn_r1_k1_s1_c48"],
]


@pytest.mark.parametrize("options", [{}, {"head_bias": False}, {"head_norm": True}])
def test_blocks_and_heads_equal_timm(options):
    module = randomise(small(**options))
    backbone = load(module)
    assert backbone.architecture.blocks["stages.2.1"].squeeze[1:] == ("relu", "hardsigmoid")
    check(backbone, module, ["blocks.2", "blocks.3", "blocks.5"], images(70, 64))
    check_round_trip(backbone, module, "timm")


def small(**options):
    """timm's module of a few narrow blocks."""
    import_torchvision()
    from timm.models._efficientnet_blocks import SqueezeExcite
    from timm.models._efficientnet_builder import decode_arch_def
    from timm.models.mobilenetv3 import MobileNetV3
    from torch import nn

    squeeze_excite = partial(SqueezeExcite, gate_layer="hard_sigmoid", force_act_layer=nn.ReLU)
    sizes = {"num_classes": 5, "num_features": 40, "stem_size": 8}
    layers = {"act_layer": nn.Hardswish, "se_layer": squeeze_excite}
    return MobileNetV3(decode_arch_def(BLOCKS), **sizes, **layers, **options).eval()


@pytest.mark.parametrize("size", ["small", "large"])
def test_published_architectures_are_timms_with_another_epsilon(size):
    module = timm.create(f"mobilenetv3_{size}_100", device="meta")
    fields = asdict(FAMILY.architectures[f"mobilenet_v3_{size}"])
    del fields["num_classes"], fields["preprocessing"]
    assert fields == FAMILY.timm.read(module) | {"epsilon": 1e-3}


@pytest.mark.parametrize("name", NODES)
def test_features_have_strides_8_16_and_32(name):
    backbone = abstract_backbone(name)
    assert [shape[0] for shape in backbone.feature_shapes()] == [28, 14, 7]
    assert module_config(backbone, "torchvision")["nodes"] == NODES[name] == authors_nodes(backbone)


def test_the_hidden_layer_comes_after_the_average():
    backbone = load(randomise(small()))
    before, after = backbone.split()
    state = jax.jit(before)(images(64))
    average = state[0].mean(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(after((average,)), after(state), rtol=1e-4, atol=1e-5)
    assert state[0].shape == (2, 2, 2, 48) and backbone.class_weights is None


def test_torchvisions_layout_is_of_mobilenet_alone():
    for name, expected in (("mobilenet_v2", True), ("tf_efficientnet_lite0", False)):
        assert ("torchvision" in layouts(abstract_backbone(name))) == expected


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("mobilenetv4_conv_aa_medium", "has AvgPool2d"),
        ("mobilenetv4_hybrid_medium", "has Dropout, LayerScale2d, MobileAttention, Multi"),
    ],
)
def test_other_blocks_are_refused(model, reason):
    with pytest.raises(timm_models.UnsupportedModel, match=f"not supported: it {reason}"):
        timm_models.describe(model)

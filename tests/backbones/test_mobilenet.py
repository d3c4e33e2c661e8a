"""MobileNetV2 and V3 against torchvision's and timm's modules, float32."""

from dataclasses import asdict, replace
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from references import check, check_round_trip, create, images, load

from ttame_jax.backbones import efficientnet
from ttame_jax.backbones.efficientnet import EfficientNet, _stages
from ttame_jax.backbones.mobilenetv3 import FAMILY, MobileNetV3, _published
from ttame_jax.convert.authors import authors_nodes
from ttame_jax.convert.modules import module_config
from ttame_jax.convert.pytorch import timm
from ttame_jax.convert.pytorch.checkpoints import numpy_state
from ttame_jax.convert.pytorch.torch_import import import_torchvision
from ttame_jax.convert.timm_table import randomise
from ttame_jax.weights import abstract_backbone, timm_models
from ttame_jax.weights.transfer import abstract, fill, layouts, to_flax

NODES = {
    "mobilenet_v2": ["features.6", "features.13", "features.17"],
    "mobilenet_v3_small": ["features.3", "features.8", "features.12"],
    "mobilenet_v3_large": ["features.6", "features.12", "features.16"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NODES)
def test_published_mobilenets_equal_torchvision(name):
    module = randomise(create(name, "torchvision", num_classes=10))
    check_torchvision(abstract_backbone(name, num_classes=10), module, NODES[name])


def test_a_small_mobilenet_v2_equals_torchvision():
    rows = ((3, 1, 1, 8, 1), (3, 2, 6, 16, 2), (3, 2, 6, 24, 1), (3, 2, 6, 32, 1))
    settings = [[expansion, *sizes, stride] for _, stride, expansion, *sizes in rows]
    mobilenet_v2 = import_torchvision().models.MobileNetV2
    module = randomise(mobilenet_v2(5, inverted_residual_setting=settings).eval())
    architecture = replace(
        efficientnet.MOBILENET_V2, stages=_stages(rows, 32, "relu6", squeeze=False), num_classes=5
    )
    backbone = abstract(lambda rngs: EfficientNet("small", architecture, rngs=rngs))
    check_torchvision(backbone, module, [f"features.{i}" for i in (3, 4, 5)])


def test_a_small_mobilenet_v3_equals_torchvision():
    rows = (
        (3, 16, 16, True, "relu", 2),
        (3, 48, 24, False, "relu", 2),
        (5, 56, 24, True, "hardswish", 1),
        (5, 96, 32, True, "hardswish", 2),
    )
    settings, channels = [], 16
    for kernel, inner, width, *kind, stride in rows:
        kind[1] = {"relu": "RE", "hardswish": "HS"}[kind[1]]
        settings.append((channels, kernel, inner, width, *kind, stride, 1, 1))
        channels = width
    library = import_torchvision().models.mobilenetv3
    settings = [library.InvertedResidualConfig(*setting) for setting in settings]
    module = randomise(library.MobileNetV3(settings, 40, num_classes=5).eval())
    architecture = replace(_published(rows, 40), num_classes=5)
    backbone = abstract(lambda rngs: MobileNetV3("small", architecture, rngs=rngs))
    check_torchvision(backbone, module, [f"features.{i}" for i in (1, 3, 5)])


def check_torchvision(backbone, module, nodes):
    fill(backbone, to_flax(backbone, numpy_state(module.state_dict())))
    check(backbone, module, nodes, images(65, 96))
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
    del fields["num_classes"], fields["preprocessing"], fields["class_names"]
    assert fields == FAMILY.timm.read(module) | {"epsilon": 1e-3}


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small"])
def test_features_have_strides_8_16_and_32(name):
    backbone = abstract_backbone(name)
    assert [shape[0] for shape in backbone.feature_shapes()] == [28, 14, 7]
    assert module_config(backbone, "torchvision")["nodes"] == NODES[name] == authors_nodes(backbone)


def test_the_hidden_layer_comes_after_the_average():
    backbone = load(randomise(small()))
    _, after = backbone.split()
    state = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 3, 48)), jnp.float32)
    average = state.mean(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(after((average,)), after((state,)), rtol=1e-4, atol=1e-5)
    assert backbone.target_layer == "stages.5.0" and backbone.class_weights is None


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

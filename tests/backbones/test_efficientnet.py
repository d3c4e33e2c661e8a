"""EfficientNet and its relatives against timm's modules, float32."""

import sys
from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from real_images import read_images
from references import check, check_round_trip, images, load, outputs
from running import run
from safetensors.torch import load_file

from ttame_jax.backbones.efficientnet import FAMILY, rounded
from ttame_jax.convert.pytorch import timm
from ttame_jax.convert.pytorch.checkpoints import numpy_state
from ttame_jax.convert.timm_table import randomise
from ttame_jax.weights import abstract_backbone, load_backbone, save_backbone, timm_models
from ttame_jax.weights.transfer import fill, parameters, to_flax

NODES = ["blocks.2", "blocks.4", "blocks.6"]
SMALL_NODES = ["blocks.2", "blocks.3", "blocks.4"]
# Every kind of block, each with and without a shortcut where timm's notation has the choice, with
# other activations than the stem's, and groups.
BLOCKS = [
    ["cn_r1_k3_s1_e1_c8_skip"],
    ["er_r2_k3_s2_e4_c12_se0.25", "er_r1_k3_s1_gs8_e4_c12"],
    ["ir_r2_k5_s2_e4_c16_se0.25"],
    ["ir_r1_k3_s2_e3_c24_nhs", "ir_r1_k3_s1_e3_c24_noskip"],
    ["ds_r2_k3_s2_c32_se0.25_nre", "dsa_r1_k5_s1_c32"],
]


def small(blocks=BLOCKS, **options):
    """timm's module of a few narrow blocks."""
    timm.create("test_efficientnet", device="meta")  # imports timm with torchvision's workaround
    from timm.models._efficientnet_builder import decode_arch_def
    from timm.models.efficientnet import EfficientNet

    sizes = {"num_classes": 5, "num_features": 40, "stem_size": 8}
    return EfficientNet(decode_arch_def(blocks), **sizes, **options).eval()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("tf_efficientnet_lite0", marks=pytest.mark.slow),
        pytest.param("efficientnet_b0", marks=pytest.mark.slow),
        "tf_efficientnet_b0",
    ],
)
@pytest.mark.slow
def test_efficientnet_equals_timm(name):
    module = randomise(timm.create(name, num_classes=10))
    backbone = abstract_backbone(name, num_classes=10)
    fill(backbone, to_flax(backbone, numpy_state(module.state_dict())))
    check(backbone, module, NODES, images(65, 96))
    check_round_trip(backbone, module, "timm")


@pytest.mark.parametrize(
    ("padding", "activation"), [("", "SiLU"), ("same", "SiLU"), ("", "ReLU"), ("same", "ReLU6")]
)
def test_blocks_equal_timm(padding, activation):
    module = randomise(small(pad_type=padding, act_layer=getattr(torch.nn, activation)))
    check(load(module), module, SMALL_NODES, images(37, 50))


@pytest.mark.parametrize("name", FAMILY.architectures)
def test_published_architectures_and_preprocessing_are_those_of_timm(name):
    module = timm.create(FAMILY.timm.models[name], device="meta")
    fields = asdict(FAMILY.architectures[name])
    assert fields.pop("num_classes") == module.num_classes
    del fields["class_names"]
    preprocessing = fields.pop("preprocessing")
    if name not in FAMILY.torchvision.models:  # whose preprocessing is torchvision's
        assert preprocessing == timm.preprocessing(module.pretrained_cfg)
    assert fields == FAMILY.timm.read(module)


def test_widths_arerounded_to_eights_and_lose_at_most_a_tenth():
    widths = {3: 8, 8.8: 8, 11: 16, 12: 16, 35.2: 32, 44: 48}
    assert {width: rounded(width) for width in widths} == widths


def test_features_have_strides_8_16_and_32():
    backbone = abstract_backbone("efficientnet_b0")
    assert backbone.feature_layers == ("stages.2.1", "stages.4.2", "stages.6.0")
    assert backbone.feature_shapes() == ((28, 28, 40), (14, 14, 112), (7, 7, 320))


def test_the_classifier_averages_the_target_layer():
    backbone = load(randomise(small()))
    before, after = backbone.split()
    state = jax.jit(before)(images(64))
    assert state[0].shape == (2, 2, 2, 40) and backbone.class_weights is None
    logits = state[0].mean(axis=(1, 2)) @ backbone.head.kernel[...] + backbone.head.bias[...]
    np.testing.assert_allclose(after(state), logits, rtol=1e-4, atol=1e-5)
    classes = jnp.array([3, 1])
    np.testing.assert_allclose(after(state, classes), logits[:, classes], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_bfloat16_computes_the_same_function():
    module, x = randomise(small()), images(64)
    logits, features = run(load(module, dtype="bfloat16"), x)
    assert {feature.dtype for feature in features} == {jnp.dtype("bfloat16")}
    for low, exact in zip((logits, *features), outputs(module, SMALL_NODES, x), strict=True):
        assert np.abs(low - exact).max() < 0.03 * np.abs(exact).max()


def test_our_own_file_needs_no_timm(tmp_path, monkeypatch):
    backbone = load(randomise(small()))
    save_backbone(backbone, tmp_path / "w.safetensors")
    for library in ("torch", "timm", "torchvision"):
        monkeypatch.setitem(sys.modules, library, None)
    again = load_backbone("timm:any", tmp_path / "w.safetensors")
    assert again.architecture == backbone.architecture
    for path, value in parameters(backbone).items():
        np.testing.assert_array_equal(parameters(again)[path], value)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("efficientnet_x_b3", "moves pixels into channels"),
        ("efficientnet_b0_gn", "has GroupNormAct"),
        ("mixnet_s", "has MixedConv2d"),
        ("mobilenetv1_100", "differs in bn2"),
    ],
)
def test_other_blocks_are_refused(model, reason):
    with pytest.raises(timm_models.UnsupportedModel) as error:
        timm_models.describe(model)
    assert any(found.startswith(reason) for found in error.value.reasons)


def test_real_efficientnet_lite_equals_timm(shared):
    path = shared / "weights" / "tf_efficientnet_lite0.safetensors"
    module = timm.create("tf_efficientnet_lite0")
    module.load_state_dict(load_file(path))
    backbone = load_backbone("tf_efficientnet_lite0", path)
    check(backbone, module, NODES, read_images(shared, backbone.preprocessing, 2))

"""DenseNet against timm's and torchvision's modules, float32."""

from dataclasses import asdict

import jax
import numpy as np
import pytest
import torch
from random_weights import randomised
from references import check, create, described, images
from running import run

from ttame_jax.backbones.densenet import FAMILY
from ttame_jax.convert.pytorch import timm
from ttame_jax.convert.pytorch.torch_import import import_torchvision
from ttame_jax.weights import abstract_backbone, timm_models
from ttame_jax.weights.transfer import parameters, to_flax, to_torch

TIMM_NODES = ["features.transition2.norm", "features.transition3.norm", "features.norm5"]
TORCHVISION_NODES = ["features.transition2.relu", "features.transition3.relu", "features.norm5"]
DEPTHS = (1, 2, 2, 1)


def small(**options):
    """timm's module of a few narrow layers."""
    import_torchvision()
    from timm.models.densenet import DenseNet

    return DenseNet(8, DEPTHS, num_classes=10, **options).eval()


@pytest.fixture(scope="module")
def backbone():
    return randomised(described(small()))


@pytest.mark.parametrize("size", [(64, 64), (77, 90)])
def test_densenet_equals_timm(size):
    module = small()
    check(described(module), module, TIMM_NODES, images(*size))


def test_densenet_equals_torchvision():
    module = import_torchvision().models.DenseNet(8, DEPTHS, 16, num_classes=10).eval()
    check(described(small()), module, TORCHVISION_NODES, images(77, 90), "torchvision")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "nodes"), [("torchvision", TORCHVISION_NODES), ("timm", TIMM_NODES)]
)
def test_densenet121_equals_reference(library, nodes):
    check(
        abstract_backbone("densenet121"),
        create("densenet121", library),
        nodes,
        images(224),
        library,
    )


@pytest.mark.parametrize("name", FAMILY.architectures)
def test_published_architectures_are_those_of_timm(name):
    fields = asdict(FAMILY.architectures[name])
    del fields["num_classes"], fields["preprocessing"]
    assert fields == FAMILY.timm.read(timm.create(name, device="meta"))


def test_features_have_strides_8_16_and_32():
    backbone = abstract_backbone("densenet121")
    assert backbone.feature_shapes() == ((28, 28, 512), (14, 14, 1024), (7, 7, 1024))
    assert backbone.masking == "pixel"


def test_the_classifier_averages_the_last_feature_map(backbone):
    logits, features = run(backbone, images(64))
    expected = features[-1].mean(axis=(1, 2)) @ backbone.class_weights + backbone.head.bias[...]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    before, after = backbone.split()
    state = jax.jit(before)(images(64))
    np.testing.assert_allclose(state[0], features[-1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(after(state), logits, rtol=1e-4, atol=1e-5)


def test_the_smallest_input_is_pytorchs(backbone):
    smallest, module = backbone.min_size, small()
    assert module(torch.zeros(1, 3, smallest, smallest)).isfinite().all()
    with pytest.raises(RuntimeError):
        module(torch.zeros(1, 3, smallest - 1, smallest - 1))


def test_torchvisions_first_names_are_known(backbone):
    state = to_torch(backbone, "torchvision")
    old = "features.denseblock2.denselayer1.conv.2.weight"
    first = {
        key.replace("norm1", "norm.1").replace("conv2", "conv.2") if "denselayer" in key else key: x
        for key, x in state.items()
    }
    assert old in first and old not in state
    ours = parameters(backbone)
    for path, value in to_flax(backbone, first).items():
        np.testing.assert_array_equal(value, ours[path])


def test_other_stems_are_refused():
    with pytest.raises(timm_models.UnsupportedModel, match="it has BlurPool2d"):
        timm_models.describe("densenetblur121d")
    with pytest.raises(timm_models.UnsupportedModel, match="it differs in features.conv0.weight"):
        described(small(stem_type="deep"))

"""DenseNet against torchvision's and timm's modules, float32."""

import numpy as np
import pytest
import torch
from references import assert_close, check, check_round_trip, create, images, load, outputs
from running import run

from ttame_jax.backbones.densenet import Architecture, DenseNet
from ttame_jax.convert.modules import module_config
from ttame_jax.convert.pytorch import timm
from ttame_jax.convert.pytorch.checkpoints import numpy_state
from ttame_jax.convert.pytorch.torch_import import import_torchvision
from ttame_jax.convert.timm_table import randomise
from ttame_jax.convert.verify import differences
from ttame_jax.weights import abstract_backbone, timm_models
from ttame_jax.weights.transfer import abstract, fill, parameters, to_flax, to_torch

NODES = ["features.denseblock2", "features.denseblock3", "features.norm5"]
DEPTHS = (1, 2, 2, 1)


def small_torchvision():
    densenet = import_torchvision().models.DenseNet
    return randomise(densenet(8, DEPTHS, num_init_features=12, bn_size=2, num_classes=5).eval())


def small_backbone():
    sizes = Architecture(depths=DEPTHS, growth=8, bottleneck=2, stem=(12,), num_classes=5)
    return abstract(lambda rngs: DenseNet("small", sizes, rngs=rngs))


@pytest.mark.parametrize("stem", ["", "deep_tiered"])
def test_densenet_equals_timm(stem):
    timm.create("densenet121", device="meta")  # imports timm with torchvision's workaround
    from timm.models.densenet import DenseNet

    sizes = {"growth_rate": 8, "block_config": DEPTHS, "bn_size": 3, "num_classes": 5}
    module = randomise(DenseNet(**sizes, stem_type=stem).eval())
    backbone = load(module)
    check(backbone, module, NODES, images(65, 90))
    check_round_trip(backbone, module, "timm")


def test_densenet_equals_torchvision():
    module, x = small_torchvision(), images(64)
    backbone = small_backbone()
    fill(backbone, to_flax(backbone, numpy_state(module.state_dict())))
    *theirs, norm = outputs(module, NODES, x)  # before the ReLU
    logits, features = run(backbone, x)
    for ours, expected in zip((logits, *features), (*theirs, np.maximum(norm, 0)), strict=True):
        assert_close(ours, expected)
    check_round_trip(backbone, module, "torchvision")


def test_torchvisions_last_relu_works_in_place_on_the_exported_feature_map():
    found, module = [], small_torchvision()
    module.features.norm5.register_forward_hook(lambda *arguments: found.append(arguments[2]))
    with torch.no_grad():
        module(torch.from_numpy(images(32)).permute(0, 3, 1, 2))
    assert (found[0] >= 0).all() and (found[0] > 0).any()
    assert module_config(abstract_backbone("densenet121"), "torchvision")["nodes"] == NODES


@pytest.mark.slow
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_densenet121_and_its_export_equal_pytorch(library):
    module = randomise(create("densenet121", library, num_classes=10))
    backbone = abstract_backbone("densenet121", num_classes=10, image_size=64)
    fill(backbone, to_flax(backbone, numpy_state(module.state_dict())))
    assert max(differences(backbone, None, library).values()) <= 1e-5


def test_torchvisions_first_names_are_known():
    backbone = fill_small(small_backbone())
    state = {
        key.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): value
        for key, value in to_torch(backbone, "torchvision").items()
    }
    assert "features.denseblock2.denselayer1.norm.1.running_var" in state
    tensors = to_flax(backbone, state)
    for path, value in parameters(backbone).items():
        np.testing.assert_array_equal(tensors[path], value)


def fill_small(backbone):
    return fill(backbone, to_flax(backbone, numpy_state(small_torchvision().state_dict())))


def test_the_classifier_averages_the_last_feature_map():
    backbone = fill_small(small_backbone())
    _, after = backbone.split()
    features = np.random.default_rng(0).uniform(size=(2, 2, 3, backbone.norm.scale.size))
    logits = features.mean(axis=(1, 2)) @ backbone.class_weights + backbone.head.bias[...]
    np.testing.assert_allclose(after((features,)), logits, rtol=1e-4, atol=1e-5)
    assert backbone.target_layer == backbone.feature_layers[-1] == "norm"


def test_features_have_strides_8_16_and_32():
    expected = ((28, 28, 512), (14, 14, 1024), (7, 7, 1024))
    assert abstract_backbone("densenet121").feature_shapes() == expected


def test_the_smallest_input_is_pytorchs():
    module, smallest = small_torchvision(), DenseNet.min_size
    module(torch.zeros(1, 3, smallest, smallest))
    with pytest.raises(RuntimeError):
        module(torch.zeros(1, 3, smallest - 1, smallest - 1))


def test_a_blurred_densenet_is_refused():
    with pytest.raises(timm_models.UnsupportedModel, match="has BlurPool2d, it pools its stem by"):
        timm_models.describe("densenetblur121d")

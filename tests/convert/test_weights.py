"""Weights that fit, and every way in which they may not."""

import re

import ml_dtypes
import numpy as np
import pytest

from ttame_jax.config import preset
from ttame_jax.weights import abstract_backbone
from ttame_jax.weights.backbones import published
from ttame_jax.weights.transfer import parameters, shapes, tables, to_flax, to_torch

VIT = {"image_size": 32, "patch_size": 8, "width": 24, "depth": 2, "num_heads": 3}


@pytest.fixture(scope="module")
def backbone(random_backbone):
    return random_backbone("digits_cnn")


@pytest.fixture
def state(backbone):
    return to_torch(backbone, "torchvision")


def assert_same(tensors, backbone):
    values = parameters(backbone)
    assert tensors.keys() == values.keys()
    for path, value in values.items():
        np.testing.assert_array_equal(tensors[path], value)


def refused(backbone, state):
    with pytest.raises(ValueError) as error:
        to_flax(backbone, state, "FILE")
    line = str(error.value)
    assert line.startswith(f"FILE does not fit {backbone.name}: ") and "\n" not in line
    return line


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
def test_wrapper_prefixes_are_dropped(backbone, state, prefix):
    assert_same(to_flax(backbone, {prefix + key: v for key, v in state.items()}), backbone)


def test_training_counters_may_be_missing(backbone, state):
    counters = [key for key in state if key.endswith("num_batches_tracked")]
    assert counters
    tensors = to_flax(backbone, {k: v for k, v in state.items() if k not in counters})
    paths = [path for path in tensors if path.endswith(".count")]
    assert len(paths) == len(counters) and not any(tensors[path] for path in paths)
    values = parameters(backbone)
    assert_same(tensors | {path: values[path] for path in paths}, backbone)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_widened(backbone, state, dtype):
    halves = {k: v.astype(dtype) if v.dtype == np.float32 else v for k, v in state.items()}
    tensors = to_flax(backbone, halves)
    types = {path: tensor.dtype for path, tensor in tensors.items()}
    assert types == {path: value.dtype for path, value in parameters(backbone).items()}
    expected = state["fc.weight"].astype(dtype).astype(np.float32).T
    np.testing.assert_array_equal(tensors["fc.kernel"], expected)


def test_missing_tensors_are_named(backbone, state):
    del state["layer2.0.conv1.weight"], state["fc.bias"]
    assert refused(backbone, state).endswith("it lacks layer2.0.conv1.weight, fc.bias")


def test_unknown_tensors_are_named(backbone, state):
    state["layer2.1.conv1.weight"] = state["fc.bias"]
    assert refused(backbone, state).endswith("it has unknown layer2.1.conv1.weight")


def test_an_unknown_counter_is_an_unknown_tensor(backbone, state):
    state["layer9.0.bn1.num_batches_tracked"] = np.zeros((), np.int64)
    assert "unknown layer9.0.bn1.num_batches_tracked" in refused(backbone, state)


def test_a_misshapen_tensor_is_named_with_both_shapes(backbone, state):
    state["layer2.0.conv1.weight"] = np.zeros((32, 16, 5, 3), np.float32)
    line = refused(backbone, state)
    assert line.endswith("layer2.0.conv1.weight has shape [32, 16, 5, 3], needed is [32, 16, 3, 3]")


@pytest.mark.parametrize("shape", [(10,), (), (128, 10, 1)])
def test_a_tensor_of_another_rank_is_named(backbone, state, shape):
    state["fc.weight"] = np.zeros(shape, np.float32)
    assert f"fc.weight has shape {list(shape)}, needed is [10, 128]" in refused(backbone, state)


def test_another_class_count_is_hinted_at(backbone, state):
    state["fc.weight"], state["fc.bias"] = np.zeros((37, 128)), np.zeros(37)
    assert refused(backbone, state).endswith("for a classifier of 37 classes pass num_classes=37")


def test_another_architecture_altogether_is_refused(backbone):
    assert "no tensor of it is known (a, b)" in refused(backbone, dict.fromkeys("ab", np.zeros(1)))


def test_a_bare_position_embedding_is_refused(random_backbone):
    backbone = random_backbone("vit", **VIT)
    state = to_torch(backbone, "timm")
    for shape in ((1, 8, 24), (17, 24), (2, 17, 24), (1, 0, 24)):
        state["pos_embed"] = np.zeros(shape, np.float32)
        assert f"pos_embed has shape {list(shape)}, needed is [1, 17, 24]" in refused(
            backbone, state
        )


def test_torchvisions_first_names_of_the_mlp_are_known(random_backbone):
    backbone = random_backbone("vit", **VIT)
    state = {
        key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): value
        for key, value in to_torch(backbone, "torchvision").items()
    }
    assert "encoder.layers.encoder_layer_1.mlp.linear_2.bias" in state
    assert_same(to_flax(backbone, state), backbone)
    key = "encoder.layers.encoder_layer_0.mlp.linear_1.bias"
    state[key.replace("linear_1", "0")] = state[key]
    with pytest.raises(ValueError, match=f"under an old and a new name: {key}"):
        to_flax(backbone, state)


def test_a_family_without_that_layout_says_so():
    backbone = abstract_backbone("squeezenet1_1")
    with pytest.raises(ValueError, match="squeezenet1_1 has no layout 'timm', only torchvision"):
        to_torch(backbone, "timm")


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("resnet18", "torchvision"),
        ("tf_efficientnet_lite0", "timm"),
        ("timm:resnet18", "timm"),
        ("hf:microsoft/resnet-18", "hf"),
    ],
)
def test_a_backbone_is_trained_with_the_published_weights_it_has(name, weights):
    assert preset(name).weights == weights


# The tests of these families compare all of their architectures.
ELSEWHERE = "efficientnet|regnet"
LARGE = r"convnext_(small|base|large)|swin_[sb]|densenet(161|169|201)"
PUBLISHED = {library: published(library) for library in ("torchvision", "timm")}
NAMES = [
    pytest.param(name, marks=[pytest.mark.slow] * bool(re.fullmatch(LARGE, name)))
    for name in dict.fromkeys(name for names in PUBLISHED.values() for name in names)
    if not re.search(ELSEWHERE, name)
]


@pytest.mark.parametrize("name", NAMES)
def test_every_published_variant_has_the_tensors_of_the_real_module(name):
    torch = pytest.importorskip("torch")
    from ttame_jax.convert.pytorch.torch_import import import_torchvision

    torchvision = import_torchvision()
    timm = pytest.importorskip("timm")
    create = {
        "torchvision": torchvision.models.get_model,
        "timm": lambda model: timm.create_model(model.partition(".")[0]),
    }
    backbone = abstract_backbone(name)
    paths = sorted(parameters(backbone))
    for library in (library for library in create if name in PUBLISHED[library]):
        with torch.device("meta"):
            module = create[library](PUBLISHED[library][name])
        theirs = {key: tuple(v.shape) for key, v in module.state_dict().items()}
        assert shapes(backbone, library) == theirs
        assert sorted(p for _, p, _ in tables(backbone)[library] if p) == paths

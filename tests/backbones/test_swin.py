"""Swin Transformer against timm's and torchvision's modules, float32."""

from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_weights import randomised
from references import create, described, equal, images
from running import run

from ttame_jax.backbones.swin import FAMILY, Architecture, Swin
from ttame_jax.convert import standalone
from ttame_jax.convert.modules import module_config
from ttame_jax.convert.pytorch import timm
from ttame_jax.convert.pytorch.torch_import import import_torchvision
from ttame_jax.convert.verify import differences
from ttame_jax.preprocessing import Preprocessing
from ttame_jax.weights import abstract_backbone, timm_models
from ttame_jax.weights.transfer import abstract, parameters, to_flax, to_torch

TIMM_NODES = ["layers.1", "layers.2", "layers.3"]
TORCHVISION_NODES = ["features.3", "features.5", "features.7"]
DEPTHS, HEADS = (2, 3, 2, 2), (1, 2, 2, 4)


def small(**options):
    """timm's module with windows that are a quarter, a half and all of a side."""
    import_torchvision()
    from timm.models.swin_transformer import SwinTransformer

    sizes = {"depths": DEPTHS, "num_heads": HEADS, "window_size": (4, 4, 2, 2), "embed_dim": 8}
    return SwinTransformer(img_size=64, num_classes=10, **sizes, **options).eval()


@pytest.fixture(scope="module")
def backbone():
    return randomised(described(small()))


def test_swin_equals_timm():
    module = small()
    equal(described(module), module, TIMM_NODES, images(64))


def test_swin_equals_torchvision():
    theirs = import_torchvision().models.SwinTransformer
    module = theirs([4, 4], 8, list(DEPTHS), list(HEADS), [2, 2], num_classes=10).eval()
    architecture = Architecture(
        width=8,
        depths=DEPTHS,
        num_heads=HEADS,
        windows=(2,) * 4,
        num_classes=10,
        preprocessing=Preprocessing(64, 64),
    )
    backbone = abstract(lambda rngs: Swin("any", architecture, rngs=rngs))
    equal(backbone, module, TORCHVISION_NODES, images(64), "torchvision")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "library", "nodes"),
    [
        ("swin_t", "torchvision", TORCHVISION_NODES),
        ("swin_t", "timm", TIMM_NODES),
        ("timm:swin_s3_tiny_224", "timm", TIMM_NODES),
    ],
)
def test_whole_models_equal_reference(name, library, nodes):
    timms = name.startswith("timm:")
    module = timm.create(name.removeprefix("timm:")) if timms else create(name, library)
    equal(abstract_backbone(name), module, nodes, images(224), library)


@pytest.mark.parametrize("name", FAMILY.architectures)
def test_published_architectures_are_those_of_timm(name):
    model = FAMILY.timm.models[name].partition(".")[0]
    fields = asdict(FAMILY.architectures[name])
    del fields["num_classes"], fields["preprocessing"], fields["class_names"]
    assert fields == FAMILY.timm.read(timm.create(model, device="meta"))


def test_features_have_strides_8_16_and_32():
    backbone = abstract_backbone("swin_t")
    assert backbone.feature_shapes() == ((28, 28, 192), (14, 14, 384), (7, 7, 768))
    assert backbone.masking == "standardised" and backbone.class_weights is None


def test_the_classifier_averages_the_target_layer(backbone):
    before, after = backbone.split()
    state = jax.jit(before)(images(64))
    assert state[0].shape == (2, 2, 2, 64)
    logits = state[0].mean(axis=(1, 2)) @ backbone.head.kernel[...] + backbone.head.bias[...]
    np.testing.assert_allclose(after(state), logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(run(backbone, images(64))[0], logits, rtol=1e-4, atol=1e-5)
    classes = jnp.array([3, 1])
    np.testing.assert_allclose(after(state, classes), logits[:, classes], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_bfloat16_computes_the_same_function(backbone):
    half, x = randomised(described(small(), dtype="bfloat16")), images(64)
    for low, high in zip(jax.tree.leaves(run(half, x)), jax.tree.leaves(run(backbone, x))):
        assert jnp.abs(low - high).max() < 0.03 * jnp.abs(high).max()


@pytest.mark.slow
def test_the_exported_module_has_feature_maps_with_channels_first(backbone, monkeypatch):
    monkeypatch.setattr(standalone, "create_backbone", lambda config: small())
    assert max(differences(backbone, None, "timm").values()) < 1e-5


def test_published_files_hold_tensors_that_timm_now_computes(backbone):
    state = to_torch(backbone, "timm")
    old = {
        f"layers.0.blocks.1.attn.{name}": np.zeros((16, 16))
        for name in ("relative_position_index", "attn_mask")
    }
    ours = parameters(backbone)
    for path, value in to_flax(backbone, {**state, **old}).items():
        np.testing.assert_array_equal(value, ours[path])


def test_another_image_size_needs_whole_windows():
    backbone = abstract_backbone("swin_t", image_size=448)
    assert backbone.feature_shapes() == ((56, 56, 192), (28, 28, 384), (14, 14, 768))
    assert module_config(backbone, "timm")["options"] == {"num_classes": 1000, "img_size": 448}
    with pytest.raises(ValueError, match="swin_t needs an image_size that is a multiple of 224"):
        abstract_backbone("swin_t", image_size=256)
    with pytest.raises(ValueError, match="swin_t was built for 448x448 pixels, got 224x448"):
        backbone(jnp.zeros((1, 224, 448, 3)))


def test_other_models_are_refused():
    with pytest.raises(timm_models.UnsupportedModel, match="it is a SwinTransformerV2"):
        timm_models.describe("swinv2_tiny_window8_256")
    with pytest.raises(timm_models.UnsupportedModel, match="it has FastAdaptiveMaxPool"):
        described(small(global_pool="max"))

"""ConvNeXt and ConvNeXt V2 against timm's and torchvision's modules, float32."""

from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from random_weights import randomised
from references import create, described, equal, images
from running import run

from ttame_jax.backbones.convnext import FAMILY, Architecture, ConvNeXt, ResponseNorm
from ttame_jax.convert.pytorch import timm
from ttame_jax.convert.pytorch.torch_import import import_torchvision
from ttame_jax.weights import abstract_backbone, timm_models
from ttame_jax.weights.transfer import abstract

TIMM_NODES = ["stages.1", "stages.2", "stages.3"]
TORCHVISION_NODES = ["features.3", "features.5", "features.7"]
SIZES = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 40), "num_classes": 10}
V2 = {"use_grn": True, "ls_init_value": None}
KINDS = {
    "original": {},
    "convolutions_as_mlp": {"conv_mlp": True, "act_layer": "gelu_tanh"},
    "tiered_stem": {"stem_type": "overlap_tiered", "conv_mlp": True},
    "norm_before_average": {"stem_type": "overlap", "conv_mlp": True, "head_norm_first": True},
    "hidden_head": {"head_hidden_size": 12, "norm_eps": 1e-3},
    "v2": V2,
    "v2_of_convolutions": {**V2, "conv_mlp": True},
}


def small(kind):
    """timm's module of a few narrow blocks."""
    import_torchvision()
    from timm.models.convnext import ConvNeXt

    return ConvNeXt(**SIZES, **KINDS[kind]).eval()


FEW = ("original", "tiered_stem", "norm_before_average", "v2")


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.slow] * (k not in FEW)) for k in KINDS]
)
def test_convnext_equals_timm(kind):
    module = small(kind)
    equal(described(module), module, TIMM_NODES, images(67, 94))


def test_convnext_equals_torchvision():
    import_torchvision()
    from torchvision.models.convnext import CNBlockConfig
    from torchvision.models.convnext import ConvNeXt as Theirs

    widths, depths = (8, 16, 24, 40), (1, 1, 2, 1)
    module = Theirs(list(map(CNBlockConfig, widths, (*widths[1:], None), depths)), num_classes=10)
    architecture = Architecture(depths=depths, widths=widths, num_classes=10)
    backbone = abstract(lambda rngs: ConvNeXt("any", architecture, rngs=rngs))
    equal(backbone, module.eval(), TORCHVISION_NODES, images(67, 94), "torchvision")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "library", "nodes"),
    [
        ("convnext_tiny", "torchvision", TORCHVISION_NODES),
        ("convnext_tiny", "timm", TIMM_NODES),
        ("timm:convnextv2_atto", "timm", TIMM_NODES),
        ("timm:convnext_atto_ols", "timm", TIMM_NODES),
    ],
)
def test_whole_models_equal_reference(name, library, nodes):
    timms = name.startswith("timm:")
    module = timm.create(name.removeprefix("timm:")) if timms else create(name, library)
    equal(abstract_backbone(name), module, nodes, images(224), library)


@pytest.mark.parametrize("name", FAMILY.architectures)
def test_published_architectures_are_those_of_timm(name):
    fields = asdict(FAMILY.architectures[name])
    del fields["num_classes"], fields["preprocessing"], fields["class_names"]
    assert fields == FAMILY.timm.read(timm.create(name, device="meta"))


def test_features_have_strides_8_16_and_32():
    backbone = abstract_backbone("convnext_tiny")
    assert backbone.feature_shapes() == ((28, 28, 192), (14, 14, 384), (7, 7, 768))
    assert backbone.masking == "pixel" and backbone.class_weights is None


@pytest.mark.parametrize(
    ("kind", "target"), [("v2", "stages.3.blocks.0"), ("norm_before_average", "norm")]
)
def test_logits_follow_from_the_last_layer_with_a_spatial_extent(kind, target):
    backbone = randomised(described(small(kind)))
    assert backbone.target_layer == target
    some = jnp.array([7, 2])

    @jax.jit
    def both(x):
        before, after = backbone.split()
        state = before(x)
        return backbone(x)[0], after(state), after(state, some), state[0]

    logits, all_classes, chosen, output = both(images(64))
    assert output.shape == (2, 2, 2, 40)
    np.testing.assert_allclose(all_classes, logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(chosen, logits[:, some], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["original", "tiered_stem"])
def test_the_smallest_input_is_pytorchs(kind):
    module = small(kind)
    backbone = described(module)
    smallest = backbone.min_size
    assert module(torch.zeros(1, 3, smallest, smallest)).isfinite().all()
    with pytest.raises(RuntimeError):
        module(torch.zeros(1, 3, smallest - 1, smallest - 1))
    with pytest.raises(ValueError, match=f"at least {smallest}x{smallest} pixels"):
        backbone(jnp.zeros((1, smallest - 1, smallest, 3)))


@pytest.mark.slow
def test_bfloat16_computes_the_same_function():
    half, full = (randomised(described(small("v2"), dtype=dtype)) for dtype in ("bfloat16", None))
    x = images(64)
    for low, high in zip(jax.tree.leaves(run(half, x)), jax.tree.leaves(run(full, x))):
        assert jnp.abs(low - high).max() < 0.03 * jnp.abs(high).max()


def test_response_normalisation_of_an_empty_channel_has_a_finite_gradient():
    norm = ResponseNorm(3)
    norm.scale[...] = jnp.ones(3)
    x = jnp.ones((1, 2, 2, 3)).at[..., 1].set(0)
    assert jnp.isfinite(jax.grad(lambda x: norm(x).sum())(x)).all()


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("convnext_atto_rms", "has RmsNorm2d"),
        ("convnext_zepto_rms_ols", "has SimpleNorm2d"),
        ("convnext_tiny.dinov3_lvd1689m", "has no classifier"),
        ("test_convnext3", "has SiLU"),
    ],
)
def test_other_layers_are_refused(model, reason):
    with pytest.raises(timm_models.UnsupportedModel) as error:
        timm_models.describe(model)
    assert any(found.startswith(reason) for found in error.value.reasons)

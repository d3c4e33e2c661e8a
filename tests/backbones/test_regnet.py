"""RegNet against torchvision's and timm's modules, float32."""

from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from references import check, check_round_trip, create, images, load

from ttame_jax.backbones.regnet import FAMILY, Architecture, RegNet
from ttame_jax.convert.authors import authors_nodes
from ttame_jax.convert.pytorch import timm
from ttame_jax.convert.pytorch.checkpoints import numpy_state
from ttame_jax.convert.pytorch.torch_import import import_torchvision
from ttame_jax.convert.timm_table import randomise
from ttame_jax.weights import abstract_backbone, timm_models
from ttame_jax.weights.transfer import abstract, fill, shapes, to_flax

TORCHVISION_NODES = ["trunk_output.block2", "trunk_output.block3", "trunk_output.block4"]
SMALL = {"depths": (1, 2, 1, 1), "widths": (8, 24, 32, 48)}


def small(squeeze):
    """timm's module of a few narrow blocks, the first of which has a single group."""
    timm.create("regnetx_002", device="meta")  # imports timm with torchvision's workaround
    from timm.models.regnet import RegNet, RegNetCfg

    sizes = RegNetCfg(w0=8, wa=11.0, wm=1.7, depth=5, group_size=16, se_ratio=squeeze)
    return RegNet(sizes, num_classes=5).eval()


def small_torchvision(squeeze):
    from torchvision.models.regnet import BlockParams, RegNet

    ones, groups = [1.0] * 4, [8] * 4
    sizes = BlockParams([*SMALL["depths"]], [*SMALL["widths"]], groups, ones, [2] * 4, squeeze)
    return RegNet(sizes, num_classes=5).eval()


@pytest.mark.parametrize("squeeze", [0, 0.25])
def test_regnet_equals_timm(squeeze):
    module = randomise(small(squeeze))
    assert module.s1.b1.conv2.conv.groups == 1 < module.s4.b1.conv2.conv.groups
    backbone = load(module)
    check(backbone, module, ["s2", "s3", "s4"], images(65, 90))
    check_round_trip(backbone, module, "timm")


@pytest.mark.parametrize("squeeze", [None, 0.25])
def test_regnet_equals_torchvision(squeeze):
    import_torchvision()
    module = randomise(small_torchvision(squeeze))
    architecture = Architecture(**SMALL, group_width=8, squeeze=bool(squeeze), num_classes=5)
    backbone = abstract(lambda rngs: RegNet("small", architecture, rngs=rngs))
    fill(backbone, to_flax(backbone, numpy_state(module.state_dict())))
    check(backbone, module, TORCHVISION_NODES, images(65, 90))
    check_round_trip(backbone, module, "torchvision")
    assert authors_nodes(backbone) == TORCHVISION_NODES


@pytest.mark.slow
@pytest.mark.parametrize("name", ["regnet_x_400mf", "regnet_y_400mf"])
def test_published_regnets_equal_torchvision(name):
    module = randomise(create(name, "torchvision", num_classes=10))
    backbone = abstract_backbone(name, num_classes=10)
    fill(backbone, to_flax(backbone, numpy_state(module.state_dict())))
    check(backbone, module, TORCHVISION_NODES, images(224))


@pytest.mark.parametrize("name", FAMILY.architectures)
def test_published_architectures_are_those_of_timm(name):
    fields = asdict(FAMILY.architectures[name])
    del fields["num_classes"], fields["preprocessing"], fields["class_names"]
    assert fields == FAMILY.timm.read(timm.create(FAMILY.timm.models[name], device="meta"))


@pytest.fixture
def sizes_on_the_cpu(monkeypatch):
    """torchvision computes the sizes of its RegNets with tensors, which "meta" has no values for."""
    import_torchvision()
    from torchvision.models.regnet import BlockParams

    original = BlockParams.from_init_params

    def from_init_params(**sizes):
        with torch.device("cpu"):
            return original(**sizes)

    monkeypatch.setattr(BlockParams, "from_init_params", from_init_params)


@pytest.mark.parametrize("name", ["regnet_x_8gf", "regnet_y_800mf"])
def test_published_architectures_have_torchvisions_tensors(name, sizes_on_the_cpu):
    with torch.device("meta"):
        module = create(name, "torchvision")
    theirs = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    assert shapes(abstract_backbone(name), "torchvision") == theirs


def test_the_classifier_averages_the_last_feature_map():
    backbone = load(randomise(small(0.25)))
    _, after = backbone.split()
    shape = (2, 2, 3, backbone.architecture.widths[-1])
    state = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    logits = state.mean(axis=(1, 2)) @ backbone.class_weights + backbone.head.bias[...]
    np.testing.assert_allclose(after((state,)), logits, rtol=1e-4, atol=1e-5)
    assert backbone.target_layer == backbone.feature_layers[-1]
    assert [shape[0] for shape in backbone.feature_shapes(64)] == [8, 4, 2]


@pytest.mark.slow
def test_a_regnet_has_its_gradient():
    """`Conv` has its own implementation on CPUs except for groups."""
    backbone = load(randomise(small(0)))
    gradient = jax.jit(jax.grad(lambda x: backbone(x)[0][:, 0].sum()))(jnp.asarray(images(33)))
    assert jnp.isfinite(gradient).all() and (gradient != 0).any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("regnetv_040", "has PreBottleneck, SiLU"),
        ("regnetz_040", "has SiLU"),
        ("regnety_040_sgn", "has GroupNormAct, SiLU"),
    ],
)
def test_other_regnets_are_refused(model, reason):
    with pytest.raises(
        timm_models.UnsupportedModel, match=f"not supported: it {reason}; import it with"
    ):
        timm_models.describe(model)

"""Backbones by timm's names: parity of every refinement, preprocessing, refusals."""

import sys

import numpy as np
import pytest
from references import assert_close, described, equal, images, outputs
from running import run

from ttame_jax.convert.pytorch.checkpoints import numpy_state
from ttame_jax.convert.pytorch.torch_import import import_torchvision
from ttame_jax.convert.timm_table import randomise
from ttame_jax.preprocessing import Preprocessing
from ttame_jax.weights import load_backbone, save_backbone
from ttame_jax.weights.transfer import fill, parameters, to_flax

VITS = {
    "class_token": {},
    "registers": {"reg_tokens": 3, "no_embed_class": True, "init_values": 0.1},
    "registers_with_positions": {"reg_tokens": 2, "mlp_ratio": 2.5},
    "no_class_token": {"class_token": False, "global_pool": "avg", "qkv_bias": False},
    "norm_before_pool": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "patches_beside_class_token": {"global_pool": "avg", "reg_tokens": 1},
}


@pytest.mark.parametrize("kind", VITS)
@pytest.mark.parametrize("features", ["block", "norm"])
def test_vit_equals_timm(kind, features):
    check_vit(features, **VITS[kind])


def test_clip_equals_timm():
    import_torchvision()
    from timm.layers import LayerNorm, QuickGELU

    norm = lambda width, **options: LayerNorm(width, eps=1e-3, **options)
    check_vit("block", pre_norm=True, act_layer=QuickGELU, norm_layer=norm)


def test_siglip_equals_timm():
    import_torchvision()
    from timm.layers import GELUTanh

    check_vit("block", act_layer=GELUTanh, class_token=False, global_pool="avg")


def check_vit(features, **options):
    import_torchvision()
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 64, "patch_size": 16, "embed_dim": 48, "depth": 4, "num_heads": 3}
    module = VisionTransformer(**sizes, num_classes=10, **{"qkv_bias": True, **options}).eval()
    suffix = ".norm1" if features == "norm" else ""
    nodes = [f"blocks.{i}{suffix}" for i in (1, 2, 3)]
    backbone = described(module, features=features)
    equal(backbone, module, nodes, images(64), prefix=module.num_prefix_tokens)
    assert backbone.preprocessing == Preprocessing(64, 73, "bicubic", (0.5,) * 3, (0.5, 0.25, 0.5))


DEEP_STEM = {"stem_type": "deep_tiered", "stem_width": 16, "avg_down": True}


@pytest.mark.parametrize(
    ("block", "options"),
    [
        ("BasicBlock", DEEP_STEM),
        ("Bottleneck", DEEP_STEM),
        ("Bottleneck", {"stem_type": "deep", "stem_width": 24}),
        ("Bottleneck", {"cardinality": 4, "base_width": 8}),
        ("Bottleneck", {"base_width": 128}),
        ("BasicBlock", {"block_args": {"attn_layer": "se"}}),
        ("Bottleneck", {"block_args": {"attn_layer": "se"}}),
    ],
)
def test_resnet_equals_timm(block, options):
    import_torchvision()
    from timm.models import resnet

    options = {"channels": (16, 24, 32, 48), "num_classes": 10, **options}
    module = resnet.ResNet(getattr(resnet, block), (1, 2, 1, 1), **options).eval()
    for size in ((64, 64), (75, 90)):  # an odd side's last row is pooled alone
        equal(described(module), module, ["layer2", "layer3", "layer4"], images(*size))


def test_a_model_by_name_has_its_own_classes_and_preprocessing():
    backbone = load_backbone("timm:test_vit.r160_in1k")
    assert backbone.num_classes == 1000 and backbone.masking == "standardised"
    assert backbone.preprocessing == Preprocessing(160, 168, "bicubic", (0.5,) * 3, (0.5,) * 3)
    assert backbone.feature_shapes() == ((10, 10, 64),) * 3
    smaller = load_backbone("timm:test_vit", num_classes=5, image_size=80, features="norm")
    assert smaller.num_classes == 5 and smaller.feature_shapes() == ((5, 5, 64),) * 3
    with pytest.raises(
        ValueError, match="timm:test_vit has no option colour; it has architecture,"
    ):
        load_backbone("timm:test_vit", colour=3)


def test_position_embeddings_fit_another_size():
    import_torchvision()
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    module = randomise(timm.create_model("test_vit2", num_classes=10).eval())
    other = timm.create_model("test_vit2", num_classes=10, img_size=96).eval()
    other.load_state_dict(checkpoint_filter_fn(module.state_dict(), other))
    backbone = load_backbone("timm:test_vit2", num_classes=10, image_size=96)
    fill(backbone, to_flax(backbone, numpy_state(module.state_dict())))
    x = images(96)
    expected = outputs(other, [f"blocks.{i}" for i in (5, 6, 7)], x, other.num_prefix_tokens)
    for ours, theirs in zip((run(backbone, x)[0], *run(backbone, x)[1]), expected):
        assert_close(ours, theirs)


def test_our_own_file_of_a_timm_model_needs_no_timm(tmp_path, monkeypatch):
    backbone = load_backbone("timm:test_vit2", num_classes=5, image_size=80)
    save_backbone(backbone, tmp_path / "w.safetensors")
    for library in ("torch", "timm", "torchvision"):
        monkeypatch.setitem(sys.modules, library, None)
    again = load_backbone("timm:test_vit2", tmp_path / "w.safetensors", features="norm")
    assert again.architecture == backbone.architecture and again.features == "norm"
    for path, value in parameters(backbone).items():
        np.testing.assert_array_equal(parameters(again)[path], value)
    with pytest.raises(ImportError, match=r"architecture of timm:test_vit needs timm: pip install"):
        load_backbone("timm:test_vit")


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("deit_tiny_distilled_patch16_224", "it is a VisionTransformerDistilled"),
        ("coatnet_0_224", "it is a MaxxVit"),
        ("ecaresnet50d", "it has Conv1d, EcaModule"),
        ("resnetaa50", "it pools its stem by AvgPool2d"),
        ("resnet50_gn", "it has GroupNorm"),
        ("test_resnet", "it differs in layer3.0.bn3.bias and 13 other tensors"),
        ("test_vit3", "it has AttentionPoolLatent, it pools its tokens by 'map'"),
        ("test_vit4", "it has RmsNorm"),
        ("vit_base_patch32_siglip_gap_256", "it has no classifier"),
        ("vit_so400m_patch14_siglip_gap_384", "it has no classifier .*, it leaves out pixels"),
        ("vit_base_patch16_rope_reg1_gap_256", "it is a "),
    ],
)
def test_what_is_not_supported_is_refused_with_its_reason(model, reason):
    with pytest.raises(ValueError, match=f"timm:{model} is not supported: {reason}") as error:
        load_backbone(f"timm:{model}")
    assert "\n" not in str(error.value)


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match="timm .* has no model 'resnet5': timm.list_models"):
        load_backbone("timm:resnet5")

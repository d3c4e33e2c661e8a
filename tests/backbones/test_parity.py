"""Logits and feature maps against the real torchvision and timm modules, float32."""

import numpy as np
import pytest
import torch
from references import (
    TINY_VIT,
    assert_close,
    check,
    check_round_trip,
    create,
    create_free_vit,
    images,
    spatial,
)
from running import run
from safetensors.torch import load_file, save_file

from ttame_jax.backbones.vit import resample_pos_embed
from ttame_jax.convert.pytorch.torch_import import import_torchvision
from ttame_jax.convert.timm_table import randomise
from ttame_jax.weights import load_backbone


def carry(model, path, name, **config):
    """Our backbone with the module's weights, by way of a file."""
    save_file(model.state_dict(), path)
    backbone = load_backbone(name, path, **config)
    path.unlink()
    return backbone


def vgg_nodes(model, kind):
    """The last three max-pools, or the layers before them."""
    pools = [
        int(index)
        for index, layer in model.features.named_children()
        if isinstance(layer, torch.nn.MaxPool2d)
    ]
    return [f"features.{index - (kind == 'conv')}" for index in pools[-3:]]


RESNET_NODES = ["layer2", "layer3", "layer4"]


@pytest.mark.slow
def test_vgg16_equals_torchvision(tmp_path):
    model = randomise(create("vgg16", "torchvision"))
    backbone = carry(model, tmp_path / "w.safetensors", "vgg16")
    nodes = vgg_nodes(model, "pool")
    assert nodes == ["features.16", "features.23", "features.30"]
    check(backbone, model, nodes, images(224))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "library", "features", "sizes"),
    [
        ("vgg11_bn", "torchvision", "conv", ((32, 32), (97, 65))),
        ("vgg13", "timm", "pool", ((64, 128),)),
    ],
)
def test_vgg_equals_reference_where_the_grid_is_not_7x7(name, library, features, sizes, tmp_path):
    model = randomise(create(name, library, num_classes=10))
    backbone = carry(model, tmp_path / "w.safetensors", name, num_classes=10, features=features)
    for size in sizes:
        check(backbone, model, vgg_nodes(model, features), images(*size))
    check_round_trip(backbone, model, library)


@pytest.mark.parametrize(
    ("name", "library", "size"),
    [
        ("resnet50", "torchvision", 224),
        ("resnet50", "timm", 97),
        ("resnet18", "torchvision", 112),
        ("resnet34", "timm", 64),
    ],
)
def test_resnet_equals_reference(name, library, size, tmp_path):
    model = randomise(create(name, library))
    backbone = carry(model, tmp_path / "w.safetensors", name)
    check(backbone, model, RESNET_NODES, images(size))
    check_round_trip(backbone, model, library)


@pytest.mark.parametrize(
    ("name", "nodes"),
    [
        ("squeezenet1_0", ["features.6", "features.11", "features.12"]),
        ("squeezenet1_1", ["features.5", "features.8", "features.12"]),
    ],
)
def test_squeezenet_equals_torchvision_at_odd_and_even_sizes(name, nodes, tmp_path):
    model = randomise(create(name, "torchvision"))
    backbone = carry(model, tmp_path / "w.safetensors", name)
    for size in ((224, 224), (63, 90), (61, 64)):
        check(backbone, model, nodes, images(*size))
    check_round_trip(backbone, model, "torchvision")


@pytest.fixture(scope="module")
def vit_b_16():
    return randomise(create("vit_b16", "torchvision"))


@pytest.mark.slow
def test_vit_b16_block_outputs_equal_torchvision(vit_b_16, tmp_path):
    backbone = carry(vit_b_16, tmp_path / "w.safetensors", "vit_b16")
    nodes = [f"encoder.layers.encoder_layer_{i}" for i in (9, 10, 11)]
    check(backbone, vit_b_16, nodes, images(224))


@pytest.mark.slow
def test_vit_b16_norms_equal_the_nodes_of_the_authors_code(vit_b_16, tmp_path):
    from torchvision.models.feature_extraction import create_feature_extractor

    backbone = carry(vit_b_16, tmp_path / "w.safetensors", "vit_b16", features="norm")
    x = images(224)
    nodes = [f"encoder.layers.encoder_layer_{i}.ln" for i in (9, 10, 11)]
    with torch.no_grad():
        extractor = create_feature_extractor(vit_b_16, nodes)
        theirs = extractor(torch.from_numpy(x).permute(0, 3, 1, 2))
    _, features = run(backbone, x)
    for ours, node in zip(features, nodes):
        assert_close(ours, spatial(theirs[node]))


@pytest.mark.parametrize(("features", "suffix"), [("block", ""), ("norm", ".norm1")])
def test_vit_ti16_equals_timm(features, suffix, tmp_path):
    model = randomise(create("vit_ti16", "timm"))
    backbone = carry(model, tmp_path / "w.safetensors", "vit_ti16", features=features)
    check(backbone, model, [f"blocks.{i}{suffix}" for i in (9, 10, 11)], images(224))


@pytest.mark.parametrize(
    ("library", "block"),
    [("torchvision", "encoder.layers.encoder_layer_{}"), ("timm", "blocks.{}")],
)
def test_free_vit_equals_reference(library, block, tmp_path):
    model = randomise(create_free_vit(library))
    backbone = carry(model, tmp_path / "w.safetensors", "vit", num_classes=10, **TINY_VIT)
    check(backbone, model, [block.format(i) for i in (1, 2, 3)], images(48))
    check_round_trip(backbone, model, library)


@pytest.mark.parametrize(("old", "new"), [(14, 24), (14, 7), (6, 13), (7, 6), (1, 4)])
def test_position_embeddings_are_resampled_as_timm_does(old, new):
    import_torchvision()
    from timm.layers import resample_abs_pos_embed

    embeddings = np.random.default_rng(0).normal(size=(1, 1 + old**2, 16)).astype(np.float32)
    theirs = resample_abs_pos_embed(torch.from_numpy(embeddings), [new, new]).numpy()
    ours = np.asarray(resample_pos_embed(embeddings, new))
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max(), rtol=0)


def test_vit_at_another_image_size_equals_timm(tmp_path):
    import_torchvision()
    from timm.models.vision_transformer import checkpoint_filter_fn

    state = randomise(create("vit_ti16", "timm")).state_dict()
    model = create("vit_ti16", "timm", img_size=80)
    model.load_state_dict(checkpoint_filter_fn(dict(state), model))
    save_file(state, tmp_path / "w.safetensors")
    backbone = load_backbone("vit_ti16", tmp_path / "w.safetensors", image_size=80)
    check(backbone, model, [f"blocks.{i}" for i in (9, 10, 11)], images(80))


def test_real_squeezenet_equals_torchvision(shared):
    path = shared / "weights" / "squeezenet1_0.safetensors"
    model = create("squeezenet1_0", "torchvision")
    model.load_state_dict(load_file(path))
    check(
        load_backbone("squeezenet1_0", path),
        model,
        ["features.6", "features.11", "features.12"],
        images(224),
    )


def test_real_vit_equals_timm(shared):
    from timm.models.vision_transformer import VisionTransformer

    path = shared / "weights" / "vit_cifar10.safetensors"
    model = VisionTransformer(32, 4, embed_dim=128, depth=6, num_heads=4, num_classes=10).eval()
    model.load_state_dict(load_file(path))
    config = {"image_size": 32, "patch_size": 4, "width": 128, "depth": 6, "num_heads": 4}
    backbone = load_backbone("vit", path, num_classes=10, **config)
    check(backbone, model, [f"blocks.{i}" for i in (3, 4, 5)], images(32))

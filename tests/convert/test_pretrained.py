"""Names and preprocessing of published weights against torchvision's and timm's registries."""

import dataclasses

import pytest

from ttame_jax.backbones import FAMILIES
from ttame_jax.convert.pytorch.timm import read_card
from ttame_jax.convert.pytorch.torch_import import import_torchvision
from ttame_jax.weights.backbones import published

TORCHVISION, TIMM = published("torchvision"), published("timm")
ARCHITECTURES = {name: a for family in FAMILIES for name, a in family.architectures.items()}

pytest.importorskip("torch")


@pytest.mark.parametrize("name", TORCHVISION)
def test_preprocessing_is_that_of_torchvisions_weights(name):
    weights = import_torchvision().models.get_model_weights(TORCHVISION[name]).IMAGENET1K_V1
    theirs = weights.transforms()
    ours = ARCHITECTURES[name].preprocessing
    assert [ours.image_size] == theirs.crop_size and [ours.resize_size] == theirs.resize_size
    assert ours.interpolation == theirs.interpolation.value
    assert list(ours.mean) == theirs.mean and list(ours.std) == theirs.std


@pytest.mark.parametrize("name", TIMM)
def test_the_default_model_is_timms(name):
    import_torchvision()
    from timm.models import get_pretrained_cfg

    architecture, _, tag = TIMM[name].partition(".")
    assert get_pretrained_cfg(architecture).tag == tag


@pytest.mark.parametrize("name", ["vit_b16", "resnet50", "vgg16"])
def test_a_model_card_is_read_as_timm_reads_it(name):
    import_torchvision()
    from timm.data import create_transform, resolve_data_config
    from timm.models import get_pretrained_cfg

    pretrained = get_pretrained_cfg(TIMM[name])
    theirs = resolve_data_config(pretrained_cfg=dataclasses.asdict(pretrained))
    resize, crop = create_transform(**theirs).transforms[:2]
    ours = read_card({"num_classes": 1000, "pretrained_cfg": dataclasses.asdict(pretrained)})
    assert ours["preprocessing"] == {
        "image_size": crop.size[0],
        "resize_size": resize.size,
        "interpolation": resize.interpolation.value,
        "mean": theirs["mean"],
        "std": theirs["std"],
    }

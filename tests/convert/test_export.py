"""A run as PyTorch files: layouts, the authors' checkpoint, the standalone module."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file

from ttame_jax import load_explainer
from ttame_jax.convert.authors import authors_nodes
from ttame_jax.convert.export import run_to_torch
from ttame_jax.convert.modules import libraries, module_config
from ttame_jax.convert.pytorch import torch_import
from ttame_jax.convert.pytorch.torch_import import import_torchvision
from ttame_jax.convert.verify import differences, random_images, verify
from ttame_jax.errors import Failure
from ttame_jax.losses import LossConfig
from ttame_jax.runs import load_run
from ttame_jax.weights import abstract_backbone

# Outside this project's environment, as far as that can be arranged in a subprocess.
SCRIPT = """
import runpy, sys
for name in ("ttame_jax", "convert", "jax", "flax", "safetensors"):
    sys.modules[name] = None
runpy.run_path({torch_import!r})["import_torchvision"]()
sys.path.insert(0, ".")
import numpy, torch
from explainer import load
images = torch.from_numpy(numpy.load("images.npy")).permute(0, 3, 1, 2)
explainer = load("explainer.pt")
logits, maps = explainer(images)
_, others = explainer(images, torch.tensor([[0, 4], [4, 5]]))
numpy.savez("maps.npz", logits=logits, maps=maps, others=others)
"""


@pytest.mark.parametrize(
    ("backbone", "fields"),
    [
        ("vit", {"variant": "sigmoid", "loss": LossConfig("scaled")}),
        pytest.param(
            "squeezenet1_1",
            {"backbone_config": {"num_classes": 7, "image_size": 64}},
            marks=pytest.mark.slow,
        ),
        pytest.param("swin_t", {"backbone_config": {"num_classes": 7}}, marks=pytest.mark.slow),
        pytest.param(
            "timm:test_vit2",
            {"variant": "lcam", "backbone_config": {"num_classes": 7, "features": "norm"}},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_module_needs_nothing_of_ours(backbone, fields, make_run, tmp_path):
    run, output = tmp_path / "run", tmp_path / "files"
    make_run(run, backbone, **fields)
    run_to_torch(run, output, module=True)
    explainer = load_explainer(run)
    images = random_images(explainer.backbone.preprocessing.image_size, 2)
    np.save(output / "images.npy", images)
    script = SCRIPT.format(torch_import=torch_import.__file__)
    subprocess.run([sys.executable, "-I", "-c", script], cwd=output, check=True)
    theirs = np.load(output / "maps.npz")
    with jax.default_matmul_precision("highest"):
        ours, others = explainer(images), explainer(images, np.array([[0, 4], [4, 5]]))
    np.testing.assert_array_equal(theirs["logits"].argmax(1), ours.classes[:, 0])
    np.testing.assert_allclose(theirs["maps"], ours.maps, atol=1e-5)
    np.testing.assert_allclose(theirs["others"], others.maps, atol=1e-5)
    assert theirs["maps"].max() == 1 and theirs["maps"].min() == 0


def test_a_constant_map_becomes_zero_in_the_module_too():
    from ttame_jax.convert.standalone import min_max_scale

    maps = torch.stack([torch.full((3, 3), 2.0), torch.arange(9.0).view(3, 3)])[None]
    assert min_max_scale(maps)[0, 0].eq(0).all() and min_max_scale(maps)[0, 1].max() == 1


def test_files_of_a_run(make_run, tmp_path):
    make_run(tmp_path / "run", "resnet18", step=9)
    said = run_to_torch(tmp_path / "run", tmp_path / "files")
    names = sorted(os.listdir(tmp_path / "files"))
    assert (
        names
        == sorted(line.partition(":")[0] for line in said)
        == [
            "attention.ckpt",
            "attention.safetensors",
            "backbone.timm.safetensors",
            "backbone.torchvision.safetensors",
        ]
    )
    content = torch.load(tmp_path / "files" / "attention.ckpt", weights_only=True)
    assert content["global_step"] == 9 and content["hparams_name"] == "kwargs"
    assert content["hyper_parameters"]["layers"] == ["layer2", "layer3", "layer4"]
    state = content["state_dict"]
    assert state["generic.attn_mech.bns.2.num_batches_tracked"] == 9
    module = import_torchvision().models.resnet18()
    body = load_file(tmp_path / "files" / "backbone.torchvision.safetensors")
    module.load_state_dict(body)
    for prefix in ("generic.body.", "generic.arrangement.body."):
        assert all(state[prefix + key].equal(value) for key, value in body.items())
    assert len(state) == 2 * len(body) + 3 * 7 + 2  # three branches, and the fusion


@pytest.mark.parametrize(
    ("backbone", "fields", "reason"),
    [
        ("vit", {}, "torchvision has no vit"),
        ("resnet18", {"variant": "no_skip"}, "it has no variant no_skip"),
        ("resnet18", {"loss": LossConfig("scaled")}, "it scales maps without a sigmoid"),
        ("squeezenet1_1", {"backbone_config": {"num_classes": 7}}, "it takes 1000 classes and"),
    ],
)
def test_no_checkpoint_that_the_authors_code_could_not_load(
    backbone, fields, reason, make_run, tmp_path
):
    make_run(tmp_path / "run", backbone, **fields)
    said = run_to_torch(tmp_path / "run", tmp_path / "files")
    assert any(line.startswith("no attention.ckpt") and reason in line for line in said)
    assert "attention.ckpt" not in os.listdir(tmp_path / "files")


def test_what_no_library_has_is_refused_and_leaves_nothing(make_run, tmp_path):
    make_run(tmp_path / "run", "digits_cnn")
    with pytest.raises(ValueError, match="neither torchvision nor timm has a model of digits_cnn"):
        run_to_torch(tmp_path / "run", tmp_path / "files", module=True)
    with pytest.raises(
        ValueError, match="timm has no model of digits_cnn; neither torchvision nor"
    ):
        run_to_torch(tmp_path / "run", tmp_path / "files", module=True, library="timm")
    with pytest.raises(ValueError, match="neither torchvision nor timm has a model of digits_cnn"):
        list(verify(str(tmp_path / "run")))
    assert sorted(os.listdir(tmp_path)) == ["run", "weights.safetensors"]


def test_verify_measures_every_library_and_fails_above_the_tolerance(make_run, tmp_path):
    make_run(tmp_path / "run", "vit")
    lines = list(verify(str(tmp_path / "run")))
    assert [line.split()[0] for line in lines] == ["torchvision", "timm"]
    assert all(
        word in line for line in lines for word in ("logits", "features 1", "features 3", "maps")
    )
    with pytest.raises(Failure, match=r"run differs from torchvision: \w+.* by \d.*e-\d+, above"):
        list(verify(str(tmp_path / "run"), tolerance=1e-12))
    with pytest.raises(FileNotFoundError, match="no run runs/nothing"):
        list(verify("runs/nothing"))


def test_verify_sees_each_wrong_part(make_run, tmp_path, monkeypatch):
    make_run(tmp_path / "run", "vit")
    run = load_run(tmp_path / "run")
    backbone, attention = run.backbone, run.attention
    clean = differences(backbone, attention, "timm")
    assert max(clean.values()) < 1e-5
    from ttame_jax.convert import export

    whole = export.explainer_state
    for key, wrong in (
        ("backbone.head.weight", "logits"),
        ("backbone.blocks.3.norm1.weight", "features 3"),
        ("attention.fuser.weight", "maps"),
    ):

        def spoilt(*args, key=key):
            state = whole(*args)
            return {**state, key: state[key][::-1] + 0.1}

        monkeypatch.setattr(export, "explainer_state", spoilt)
        assert differences(backbone, attention, "timm")[wrong] > 1e-3


def test_feature_maps_are_named_as_in_the_paper():
    def nodes(backbone, library):
        return module_config(backbone, library)["nodes"]

    assert nodes(abstract_backbone("vgg16"), "torchvision") == [
        "features.16",
        "features.23",
        "features.30",
    ]
    assert nodes(abstract_backbone("vgg16_bn"), "timm") == [
        "features.23",
        "features.33",
        "features.43",
    ]
    squeezenet = abstract_backbone("squeezenet1_0")
    assert nodes(squeezenet, "torchvision") == ["features.6", "features.11", "features.12"]
    assert libraries(squeezenet) == ["torchvision"]
    assert libraries(abstract_backbone("vit_s16")) == ["torchvision", "timm"]
    vit = abstract_backbone("vit_b16")
    assert nodes(vit, "timm") == ["blocks.9", "blocks.10", "blocks.11"]


def test_reference_names_are_nodes_of_torchvisions_graph():
    """What the authors' code hands to torchvision's feature extraction exists there."""
    torchvision = import_torchvision()
    from torchvision.models.feature_extraction import get_graph_node_names

    with torch.device("meta"):
        module = torchvision.models.vit_b_16()
    known = get_graph_node_names(module)[1]
    for features in ("norm", "block"):
        backbone = abstract_backbone("vit_b16", features=features)
        assert set(authors_nodes(backbone)) <= set(known)


def test_the_template_holds_no_settings_of_its_own():
    template = Path(torch_import.__file__).parents[1].joinpath("standalone.py").read_text()
    assert template.count("CONFIG: dict = {}") == 1 and "ttame_jax" not in template

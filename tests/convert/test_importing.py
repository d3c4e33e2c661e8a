"""`ttame convert import`: classifiers that this project does not have, from PyTorch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from real_images import read_images
from running import run as forward
from tiny import TINY

from ttame_jax.backbones import aten
from ttame_jax.cli import main
from ttame_jax.convert.importing import load_module, relative
from ttame_jax.files import read_safetensors, write_safetensors
from ttame_jax.methods import compute_maps, load_method
from ttame_jax.weights import abstract_backbone, load_backbone, save_backbone
from ttame_jax.weights.transfer import digest

MODULE = """
import torch
from torch import nn

from ttame_jax.convert.pytorch.torch_import import import_torchvision
from ttame_jax.convert.timm_table import randomise

import_torchvision()
from timm.models.vision_transformer import VisionTransformer


def vit():
    sizes = {"embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
    return randomise(VisionTransformer(32, 8, **sizes))


class CNN(nn.Module):
    def __init__(self):
        super().__init__()
        widths = (3, 4, 8, 16)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True)
                )
                for i, o in zip(widths, widths[1:])
            )
        )
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        return self.fc(self.stages(x).mean((2, 3)))


def cnn():
    return randomise(CNN())


class Flat(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :5]


class Fourier(CNN):
    def forward(self, x):
        return self.fc(torch.fft.rfft2(self.stages(x)).abs().mean((2, 3)))


class Rounding(CNN):
    def forward(self, x):
        return self.fc(self.stages(x).mean((2, 3)) + 1e4 - 1e4)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.relu(self.fc(x)) + x.mean(1, keepdim=True)


class TwoBranches(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.ModuleList(nn.Conv2d(3, 8, 8, 8) for _ in range(2))
        self.branches = nn.ModuleList(nn.Sequential(*(Block() for _ in range(3))) for _ in range(2))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        tokens = [embed(x).flatten(2).transpose(1, 2) for embed in self.embed]
        return self.fc(sum(branch(x).mean(1) for branch, x in zip(self.branches, tokens)))


class LateClassToken(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 8, 8)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.blocks = nn.ModuleList(Block() for _ in range(5))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        for i, block in enumerate(self.blocks):
            if i == 3:
                x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
            x = block(x)
        return self.fc(x[:, 0])


class Branching(CNN):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


def features_only():
    return CNN().stages


def wrong():
    return [CNN()]


def failing():
    return CNN().no_such_layer
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    path = tmp_path_factory.mktemp("import") / "module.py"
    path.write_text(MODULE)
    return path


def imported(module, name):
    """The path of an imported classifier of 32x32 pixels."""
    path = module.parent / f"{name}.safetensors"
    if not path.exists():
        words = ["import", f"{module}:{name}", "--output", str(path), "--image-size", "32"]
        main(["convert", *words])
    return path


def made(module, name):
    """PyTorch's module itself."""
    names = {}
    exec(module.read_text(), names)  # noqa: S102
    return names[name]().eval()


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


IMAGES = np.random.default_rng(0).uniform(size=(3, 32, 32, 3)).astype(np.float32)


def test_the_command_says_what_it_wrote(module, capsys):
    path = module.parent / "told.safetensors"
    main(["convert", "import", f"{module}:cnn", "--output", str(path), "--image-size", "32"])
    first, maps, layer, differences = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{path}: {module}:cnn, ") and first.endswith("5 classes, 32x32 pixels")
    assert maps == "feature maps: stages.0 16x16x4, stages.1 8x8x8, stages 4x4x16"
    assert layer == "layer of CAM methods: stages"
    assert differences.startswith("differences from PyTorch: logits ")


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_logits_and_gradients_are_pytorchs(name, module):
    backbone, reference = load_backbone(str(imported(module, name))), made(module, name)
    images = torch.from_numpy(IMAGES).permute(0, 3, 1, 2).requires_grad_()
    expected = reference(images)
    logits, features = forward(backbone, IMAGES)
    np.testing.assert_allclose(logits, expected.detach(), atol=1e-5)
    assert [x.shape for x in features] == [(3, *x) for x in backbone.feature_shapes()]
    (gradient,) = torch.autograd.grad(expected[:, 1].sum(), images)
    ours = jax.jit(jax.grad(lambda x: backbone(x)[0][:, 1].sum()))(IMAGES)
    difference = np.abs(ours - gradient.permute(0, 2, 3, 1).numpy()).max()
    assert difference < 1e-5 * np.abs(ours).max()


@pytest.mark.parametrize("method", ["gradcam", "ablationcam"])
def test_methods_explain_an_imported_classifier_as_the_ported_one(
    method, module, tmp_path, monkeypatch
):
    torch.save(made(module, "vit").state_dict(), tmp_path / "vit.pth")
    monkeypatch.setenv("TTAME_CACHE", str(tmp_path))
    ported = load_backbone("vit", tmp_path / "vit.pth", **TINY)
    backbone = load_backbone(str(imported(module, "vit")))
    assert backbone.target_layer == ported.target_layer == "blocks.2.norm1"
    assert backbone.feature_layers == ported.feature_layers
    assert backbone.masking == ported.masking
    classes = np.array([[1, 3]] * 3)
    maps = [compute_maps(load_method(method, one), IMAGES, classes) for one in (backbone, ported)]
    assert np.abs(maps[0] - maps[1]).max() < 1e-4


def test_any_named_module_can_be_read_and_edited(module):
    backbone = load_backbone(str(imported(module, "cnn")))
    before, after = backbone.split("stages.1.0")  # a convolution
    state = before(IMAGES)
    assert state[0].shape == (3, 8, 8, 8)
    np.testing.assert_allclose(after(state), forward(backbone, IMAGES)[0], atol=1e-5)
    edited = after((state[0] * 0, *state[1:]), np.array([2, 0]))
    np.testing.assert_allclose(edited, edited[:1].repeat(3, 0), atol=1e-6)  # no image is left
    with pytest.raises(ValueError, match=r"has no layer 'fc'; it has stages\.0\.0, "):
        backbone.split("fc")


def test_a_head_that_averages_is_found(module):
    backbone = load_backbone(str(imported(module, "cnn")))
    _, features = forward(backbone, IMAGES)
    bias = made(module, "cnn").fc.bias.detach().numpy()
    logits = features[-1].mean((1, 2)) @ backbone.class_weights + bias
    np.testing.assert_allclose(logits, forward(backbone, IMAGES)[0], atol=1e-5)
    assert load_backbone(str(imported(module, "vit"))).class_weights is None


def test_it_exports_with_any_batch_size(module):
    backbone = load_backbone(str(imported(module, "vit")))
    (count,) = jax.export.symbolic_shape("n")
    images = jax.ShapeDtypeStruct((count, 32, 32, 3), jnp.float32)
    program = jax.export.export(jax.jit(lambda x: backbone(x)[0]))(images)
    np.testing.assert_allclose(program.call(IMAGES), forward(backbone, IMAGES)[0], atol=1e-5)


def test_features_can_be_chosen(module, tmp_path):
    words = [
        "import",
        f"{module}:cnn",
        "--image-size",
        "32",
        "--output",
        f"{tmp_path}/a.safetensors",
    ]
    main(["convert", *words, "--features", "stages.1", "stages.0.1"])
    backbone = load_backbone(f"{tmp_path}/a.safetensors")
    assert backbone.feature_layers == ("stages.0.1", "stages.1")  # in the order of the computation
    assert backbone.class_weights is None


@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("TwoBranches", ("branches.1.0", "branches.1.1", "branches.1.2")),
        ("LateClassToken", ("blocks.0", "blocks.1", "blocks.2")),  # of one number of tokens
    ],
)
def test_features_are_the_last_blocks(name, features, module):
    assert load_backbone(str(imported(module, name))).feature_layers == features


def test_differences_may_be_those_of_float32_itself(module, tmp_path, capsys):
    words = ["convert", "import", f"{module}:Rounding", "--image-size", "32"]
    main([*words, "--output", f"{tmp_path}/a.safetensors"])
    assert "float32 itself differs from float64 in PyTorch: logits by " in capsys.readouterr().out


def test_what_differs_from_pytorch_is_not_written(module, tmp_path, monkeypatch, refusal):
    monkeypatch.setitem(aten._POINTWISE, "relu.default", lambda x: 1.01 * jax.nn.relu(x))
    words = ["convert", "import", f"{module}:cnn", "--image-size", "32"]
    status, line = refusal([*words, "--output", tmp_path / "a.safetensors"])
    assert status == 1 and "in JAX differs from PyTorch: " in line
    assert not (tmp_path / "a.safetensors").exists()


def test_logits_of_zero_are_equal_to_themselves():
    """timm starts the heads of some models at zero."""
    zeros = np.zeros((1, 5))
    assert relative(zeros, zeros) == 0
    assert relative(zeros + 0.5, zeros) == 0.5


def test_class_names_become_part_of_the_file(module, tmp_path):
    names, path = tmp_path / "names.txt", tmp_path / "named.safetensors"
    names.write_text("ant\nbee\ncat\ndog\nelk\n")
    words = ["convert", "import", f"{module}:cnn", "--image-size", "32", "--output", str(path)]
    main([*words, "--class-names", str(names)])
    assert load_backbone(str(path)).class_names == ("ant", "bee", "cat", "dog", "elk")


def test_a_copy_is_the_same_and_another_graph_has_another_digest(module, tmp_path):
    backbone = load_backbone(str(imported(module, "cnn")))
    save_backbone(backbone, tmp_path / "copy.safetensors")
    copy = load_backbone(f"{tmp_path}/copy.safetensors")
    assert copy.description == backbone.description and digest(copy) == digest(backbone)
    tensors, metadata = read_safetensors(tmp_path / "copy.safetensors")
    metadata["graph"] = metadata["graph"].replace("relu.default", "tanh.default")
    write_safetensors(tmp_path / "other.safetensors", tensors, metadata)
    assert digest(load_backbone(f"{tmp_path}/other.safetensors")) != digest(backbone)
    abstract = abstract_backbone(f"{tmp_path}/copy.safetensors")
    assert abstract.feature_shapes() == backbone.feature_shapes()


WITHOUT_TORCH = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "torchvision", "timm"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from ttame_jax.backbones import aten
from ttame_jax.cli import main

pictures, picture = sys.argv[1:]
main(["explain", picture, "--backbone", "cnn.safetensors", "--output", "explained"])
words = ["--backbone", "cnn.safetensors", "--dataset", f"folder:{pictures}", "--epochs", "1"]
words += ["--batch-size", "32", "--workers", "0", "--validation-images", "0", "--start", "head"]
main(["train", *words, "--output", "runs/cnn"])
"""


def test_it_explains_and_trains_without_pytorch_and_its_run_can_move(
    module, pictures, tmp_path, monkeypatch
):
    before = tmp_path / "before"
    before.mkdir()
    (before / "cnn.safetensors").write_bytes(imported(module, "cnn").read_bytes())
    picture = str(next((pictures / "validation").iterdir()))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    words = [sys.executable, "-c", WITHOUT_TORCH, str(pictures), picture]
    subprocess.run(words, cwd=before, env=environment, check=True)
    assert (before / "explained").is_dir()
    config = json.loads((before / "runs/cnn/config.json").read_text())
    assert config["backbone"] == "../../cnn.safetensors" and config["weights"] is None
    before.rename(tmp_path / "after")
    monkeypatch.chdir(tmp_path)
    main(["explain", picture, "--run", "after/runs/cnn", "--output", "again"])
    assert (tmp_path / "again").is_dir()


REFUSED = {
    "Flat": "has no spatial features: no module on the way to its logits returns",
    "Fourier": "needs PyTorch's operator _fft_r2c.default, which is not supported here",
    "Branching": "PyTorch cannot export ",
    "features_only": "must return logits [B, num_classes], not [1, 16, 4, 4]",
    "wrong": "wrong must return an nn.Module, not a list",
    "failing": "AttributeError: 'CNN' object has no attribute 'no_such_layer'",
    "absent": "has no function 'absent'; it has",
}


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_what_cannot_be_imported_is_refused_in_one_line(name, reason, module, tmp_path, refusal):
    output = tmp_path / "refused.safetensors"
    words = ["convert", "import", f"{module}:{name}", "--image-size", "32", "--output", output]
    status, line = refusal(words)
    assert status == 2 and reason in line and not output.exists()


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        ("timm:no_such_model", [], "has no model 'no_such_model'"),
        ("resnet50", [], "'resnet50' is neither timm:MODEL nor FILE.py:FUNCTION"),
        ("absent.py:make", [], "no file absent.py"),
        ("{module}:vit", ["--image-size", "40"], "does not take images [1, 3, 40, 40]: Assert"),
        ("{module}:cnn", ["--image-size", "32", "--features", "fc"], "has no module 'fc' with"),
        ("{module}:cnn", ["--features", "fc", "fc"], "--features has a module twice"),
        ("{module}:vit", ["--image-size", "0"], "--image-size must be at least 1, not 0"),
        (
            "{module}:vit",
            ["--image-size", "32", "--prefix-tokens", "3"],
            "a square of tokens after 3",
        ),
        ("{module}:cnn", ["--weights", "random"], "--weights random is for timm:MODEL"),
        ("{module}:cnn", ["--weights", "{vit}"], "does not fit"),
        ("{broken}:cnn", [], "broken.py, line 2: SyntaxError"),
    ],
)
def test_wrong_arguments_are_refused(model, options, reason, module, tmp_path, refusal):
    (tmp_path / "broken.py").write_text("x = 1\ndef make(:\n")
    write_safetensors(tmp_path / "vit.safetensors", {"a": np.zeros(3, np.float32)}, {})
    names = {
        "module": module,
        "broken": tmp_path / "broken.py",
        "vit": tmp_path / "vit.safetensors",
    }
    words = [word.format(**names) for word in (model, *options)]
    _, line = refusal(["convert", "import", *words, "--output", tmp_path / "refused.safetensors"])
    assert reason in line and not (tmp_path / "refused.safetensors").exists()


def test_options_that_an_imported_classifier_lacks_are_refused(module, tmp_path):
    path = str(imported(module, "cnn"))
    for options, reason in [
        ({"dtype": "bfloat16"}, "computes in no other precision"),
        ({"num_classes": 3}, "takes no num_classes: import it anew"),
        ({"weights": "torchvision"}, "has its own weights: leave out torchvision"),
    ]:
        with pytest.raises(ValueError, match=reason):
            load_backbone(path, **options)
    with pytest.raises(FileNotFoundError, match="no imported classifier absent"):
        load_backbone("absent.safetensors")
    write_safetensors(tmp_path / "plain.safetensors", {"a": np.zeros(3, np.float32)}, {})
    with pytest.raises(ValueError, match="holds weights but no classifier"):
        load_backbone(f"{tmp_path}/plain.safetensors")
    tensors, metadata = read_safetensors(path)
    del tensors["fc.weight"]
    write_safetensors(tmp_path / "less.safetensors", tensors, metadata)
    with pytest.raises(ValueError, match=r"its graph reads fc\.weight, which does not exist"):
        load_backbone(f"{tmp_path}/less.safetensors")


LITE0 = """
from ttame_jax.convert.pytorch.timm import create
from ttame_jax.convert.pytorch.torch_import import import_torchvision


def lite0():
    return create("tf_efficientnet_lite0")


def squeezenet():
    return import_torchvision().models.squeezenet1_0()
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("name", "weights", "standard", "accuracy"),
    [
        ("lite0", "tf_efficientnet_lite0", ("0.5", "0.5"), 0.8),
        ("squeezenet", "squeezenet1_0", None, 0.6),
    ],
)
def test_real_classifiers_predict_what_they_predict_in_pytorch(
    name, weights, standard, accuracy, shared, tmp_path
):
    (tmp_path / "real.py").write_text(LITE0)
    output, model = tmp_path / "real.safetensors", f"{tmp_path}/real.py:{name}"
    options = ["--mean", *standard[:1] * 3, "--std", *standard[1:] * 3] if standard else []
    path = shared / "weights" / f"{weights}.safetensors"
    words = ["--weights", str(path), "--output", str(output), *options]
    main(["convert", "import", model, *words])
    backbone = load_backbone(str(output))
    reference, _ = load_module(model, str(path))
    labels = {}
    for part in ("choose", "report"):
        lines = (shared / "lists" / f"sample_{part}.txt").read_text().split("\n")
        labels |= dict(line.split() for line in lines if line)
    images = read_images(shared, backbone.preprocessing, 893)
    names = sorted(labels)  # as in the archive
    right = 0
    for start in range(0, 893, 47):  # 893 = 19 * 47
        batch = images[start : start + 47]
        ours = np.asarray(forward(backbone, batch)[0].argmax(-1))
        with torch.inference_mode():
            theirs = reference.eval()(torch.from_numpy(batch).permute(0, 3, 1, 2)).argmax(-1)
        np.testing.assert_array_equal(ours, theirs.numpy())
        right += sum(ours == [int(labels[name]) for name in names[start : start + 47]])
    assert right / 893 > accuracy
    print(f"{name}: {right} of 893")

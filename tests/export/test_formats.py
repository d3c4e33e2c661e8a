"""Exported files give the explainer's maps, and tell what their users need to know."""

import json
import re
import subprocess
import sys
import zipfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_weights import randomised
from tiny import TINY

from ttame_jax import TTAME, AttentionMechanism, Explainer, load_explainer, load_method
from ttame_jax.cli import main
from ttame_jax.errors import Failure
from ttame_jax.export import onnx_model, stablehlo

DOCS = Path(__file__).parents[2] / "docs" / "export.md"
BACKBONES = {
    "vit": TINY,
    "squeezenet1_1": {"image_size": 64, "num_classes": 5},
    "resnet18": {"image_size": 32, "num_classes": 5},
    "efficientnet_b0": {"image_size": 32, "num_classes": 5},
    "timm:convnextv2_atto": {"image_size": 32, "num_classes": 5},
    "swin_t": {"num_classes": 5},
    "densenet121": {"image_size": 32, "num_classes": 5},
}
SLOW = ("efficientnet_b0", "timm:convnextv2_atto", "swin_t", "densenet121")


@pytest.fixture(scope="module")
def make_explainer(random_backbone):
    def make(name, method="ttame", sigmoid_maps=False, **options):
        backbone = random_backbone(name, **BACKBONES[name], **options)
        channels = [shape[-1] for shape in backbone.feature_shapes()]
        abstract = nnx.eval_shape(
            lambda: AttentionMechanism(channels, 5, sigmoid_maps=sigmoid_maps, rngs=nnx.Rngs(0))
        )
        attention = randomised(abstract, seed=1)
        if method != "ttame":
            # XLA does not optimise in tests, so the default of 50 steps would take minutes.
            few = {"steps": 4} if method == "integrated_gradients" else {}
            return Explainer(load_method(method, backbone, **few))
        return Explainer(TTAME(backbone, attention), list("abcde"))

    return make


def run_stablehlo(path, images, classes):
    with zipfile.ZipFile(path) as file:
        program = jax.export.deserialize(bytearray(file.read("program.bin")))
    assert program.platforms == ("cpu", "cuda", "tpu")
    return program.call(images, classes)


def run_onnx(path, images, classes):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"images": images, "classes": classes})))


FORMATS = {"stablehlo": (stablehlo, run_stablehlo), "onnx": (onnx_model, run_onnx)}


def check(explainer, exporter, runner, folder):
    path = folder / "file"
    path.write_bytes(exporter(explainer, 2))
    size = explainer.backbone.preprocessing.image_size
    rng = np.random.default_rng(0)
    classify = nnx.jit(lambda model, images: model(model.preprocessing.standardise(images))[0])
    for batch, count in ((1, 3), (3, 1)):
        images = rng.random((batch, size, size, 3), np.float32)
        classes = rng.integers(0, 5, (batch, count)).astype(np.int32)
        found = runner(path, images, classes)
        logits = np.asarray(classify(explainer.backbone, images))
        best = np.argsort(-logits)[:, :2]
        ours = explainer(images, np.concatenate([best, classes], axis=1)).maps
        np.testing.assert_allclose(found["logits"], logits, atol=1e-5)
        np.testing.assert_array_equal(found["likeliest"], best)
        np.testing.assert_allclose(found["likeliest_maps"], ours[:, :2], atol=1e-5)
        np.testing.assert_allclose(found["maps"], ours[:, 2:], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "format"),
    # Each backbone has operations of its own.
    [(name, "onnx") for name in ("vit", "squeezenet1_1", "resnet18")]
    + [pytest.param(name, "onnx", marks=pytest.mark.slow) for name in SLOW]
    + [("vit", "stablehlo"), ("squeezenet1_1", "stablehlo")],
)
def test_an_exported_explainer_computes_the_same(name, format, make_explainer, tmp_path):
    if format == "onnx":
        pytest.importorskip("onnx")
    with jax.default_matmul_precision("highest"):
        check(make_explainer(name), *FORMATS[format], tmp_path)


@pytest.mark.parametrize("format", FORMATS)
def test_scaled_sigmoids_are_exported(format, make_explainer, tmp_path):
    if format == "onnx":
        pytest.importorskip("onnx")
    explainer = make_explainer("vit", sigmoid_maps=True)
    image = np.random.default_rng(0).random((1, 32, 32, 3), np.float32)
    assert not np.allclose(explainer(image).maps, make_explainer("vit")(image).maps, atol=0.01)
    with jax.default_matmul_precision("highest"):
        check(explainer, *FORMATS[format], tmp_path)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("vit", "gradcam"),
        ("vit", "attnlrp"),
        ("vit", "iia"),
        ("squeezenet1_1", "integrated_gradients"),
        pytest.param("resnet18", "integrated_gradients", marks=pytest.mark.slow),
    ],
)
def test_gradients_are_part_of_a_stablehlo_program(name, method, make_explainer, tmp_path):
    with jax.default_matmul_precision("highest"):
        check(make_explainer(name, method), *FORMATS["stablehlo"], tmp_path)


def test_methods_that_cannot_be_exported_are_refused(make_explainer):
    for name in ("rise", "scorecam", "ablationcam"):
        with pytest.raises(Failure, match=f"{name} cannot be exported: .* the number of images"):
            stablehlo(make_explainer("vit", name))
    with pytest.raises(Failure, match="gradcam cannot be exported to ONNX: ONNX has no operation"):
        onnx_model(make_explainer("vit", "gradcam"))
    with pytest.raises(Failure, match="needs a float32 backbone, not bfloat16"):
        onnx_model(make_explainer("vit", dtype=jnp.bfloat16))
    with pytest.raises(ValueError, match="likeliest must lie in 1 to 5"):
        stablehlo(make_explainer("vit"), 6)


def test_the_documented_snippet_needs_jax_alone(run, tmp_path, capsys):
    output = tmp_path / "vit_b16.zip"
    main(["export", str(run), "--format", "stablehlo", "--output", str(output)])
    assert "images [B, 32, 32, 3]" in capsys.readouterr().out
    snippet = re.findall(r"```python\n(import json.*?)```", DOCS.read_text(), re.DOTALL)[0]
    script = (
        "import sys\nfor name in ('ttame_jax', 'flax', 'onnx', 'torch'): sys.modules[name] = None\n"
        f"{snippet}\nnp.savez('found.npz', images=images, **outputs)\n"
        "open('metadata.json', 'w').write(json.dumps(metadata))"
    )
    subprocess.run([sys.executable, "-I", "-c", script], cwd=tmp_path, check=True)
    found = np.load(tmp_path / "found.npz")
    ours = load_explainer(run)(found["images"], np.array([[0, 1], [2, 3]]))
    np.testing.assert_allclose(found["maps"], ours.maps, atol=1e-5)
    metadata = json.loads((tmp_path / "metadata.json").read_text())
    assert metadata["ttame_jax"] == version("ttame-jax")
    assert metadata["preprocessing"]["interpolation"] == "bilinear"
    assert (metadata["backbone"], metadata["method"]) == ("vit", "ttame")
    assert (metadata["map_size"], metadata["num_classes"]) == ([4, 4], 5)


@pytest.fixture(scope="module")
def vit_in_onnx(make_explainer):
    onnx = pytest.importorskip("onnx")
    return onnx.load_from_string(onnx_model(make_explainer("vit")))


def test_the_functions_of_a_vit_are_single_nodes(vit_in_onnx):
    nodes = Counter(node.op_type for node in vit_in_onnx.graph.node)
    assert (nodes["LayerNormalization"], nodes["Gelu"], nodes["Softmax"]) == (7, 3, 3)
    assert not nodes.keys() & {"Erf", "Exp", "Sqrt"}


def test_an_onnx_model_carries_its_metadata(vit_in_onnx):
    metadata = {entry.key: json.loads(entry.value) for entry in vit_in_onnx.metadata_props}
    assert metadata["class_names"] == list("abcde") and metadata["map_size"] == [4, 4]
    assert metadata["preprocessing"]["std"] == [0.229, 0.224, 0.225]
    images, classes = vit_in_onnx.graph.input
    sizes = [
        [size.dim_param or size.dim_value for size in x.type.tensor_type.shape.dim]
        for x in (images, classes)
    ]
    assert sizes == [["b", 32, 32, 3], ["b", "k"]]


def test_bad_commands_are_refused_in_one_line(run, refusal, tmp_path, monkeypatch):
    words = ["export", run, "--output", tmp_path / "file", "--format"]
    monkeypatch.setitem(sys.modules, "onnx", None)
    status, line = refusal([*words, "onnx"])
    assert status == 1 and "pip install 'ttame-jax[onnx]'" in line
    status, line = refusal([*words, "stablehlo", "--method", "rise"])
    assert status == 1 and "rise cannot be exported" in line
    status, line = refusal([*words, "stablehlo", "--likeliest", "0"])
    assert status == 2 and "likeliest must lie in 1 to 5" in line
    status, line = refusal(["export", run, "--output", tmp_path, "--format", "stablehlo"])
    assert status == 1 and "is a folder: --output must be a file" in line
    assert not (tmp_path / "file").exists()

"""Classifiers of other JAX libraries, as in the examples of docs/models.md."""

import json
import os
import re
import shutil
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pages import DOCS, ROOT
from PIL import Image
from running import run as classify

import ttame_jax
from ttame_jax.cli import main
from ttame_jax.errors import Failure
from ttame_jax.methods import compute_maps
from ttame_jax.preprocessing import Preprocessing

SIZE = 32
SMALL = Preprocessing(image_size=SIZE, resize_size=SIZE)
IMAGES = jax.random.uniform(jax.random.key(1), (2, SIZE, SIZE, 3))
BLOCKS = (DOCS / "models.md").read_text().split("## Any JAX model")[1].split("\n## ")[0]


def example(library, names, tmp_path, monkeypatch, **changes):
    """Runs the example of a library; returns the names that it defines."""
    code = next(b for b in BLOCKS.split("```python\n") if f"from_{library}(" in b).split("```")[0]
    for words, others in changes.values():
        assert words in code
        code = code.replace(words, others)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.uint8(255 * IMAGES[0])).save("cat.jpg")
    exec(code, names)  # noqa: S102
    return names


def check(backbone, logits):
    """Compares logits with the library's own for `IMAGES`, and edits the target layer."""
    found, features = classify(backbone, IMAGES)
    np.testing.assert_allclose(found, logits, atol=1e-5)
    assert [x.shape[1:] for x in features] == list(backbone.feature_shapes())
    before, after = backbone.split()
    np.testing.assert_allclose(jax.jit(lambda x: after(before(x)))(IMAGES), logits, atol=1e-5)


class Block(nnx.Module):
    """Of a small convolutional network such as those of Flax's guides."""

    def __init__(self, width, channels, rngs):
        self.conv = nnx.Conv(width, channels, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(channels, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(nnx.relu(self.norm(self.conv(x))))


class Network(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([Block(3, 8, rngs), Block(8, 12, rngs), Block(12, 16, rngs)])
        self.head = nnx.Linear(16, 5, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


def test_nnx(tmp_path, monkeypatch):
    model = Network(nnx.Rngs(0))
    names = example("nnx", {"model": model, "preprocessing": SMALL}, tmp_path, monkeypatch)
    assert model.blocks[0].dropout.deterministic is False  # the model is not changed
    backbone = names["backbone"]
    assert names["explanation"].maps.shape == (1, 4, 4)
    assert (backbone.name, backbone.num_classes, backbone.any_size) == ("Network", 5, True)
    model.eval()
    check(backbone, model(IMAGES))
    maps = compute_maps(ttame_jax.load_method("ablationcam", backbone), IMAGES, [[0], [1]])
    assert maps.shape == (2, 1, 4, 4)


class LinenBlock(nn.Module):
    channels: int

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(self.channels, (3, 3), strides=2, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dropout(0.5, deterministic=not train)(x)


class LinenNetwork(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        for i, channels in enumerate((8, 12, 16)):
            block = nn.remat(LinenBlock, static_argnums=2)  # recomputed in training
            x = block(channels, name=f"block_{i}")(x, train)
        return nn.Dense(5)(x.mean((1, 2)))


@pytest.fixture(scope="module")
def linen():
    model = LinenNetwork()
    return model, jax.jit(lambda key: model.init(key, IMAGES, train=False))(jax.random.key(0))


def test_linen(linen, tmp_path, monkeypatch):
    model, variables = linen
    given = {"model": model, "variables": variables, "preprocessing": SMALL}
    names = example("linen", given, tmp_path, monkeypatch)
    check(names["backbone"], model.apply(variables, IMAGES, train=False))
    assert names["backbone"].feature_shapes() == ((8, 8, 12), (4, 4, 16))


def test_linen_resnet_of_another_project():
    jax_resnet = pytest.importorskip("jax_resnet")
    model = jax_resnet.ResNet18(n_classes=5)
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
    features = ["layers_3", "layers_5", "layers_7"]
    backbone = ttame_jax.from_linen(model, variables, features, preprocessing=SMALL)
    check(backbone, model.apply(variables, IMAGES, mutable=False))
    assert backbone.feature_shapes() == ((8, 8, 64), (4, 4, 128), (2, 2, 256))


def test_equinox(tmp_path, monkeypatch):
    pytest.importorskip("equimo")
    sizes = ("dim=192", "img_size=32, patch_size=8, num_classes=5, dim=32")
    heads = ("num_heads=[3], depths=[12]", "num_heads=[2], depths=[3]")
    blocks = (
        '"blocks.0.blocks.9", "blocks.0.blocks.10"',
        '"blocks.0.blocks.0", "blocks.0.blocks.1"',
    )
    names = {"preprocessing": SMALL}
    names = example("equinox", names, tmp_path, monkeypatch, a=sizes, b=heads, c=blocks)
    backbone, model, key = names["backbone"], names["model"], jax.random.key(0)
    assert backbone.prefix_tokens == 5 and backbone.masking == "standardised"
    logits = jax.jit(jax.vmap(lambda image: model(image, key=key, inference=True)))
    check(backbone, logits(jnp.moveaxis(IMAGES, -1, 1)))
    with pytest.raises(ValueError, match="transformer_lrp explains only"):
        ttame_jax.load_method("transformer_lrp", backbone)


def test_equinox_with_state():
    eqx = pytest.importorskip("equinox")

    class Model(eqx.Module):
        conv: eqx.nn.Conv2d
        norm: eqx.nn.BatchNorm
        head: eqx.nn.Linear

        def __call__(self, image, state):
            x, state = self.norm(self.conv(image), state)
            return self.head(x.mean((1, 2))), state

    first, second = jax.random.split(jax.random.key(0))
    norm = eqx.nn.BatchNorm(4, "batch", mode="batch")
    model = Model(eqx.nn.Conv2d(3, 4, 3, key=first), norm, eqx.nn.Linear(4, 5, key=second))
    state = eqx.nn.State(model)
    backbone = ttame_jax.from_equinox(model, ["conv"], state=state, preprocessing=SMALL)
    assert backbone.layout == "NCHW" and backbone.feature_shapes() == ((30, 30, 4),)
    evaluated = eqx.nn.inference_mode(model)
    check(backbone, jax.vmap(lambda x: evaluated(x, state)[0])(jnp.moveaxis(IMAGES, -1, 1)))
    with pytest.raises(ValueError, match="'norm' of Model returns a tuple, not an array"):
        ttame_jax.from_equinox(model, ["norm"], state=state, preprocessing=SMALL)


KERAS = """
import os, sys
import pytest
os.chdir(sys.argv[1])
import test_adapters
from ttame_jax import Preprocessing
names = {"preprocessing": Preprocessing(image_size=64, resize_size=64)}
test_adapters.IMAGES = test_adapters.IMAGES.repeat(2, 1).repeat(2, 2)
small = "input_shape=(64, 64, 3), alpha=0.35, weights=None, classes=5, classifier_activation=None"
with pytest.MonkeyPatch.context() as patch:
    change = ("classifier_activation=None", small)
    names = test_adapters.example("keras", names, sys.argv[1], patch, a=change)
model, backbone = names["model"], names["backbone"]
logits = test_adapters.jax.jit(lambda x: model(x, training=False))(test_adapters.IMAGES)
test_adapters.check(backbone, logits)
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(3) as threads:
    images = [test_adapters.IMAGES[:1].repeat(n, 0) for n in range(3, 9)]
    for one in threads.map(lambda x: test_adapters.jax.jit(backbone)(x)[0], images):
        test_adapters.np.testing.assert_allclose(one[:1], logits[:1], atol=1e-4)
assert backbone.num_classes == 5 and backbone.feature_shapes()[0] == (8, 8, 16)
keras = names["keras"]
model.layers[-1].activation = keras.activations.softmax
with pytest.raises(ValueError, match="ends with a softmax, in its layer .*: build it without"):
    names["ttame_jax"].from_keras(model, ["out_relu"])
wrapped = keras.Sequential([keras.Input((64, 64, 3)), keras.layers.Rescaling(1.0), model])
with pytest.raises(ValueError, match="ends with a softmax"):
    names["ttame_jax"].from_keras(wrapped, ["out_relu"])
with pytest.raises(ValueError, match="ends with a softmax, in its layer 'softmax"):
    softmax = keras.Sequential([keras.Input((4,)), keras.layers.Dense(5), keras.layers.Softmax()])
    names["ttame_jax"].from_keras(softmax, ["dense"])
with pytest.raises(ValueError, match="no submodule 'block_5_ad'; similar names are block_5_add"):
    model.layers[-1].activation = keras.activations.linear
    names["ttame_jax"].from_keras(model, ["block_5_ad"])
"""


@pytest.mark.slow
def test_keras(tmp_path):
    """In a process of its own, since Keras chooses its backend when it is imported."""
    pytest.importorskip("keras")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"KERAS_BACKEND": "jax", "PYTHONPATH": path}
    command = [sys.executable, "-c", KERAS, str(tmp_path)]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_wrong_names_are_refused_with_similar_ones(linen):
    model = Network(nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"no submodule 'block.2'; similar names are blocks\.2"):
        ttame_jax.from_nnx(model, ["block.2"], preprocessing=SMALL)
    with pytest.raises(ValueError, match="must be a list of names, not 'head'"):
        ttame_jax.from_nnx(model, "head", preprocessing=SMALL)
    kwargs = {"call_kwargs": {"train": False}, "preprocessing": SMALL}
    with pytest.raises(ValueError, match="no submodule 'block_3'; similar names are block_2"):
        ttame_jax.from_linen(*linen, ["block_3"], **kwargs)
    with pytest.raises(ValueError, match=r"'Dense_0' .* has the shape \[2, 5\]"):
        ttame_jax.from_linen(*linen, ["Dense_0"], **kwargs)


FILE = """
import jax
import jax.numpy as jnp
import ttame_jax

def classify(params, images):
    x = jax.lax.reduce_window(images, 0.0, jax.lax.add, (1, 4, 4, 1), (1, 4, 4, 1), "VALID")
    feature = jax.nn.relu(x @ params["kernel"])
    return feature.mean((1, 2)) @ params["head"], {"feature": feature}

def make(seed=0):
    keys = jax.random.split(jax.random.key(seed))
    params = {"kernel": jax.random.normal(keys[0], (3, 6)), "head": jax.random.normal(keys[1], (6, 5))}
    preprocessing = ttame_jax.Preprocessing(image_size=32, resize_size=32)
    return ttame_jax.FunctionBackbone(classify, params, preprocessing=preprocessing)

def wrong():
    return 1 / 0

def nothing():
    pass
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_model.py"
    path.write_text(FILE)
    return path


def test_a_run_trains_on_a_function_of_a_file(file, pictures, tmp_path, monkeypatch, refusal):
    monkeypatch.chdir(tmp_path)
    words = ["train", "--backbone", "my_model.py:make", "--dataset", f"folder:{pictures}"]
    words += ["--epochs", "1", "--batch-size", "32", "--workers", "0", "--validation-images", "4"]
    main([*words, "--output", "runs/mine"])
    config = json.loads((tmp_path / "runs/mine/config.json").read_text())
    assert config["backbone"] == "../../my_model.py:make" and config["weights"] is None
    with pytest.raises(
        Failure, match="is code, which runs only if you name it: --weights my_model"
    ):
        ttame_jax.load_explainer("runs/mine")
    first = ttame_jax.load_explainer("runs/mine", "my_model.py:make")(IMAGES, "all").maps
    assert first.shape == (2, 5, 8, 8)

    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.move(tmp_path / "runs", moved)
    shutil.move(file, moved)
    monkeypatch.chdir("/")
    code = f"{moved}/my_model.py:make"
    again = ttame_jax.load_explainer(moved / "runs/mine", code)(IMAGES, "all").maps
    np.testing.assert_array_equal(again, first)

    monkeypatch.chdir(moved)
    (moved / "my_model.py").write_text(FILE.replace("seed=0", "seed=1"))
    status, line = refusal([*words, "--output", "runs/mine"])
    assert status == 2 and "trained with other inputs (its weights were" in line


def test_options_are_arguments_of_the_function(file):
    backbone = ttame_jax.load_backbone(f"{file}:make", seed=3, dtype=None)
    assert backbone.name == "classify" and backbone.num_classes == 5
    with pytest.raises(
        ValueError, match=r"make\(seed=0\) cannot be called with width: .*unexpected"
    ):
        ttame_jax.load_backbone(f"{file}:make", width=3)
    with pytest.raises(ValueError, match="cannot be called with dtype"):
        ttame_jax.load_backbone(f"{file}:make", dtype="bfloat16")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_model.py:absent", "has no function 'absent'; it has classify, make, wrong, nothing"),
        ("my_model.py:wrong", "my_model.py, line 18: ZeroDivisionError: division by zero"),
        ("my_model.py:nothing", "nothing must return a Backbone .*, not a NoneType"),
        ("broken.py:make", "broken.py, line 2: SyntaxError: invalid syntax"),
        ("lacking.py:make", "lacking.py, line 1: ModuleNotFoundError: No module named 'absent'"),
        ("other.py:make", "no file other.py"),
        ("my_model.py:make --weights w.pth", "loads its own weights: give none, not w.pth"),
    ],
)
def test_errors_of_a_file_are_one_line(name, message, file, monkeypatch, refusal):
    monkeypatch.chdir(file.parent)
    (file.parent / "broken.py").write_text("x = 1\nx = = 2\n")
    (file.parent / "lacking.py").write_text("import absent\n")
    Image.new("RGB", (8, 8)).save("image.png")
    _, line = refusal(["explain", "image.png", "--output", "maps", "--backbone", *name.split()])
    assert re.search(message, line), line


def test_a_function_of_a_file_can_import_the_files_beside_it(file):
    (file.parent / "my_net.py").write_text("SEED = 0\n")
    code = "\ndef late():\n    from my_net import SEED\n    return make(SEED)\n"
    file.write_text(FILE + code)
    before = list(sys.path)
    late = ttame_jax.load_backbone(f"{file}:late")
    same = ttame_jax.load_backbone(f"{file}:make")
    np.testing.assert_array_equal(classify(late, IMAGES)[0], classify(same, IMAGES)[0])
    assert sys.path == before

"""Input that cannot be meant is refused in one line, and files stay as they are."""

import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny import TINY

from ttame_jax import Explainer, load_backbone, save_backbone
from ttame_jax.cli import main
from ttame_jax.config import TrainConfig
from ttame_jax.data import load_source, preprocess
from ttame_jax.methods import GradCAM, compute_maps
from ttame_jax.metrics import Evaluator
from ttame_jax.metrics.ad_ic import average_drop, increase_in_confidence
from ttame_jax.preprocessing import Preprocessing
from ttame_jax.runs import load_config
from ttame_jax.weights.transfer import fill, parameters, to_torch


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("vit", **TINY)


@pytest.fixture(scope="module")
def place(run, pictures, tmp_path_factory):
    """A folder with a run, an image, and files that are none."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(run, folder / "run")
    shutil.copy(next((pictures / "validation").iterdir()), folder / "image.png")
    (folder / "text.png").write_text("not an image")
    (folder / "cut.png").write_bytes((folder / "image.png").read_bytes()[:200])
    Image.fromarray(np.ones((40, 40), np.float32)).save(folder / "float.tif")
    for name, text in (
        ("cut", '{"backbone": "vit", '),
        ("list", "[]"),
        ("unknown", '{"backbone": "vit", "loss": {}, "colour": 3}'),
        ("lacking", '{"loss": {}}'),
        ("wrong", '{"backbone": "vit", "loss": {}, "epochs": "three"}'),
    ):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(text)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


EXPLAIN = "explain {}/image.png --run {}/run --output {}/out"
EVALUATE = "evaluate --run {}/run --output {}/out.json"
COMPARE = "compare --run {}/run --output {}/out"
TRAIN = "train --backbone vit --weights None --dataset folder:{} --output {}/new"
SIZES = " ".join(f"{name} {value}" for name, value in TINY.items())


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("explain --run {}/run --output {}/out", "no image given"),
        ("explain {}/none.png --run {}/run --output {}/out", "none.png"),
        ("explain {}/text.png --run {}/run --output {}/out", "cannot decode"),
        ("explain {}/cut.png --run {}/run --output {}/out", "cannot decode"),
        ("explain {}/float.tif --run {}/run --output {}/out", "convert it to 8 or 16 bits"),
        ("explain {}/image.png --run {} --output {}/out", "is not a run"),
        ("explain {}/image.png --run {}/cut --output {}/out", "cut/config.json is damaged"),
        ("explain {}/image.png --run {}/list --output {}/out", "list/config.json is damaged"),
        ("explain {}/image.png --run {}/unknown --output {}/out", "colour"),
        ("explain {}/image.png --run {}/lacking --output {}/out", "backbone"),
        ("explain {}/image.png --run {}/wrong --output {}/out", "wrong/config.json is damaged"),
        ("explain {}/image.png {}/text.png --run {}/run --output {}/out", "cannot decode"),
        ("explain {}/image.png --run {}/run --output {}/text.png", "text.png is a file"),
        ("explain {}/image.png --run {}/run --output {}/text.png/out", "text.png is a file"),
        ("evaluate --run {}/run --output {}/run", "run is a folder: --output must be a file"),
        ("evaluate --run {}/run --output {}/text.png/a.json", "text.png is a file"),
        ("compare --run {}/run --output {}/text.png", "text.png is a file"),
        ("train --backbone vit --dataset folder:{} --output {}/text.png", "text.png is a file"),
        ("demo --output {}/text.png", "text.png is a file"),
        ("curves --output {}/out", "no figures given"),
        ("curves {}/none.json --output {}/out", "none.json"),
        ("curves {}/text.png --output {}/out", "text.png is not a file of figures"),
        ("curves {}/cut/config.json --output {}/out", "config.json is not a file of figures"),
        ("curves {}/list/config.json --output {}/out", "config.json has no ROAD figures"),
        ("curves {}/unknown/config.json --output {}/out", "config.json has no ROAD figures"),
        (EXPLAIN + " --classes 5", "classes must lie in 0 to 4"),
        (EXPLAIN + " --classes 99999999999999999999", "there is no class 99999999999999999999"),
        (EXPLAIN + " --classes zebra", "classes 'zebra'"),
        (EXPLAIN + " --classes top0", "classes 'top0'"),
        (EXPLAIN + " --method lime", "unknown method 'lime'"),
        (EXPLAIN + " --weights {}/none.safetensors", "none.safetensors"),
        (EVALUATE + " --measures", "no metric given: --measures takes ad, ic"),
        (EVALUATE + " --measures ad,roc", "roc"),
        (EVALUATE + " --limit 0", "--limit must be at least 1, not 0"),
        (EVALUATE + " --batch-size 0", "--batch-size must be at least 1, not 0"),
        (EVALUATE + " --batch-size 9", "--batch-size 9 does not divide over 8 devices"),
        (EVALUATE + " --seed 1180591620717411303424", "--seed must be at least 0"),
        (EVALUATE + " --seed -1", "--seed must be at least 0"),
        (EVALUATE + " --dataset folder:{}/none", "no folder"),
        (EVALUATE + " --dataset digits --data-dir {}/none", "none of prepared data sets"),
        (EVALUATE + " --split nope", "nope"),
        (EVALUATE + " --method lime", "unknown method 'lime'"),
        (COMPARE + " --methods gradcam,lime", "unknown method lime"),
        (COMPARE + " --limits nope 3", "--limits has unknown method nope"),
        (COMPARE + " --method-config surprise.x 1", "--method-config has unknown method surprise"),
        (COMPARE + " --measures", "no metric given"),
        (TRAIN + " --epochs 0", "epochs must be at least 1"),
        (TRAIN + " --batch-size 12", "does not divide over 8 devices"),
        (TRAIN + " --learning-rate nan", "learning_rate must be positive, not nan"),
        (TRAIN + " --learning-rate -1", "learning_rate must be positive"),
        (TRAIN + " --seed 1180591620717411303424", "seed must be at least 0"),
        (TRAIN + " --data-dir {}/none", "none of prepared data sets"),
        (TRAIN + f" --backbone-config {SIZES} num_classes 0", "num_classes must be a positive"),
        (TRAIN + f" --backbone-config {SIZES} num_classes -3", "num_classes must be a positive"),
        (TRAIN + f" --backbone-config {SIZES} image_size 0", "image_size must be a positive"),
        (TRAIN + f" --backbone-config {SIZES} image_size -8", "image_size must be a positive"),
        (TRAIN + f" --backbone-config {SIZES} colour 3", "vit has no option colour"),
        ("train --backbone __init__ --output {}/new", "unknown backbone '__init__'"),
        ("train --backbone vgg99 --output {}/new", "unknown backbone 'vgg99'"),
    ],
)
def test_a_command_refuses_it(command, message, place):
    before = contents(place)
    with pytest.raises(SystemExit) as stop:
        main([word.format(place) for word in command.split()])
    text = str(stop.value.code)
    assert text.startswith("ttame: ") and message in text and "\n" not in text
    assert contents(place) == before


def test_an_empty_data_set_name_is_refused():
    with pytest.raises(SystemExit, match="--dataset is empty"):
        main(["evaluate", "--run", "r", "--output", "o", "--dataset", ""])
    with pytest.raises(SystemExit, match="dataset is empty"):
        main(["train", "--backbone", "vit", "--output", "o", "--dataset", ""])


IMAGES = np.full((2, 32, 32, 3), 0.5, np.float32)


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.1, 1.5, 255])
def test_images_outside_the_unit_interval_are_refused(value, backbone):
    images = IMAGES.copy()
    images[1, 2, 3, 0] = value
    for explain in (
        Explainer(GradCAM(backbone)),
        GradCAM(backbone).explain,
        lambda images: compute_maps(GradCAM(backbone), images, jnp.array([[0], [1]])),
    ):
        with pytest.raises(ValueError, match=r"images must lie in \[0, 1\]"):
            explain(images)


@pytest.mark.parametrize("images", [IMAGES[0], IMAGES[..., :2], (IMAGES * 255).astype(np.uint8)])
def test_images_of_another_kind_are_refused(images, backbone):
    for explain in (Explainer(GradCAM(backbone)), GradCAM(backbone).explain):
        with pytest.raises(ValueError, match=r"images must be floats \[B, H, W, 3\]"):
            explain(images)


@pytest.mark.parametrize("classes", [[[5], [0]], [[-1], [0]], [[0], [2**40]]])
def test_classes_that_do_not_exist_are_refused(classes, backbone):
    for explain in (
        Explainer(GradCAM(backbone)),
        GradCAM(backbone).explain,
        lambda *inputs: compute_maps(GradCAM(backbone), *inputs),
    ):
        with pytest.raises(ValueError, match="classes must lie in 0 to 4, the classes of vit"):
            explain(IMAGES, np.array(classes))
        with pytest.raises(ValueError, match="integers"):
            explain(IMAGES, np.array(classes, np.float32))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 0}, "image_size must be a positive integer, not 0"),
        ({"image_size": 2.5}, "image_size must be a positive integer, not 2.5"),
        ({"resize_size": "256"}, "resize_size must be a positive integer, not '256'"),
        ({"resize_size": 200}, "cannot crop 224 pixels from 200"),
        ({"interpolation": "area"}, "interpolation must be bilinear or bicubic, not 'area'"),
        ({"mean": (0.5,)}, "mean must be three finite numbers"),
        ({"mean": (0.5, 0.5, np.nan)}, "mean must be three finite numbers"),
        ({"std": (0.2, 0.2)}, "std must be three finite numbers"),
        ({"std": (0.2, 0.0, 0.2)}, "std must be positive"),
        ({"std": (0.2, -0.1, 0.2)}, "std must be positive"),
    ],
)
def test_impossible_preprocessing_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing(**fields)


@pytest.mark.parametrize(
    ("confidence", "masked", "message"),
    [
        (0.0, 0.5, "the drop of a confidence of 0 is undefined"),
        (np.nan, 0.5, r"confidences must lie in \[0, 1\], not nan"),
        (0.5, np.nan, r"masked confidences must lie in \[0, 1\], not nan"),
        (50.0, 0.5, r"confidences must lie in \[0, 1\]"),
        (0.5, -0.1, r"masked confidences must lie in \[0, 1\]"),
    ],
)
def test_impossible_confidences_are_refused(confidence, masked, message):
    for metric in (average_drop, increase_in_confidence):
        with pytest.raises(ValueError, match=message):
            metric(np.array([0.9, confidence]), np.array([[0.5], [masked]]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(value, tmp_path):
    backbone = load_backbone("vit", **TINY)
    tensors = {path: np.array(x) for path, x in parameters(backbone).items()}
    tensors["blocks.1.mlp.fc1.bias"][3] = value
    save_backbone(fill(backbone, tensors), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"blocks.1.mlp.fc1.bias has values that are not finite"):
        load_backbone("vit", tmp_path / "w.safetensors", **TINY)


@pytest.mark.parametrize("dtype", [np.int32, np.int8, np.bool_])
def test_weights_that_are_integers_are_refused(dtype, tmp_path):
    from safetensors.numpy import save_file

    tensors = {path: np.array(x) for path, x in parameters(load_backbone("vit", **TINY)).items()}
    tensors["head.kernel"] = tensors["head.kernel"].astype(dtype)
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="head.kernel must be floating-point numbers, not"):
        load_backbone("vit", tmp_path / "w.safetensors", **TINY)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_no_flipped_byte_of_a_weights_file_is_loaded(suffix, tmp_path, monkeypatch):
    monkeypatch.setenv("TTAME_CACHE", str(tmp_path / "cache"))
    backbone = load_backbone("vit", **TINY)
    path = tmp_path / f"w.{suffix}"
    if suffix == "pth":
        torch = pytest.importorskip("torch")
        state = to_torch(backbone, "timm")
        torch.save({key: torch.from_numpy(np.array(x)) for key, x in state.items()}, path)
    else:
        save_backbone(backbone, path)
    whole, intact = path.read_bytes(), parameters(load_backbone("vit", path, **TINY))
    refused = 0
    for place in np.linspace(0, len(whole) - 1, 40).astype(int):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        try:
            loaded = parameters(load_backbone("vit", path, **TINY))
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
        else:  # in a byte that no tensor is read from
            for name, value in intact.items():
                np.testing.assert_array_equal(loaded[name], value)
    assert refused > 20


def test_pictures_of_32_bits_a_pixel_are_refused(tmp_path):
    for dtype in (np.float32, np.int32):
        Image.fromarray(np.ones((40, 40), dtype)).save(tmp_path / "a.tif")
        with pytest.raises(OSError, match="a.tif: its pixels are 32-bit numbers"):
            preprocess(tmp_path / "a.tif", Preprocessing(32, 32))


def test_an_unknown_metric_is_refused(backbone, pictures):
    source = load_source(f"folder:{pictures}", "validation")
    with pytest.raises(ValueError, match="nope"):
        Evaluator(GradCAM(backbone), source, metrics=("nope",))


def test_a_damaged_configuration_is_named(tmp_path):
    TrainConfig(backbone="vit", output=tmp_path).save()
    text = (tmp_path / "config.json").read_text()
    for end in range(1, len(text) - 2, 37):
        (tmp_path / "config.json").write_text(text[:end])
        with pytest.raises(ValueError, match="config.json is damaged") as error:
            load_config(tmp_path)
        assert "\n" not in str(error.value)

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
    """A folder with a run, images, and files that are not what they seem."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(run, folder / "run")
    shutil.copytree(pictures, folder / "pictures")
    shutil.copy(next((pictures / "validation").iterdir()), folder / "image.png")
    for name in ("text.png", "text.safetensors", "text.pth", "text.ckpt", "text.json"):
        (folder / name).write_text("not what its name says")
    (folder / "binary.txt").write_bytes(bytes(range(256)))
    (folder / "list.txt").write_text("absent.png 0\n")
    (folder / "cut.png").write_bytes((folder / "image.png").read_bytes()[:200])
    Image.fromarray(np.ones((40, 40), np.float32)).save(folder / "float.tif")
    (folder / "empty").mkdir()
    for name, text in (
        ("cut", '{"backbone": "vit", '),
        ("array", "[]"),
        ("unknown", '{"backbone": "vit", "loss": {}, "colour": 3}'),
        ("lacking", '{"loss": {}}'),
        ("wrong", '{"backbone": "vit", "loss": {}, "epochs": "three"}'),
    ):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(text)
    config = (folder / "run" / "config.json").read_text()
    (folder / "bare").mkdir()
    (folder / "bare" / "config.json").write_text(config)
    for name, old, new in (
        ("edited", '"variant": "ttame"', '"variant": "no_skip"'),
        ("scaled", '"scale_features": false', '"scale_features": true'),
        ("recipe", '"recipe": "paper"', '"recipe": "scaled"'),
    ):
        shutil.copytree(run, folder / name)
        assert old in config
        (folder / name / "config.json").write_text(config.replace(old, new))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


EXPLAIN = "explain {}/image.png --run {}/run --output {}/out"
EVALUATE = "evaluate --run {}/run --output {}/out.json"
COMPARE = "compare --run {}/run --output {}/out"
TRAIN = "train --backbone vit --weights None --dataset folder:{}/pictures --output {}/new"
FIND = "lr-find --backbone vit --weights None --dataset folder:{}/pictures --output {}/new"
SIZES = " ".join(f"{name} {value}" for name, value in TINY.items())
SMALL = TRAIN + f" --backbone-config {SIZES}"
CONVERT = "convert backbone vit --weights {}/"


@pytest.mark.parametrize(
    ("command", "status", "message"),
    [
        # Images
        ("explain --run {}/run --output {}/out", 2, "no image given"),
        ("explain {}/none.png --run {}/run --output {}/out", 1, "none.png"),
        ("explain {}/run --run {}/run --output {}/out", 2, "no images in"),
        ("explain {}/empty --run {}/run --output {}/out", 2, "no images in"),
        ("explain {}/image.png --output {}/out", 2, "give a run, or a backbone"),
        (f"{EXPLAIN} --backbone vgg16", 2, "give either a run or a backbone"),
        (
            "explain {}/image.png --backbone digits_vit --output {}/out",
            2,
            "has no weights for digits_vit",
        ),
        (f"{EXPLAIN} --opacity 1.5", 2, "--opacity must lie in 0 to 1"),
        (f"{EXPLAIN} --opacity nan", 2, "--opacity must lie in 0 to 1"),
        (f"{EXPLAIN} --colour-map rainbows", 2, "no colour map 'rainbows'"),
        (f"{EXPLAIN} --class-names {{}}/list.txt", 2, "1 class names for 5 classes"),
        (f"{EXPLAIN} --class-names {{}}/binary.txt", 2, "one class name per line"),
        (f"{EXPLAIN} --class-names {{}}/none.txt", 1, "none.txt"),
        ("explain {}/text.png --run {}/run --output {}/out", 1, "text.png: cannot identify"),
        ("explain {}/cut.png --run {}/run --output {}/out", 1, "cannot decode"),
        ("explain {}/float.tif --run {}/run --output {}/out", 1, "convert it to 8 or 16 bits"),
        ("explain {}/image.png {}/text.png --run {}/run --output {}/out", 1, "cannot decode"),
        (EXPLAIN + " --max-pixels 100", 1, "36 x 40 pixels, more than 100: reduce it, or raise"),
        # Runs
        ("explain {}/image.png --run {} --output {}/out", 1, "is not a run"),
        ("explain {}/image.png --run {}/nowhere --output {}/out", 1, "nowhere is not a run"),
        ("explain {}/image.png --run {}/bare --output {}/out", 1, "bare has no checkpoint yet"),
        ("explain {}/image.png --run {}/cut --output {}/out", 1, "cut/config.json is damaged"),
        ("explain {}/image.png --run {}/array --output {}/out", 1, "array/config.json is damaged"),
        ("explain {}/image.png --run {}/unknown --output {}/out", 1, "colour"),
        ("explain {}/image.png --run {}/lacking --output {}/out", 1, "backbone"),
        ("explain {}/image.png --run {}/wrong --output {}/out", 1, "wrong/config.json is damaged"),
        ("explain {}/image.png --run {}/edited --output {}/out", 1, "has variant no_skip, but"),
        ("evaluate --run {}/scaled --output {}/out.json", 1, "has scale_features True, but"),
        ("evaluate --run {}/recipe --output {}/out.json", 1, "has loss.recipe scaled, but"),
        ("evaluate --run {}/edited --output {}/out.json", 1, "restore the file"),
        ("evaluate --run {}/bare --output {}/out.json", 1, "bare has no checkpoint yet"),
        ("evaluate --run {}/nowhere --output {}/out.json", 1, "nowhere is not a run"),
        ("report --run {}/nowhere --output {}/out.html", 1, "nowhere is not a run"),
        ("figures {}/image.png --run {}/nowhere --output {}/out", 1, "nowhere is not a run"),
        ("compare --run {}/nowhere --output {}/out", 1, "nowhere is not a run"),
        ("compare --run {}/run {}/cut --output {}/out", 1, "cut/config.json is damaged"),
        ("compare --output {}/out --run", 2, "no run given"),
        ("convert to-torch {}/nowhere --output {}/out", 1, "nowhere is not a run"),
        ("convert to-torch {}/bare --output {}/out", 1, "bare has no checkpoint yet"),
        ("convert to-torch {}/run --output {}/empty", 2, "empty exists already"),
        ("convert verify {}/nowhere", 1, "there is no run"),
        # Outputs
        ("explain {}/image.png --run {}/run --output {}/text.png", 1, "text.png is a file"),
        ("explain {}/image.png --run {}/run --output {}/text.png/out", 1, "text.png is a file"),
        ("evaluate --run {}/run --output {}/run", 1, "run is a folder: --output must be a file"),
        ("report --run {}/run --output {}/run", 1, "run is a folder: --output must be a file"),
        ("figures {}/image.png --run {}/run --output {}/text.png", 1, "text.png is a file"),
        ("evaluate --run {}/run --output {}/text.png/a.json", 1, "text.png is a file"),
        ("compare --run {}/run --output {}/text.png", 1, "text.png is a file"),
        ("train --backbone vit --dataset folder:{} --output {}/text.png", 1, "text.png is a file"),
        ("demo --output {}/text.png", 1, "text.png is a file"),
        ("curves {}/text.json --output {}/text.png", 1, "text.png is a file"),
        ("convert backbone vit --output {}/run", 1, "run is a folder"),
        # Figures
        ("curves --output {}/out", 2, "no figures given"),
        ("curves {}/none.json --output {}/out", 1, "none.json"),
        ("curves {}/text.json --output {}/out", 1, "text.json is not a file of figures"),
        ("curves {}/cut/config.json --output {}/out", 1, "config.json is not a file of figures"),
        ("curves {}/array/config.json --output {}/out", 1, "config.json is not a file of figures"),
        ("curves {}/unknown/config.json --output {}/out", 2, "config.json has no ROAD figures"),
        # Classes and methods
        (EXPLAIN + " --classes 5", 2, "no class 5: class ids are 0 to 4"),
        (EXPLAIN + " --classes 99999999999999999999", 2, "no class 99999999999999999999"),
        (EXPLAIN + " --classes zebra", 2, "no names, so 'zebra' is unknown"),
        (EXPLAIN + " --classes top0", 2, "classes 'top0'"),
        (EXPLAIN + " --classes top6", 2, "classes 'top6'"),
        (EXPLAIN + " --classes 1,,2", 2, "no names, so '' is unknown"),
        (EXPLAIN + " --classes -1", 2, "no names, so '-1' is unknown"),
        (EXPLAIN + " --method lime", 2, "unknown method 'lime'"),
        (EXPLAIN + " --method lcam", 2, "train one with --variant lcam"),
        (EVALUATE + " --method lime", 2, "unknown method 'lime'"),
        (EVALUATE + " --method rise --method-config masks many", 2, "masks of rise cannot be"),
        (EVALUATE + " --method rise --method-config masks 0", 2, "rise needs 1 mask or more"),
        (
            EVALUATE + " --method rise --method-config recipe own",
            2,
            "recipes of rise are",
        ),
        (EVALUATE + " --method gradcam --method-config layer 3", 2, "layer of gradcam cannot be 3"),
        (EVALUATE + " --method gradcam --method-config layer no", 2, "vit has no layer 'no'"),
        (EVALUATE + " --method iia --method-config steps 0", 2, "iia integrates over 1 step"),
        (EVALUATE + " --method iia --method-config steps 2.5", 2, "steps of iia cannot be"),
        (
            EVALUATE + " --method gradcam --method-config colour 3",
            2,
            "gradcam has no option colour",
        ),
        (EVALUATE + " --method-config colour 3", 2, "ttame has no options"),
        (COMPARE + " --methods gradcam,lime", 2, "unknown method lime"),
        (COMPARE + " --methods", 2, "no method given"),
        (COMPARE + " --limits nope 3", 2, "--limits has unknown method nope"),
        (COMPARE + " --limits rise 0", 2, "--limits must be at least 1, not 0"),
        (
            COMPARE + " --method-config surprise.x 1",
            2,
            "--method-config has unknown method surprise",
        ),
        (COMPARE + " --measures", 2, "no metric given"),
        (COMPARE + " --pictures -1", 2, "--pictures must be at least 0, not -1"),
        # Metrics and images of an evaluation
        (EVALUATE + " --measures", 2, "no metric given: --measures takes ad, ic"),
        (EVALUATE + " --measures ad,roc", 2, "unknown metric 'roc'"),
        (EVALUATE + " --measures pointing", 2, "or remove the metric 'pointing'"),
        (EVALUATE + " --limit 0", 2, "--limit must be at least 1, not 0"),
        (EVALUATE + " --limit -5", 2, "--limit must be at least 1, not -5"),
        (EVALUATE + " --batch-size 0", 2, "--batch-size must be at least 1, not 0"),
        (EVALUATE + " --batch-size 9", 2, "--batch-size 9 does not divide over 8 devices"),
        (EVALUATE + " --max-pixels 0", 2, "--max-pixels must be at least 1, not 0"),
        (
            EVALUATE + " --max-pixels 9",
            1,
            "20 of 20 images of",
        ),
        (EVALUATE + " --seed 1180591620717411303424", 2, "--seed must be at least 0"),
        (EVALUATE + " --seed -1", 2, "--seed must be at least 0"),
        (EVALUATE + " --dataset folder:{}/none", 1, "no folder"),
        (EVALUATE + " --dataset folder:{}/empty", 2, "no images in"),
        (EVALUATE + " --dataset nonsense", 2, "unknown data set"),
        (EVALUATE + " --dataset cifar10:9.9.9", 2, "unknown data set 'cifar10:9.9.9'"),
        (EVALUATE + " --dataset gs://bucket", 2, "unknown data set"),
        (EVALUATE + " --dataset cifar10 --data-dir {}/empty", 1, "run: ttame prepare cifar10"),
        (EVALUATE + " --dataset digits --data-dir {}/none", 1, "none of prepared data sets"),
        (EVALUATE + " --split nope", 2, "nope"),
        (EVALUATE + " --split validation[:0]", 2, "'validation[:0]' of folder:"),
        (EVALUATE + " --split validation[5", 2, "'validation[5' is not a split"),
        (EVALUATE + " --split validation[a:b]", 2, "is not a split: write train, train[:10%]"),
        (EVALUATE + " --list {}/none.txt", 1, "none.txt"),
        (EVALUATE + " --list {}/list.txt", 2, "no image of"),
        (EVALUATE + " --list {}/binary.txt", 2, "binary.txt is not a list of images"),
        # Weights
        (EXPLAIN + " --weights {}/none.safetensors", 1, "none.safetensors"),
        (EXPLAIN + " --weights {}/text.png", 2, "text.png is not a weights file"),
        (EXPLAIN + " --weights {}/text.safetensors", 1, "text.safetensors is not a safetensors"),
        (EXPLAIN + " --weights {}/text.pth", 1, "text.pth is not a plain checkpoint"),
        (CONVERT + "text.pth --output {}/w.safetensors", 1, "text.pth is not a plain checkpoint"),
        (CONVERT + "text.ckpt --output {}/w.safetensors", 1, "text.ckpt is not a plain checkpoint"),
        (CONVERT + "none.pth --output {}/w.safetensors", 1, "no weights file"),
        ("convert backbone vgg99 --output {}/w.safetensors", 2, "unknown backbone 'vgg99'"),
        (
            "convert backbone vit --weights timm --output {}/w.safetensors",
            2,
            "timm has no weights for vit",
        ),
        ("convert from-reference {}/text.ckpt --output {}/out", 1, "text.ckpt is not a plain"),
        ("convert from-reference {}/none.ckpt --output {}/out", 1, "no checkpoint"),
        ("convert from-reference {}/text.safetensors --output {}/out", 1, "not a safetensors file"),
        ("convert verify vgg99", 2, "unknown backbone 'vgg99'"),
        ("convert verify vit --images 0", 2, "--images must be at least 1, not 0"),
        ("convert verify vit --tolerance nan", 2, "--tolerance must be positive, not nan"),
        # Training
        (TRAIN + " --epochs 0", 2, "epochs must be at least 1"),
        (TRAIN + " --batch-size 12", 2, "does not divide over 8 devices"),
        (SMALL + " --batch-size 128", 2, "64 images, less than one batch"),
        (TRAIN + " --log-every 0", 2, "log_every must be at least 1"),
        (TRAIN + " --checkpoint-every 0", 2, "checkpoint_every must be at least 1"),
        (TRAIN + " --max-pixels 0", 2, "max_pixels must be at least 1"),
        (TRAIN + " --workers -1", 2, "workers must be at least 0, not -1"),
        (TRAIN + " --validation-images -1", 2, "validation_images must be at least 0, not -1"),
        (TRAIN + " --learning-rate nan", 2, "learning_rate must be positive, not nan"),
        (TRAIN + " --learning-rate inf", 2, "learning_rate must be positive, not inf"),
        (TRAIN + " --learning-rate -1", 2, "learning_rate must be positive"),
        (TRAIN + " --seed 1180591620717411303424", 2, "seed must be at least 0"),
        (TRAIN + " --data-dir {}/none", 1, "none of prepared data sets"),
        (TRAIN + " --start head", 2, "use --start random"),
        (TRAIN + f" --backbone-config {SIZES} num_classes 0", 2, "num_classes must be a positive"),
        (TRAIN + f" --backbone-config {SIZES} num_classes -3", 2, "num_classes must be a positive"),
        (TRAIN + f" --backbone-config {SIZES} num_classes x", 2, "num_classes must be a positive"),
        (TRAIN + f" --backbone-config {SIZES} image_size 0", 2, "image_size must be a positive"),
        (TRAIN + f" --backbone-config {SIZES} image_size -8", 2, "image_size must be a positive"),
        (TRAIN + f" --backbone-config {SIZES} image_size 30", 2, "that patch_size divides"),
        (TRAIN + f" --backbone-config {SIZES} num_heads 3", 2, "that num_heads divides"),
        (TRAIN + f" --backbone-config {SIZES} num_heads 0", 2, "num_heads"),
        (TRAIN + f" --backbone-config {SIZES} patch_size 0", 2, "patch_size"),
        (TRAIN + f" --backbone-config {SIZES} depth 0", 2, "depth"),
        (TRAIN + f" --backbone-config {SIZES} depth two", 2, "depth"),
        (TRAIN + f" --backbone-config {SIZES} features pool", 2, "features of vit are"),
        (TRAIN + f" --backbone-config {SIZES} colour 3", 2, "vit has no option colour"),
        (SMALL + " --train-split nope", 2, "has no split 'nope'"),
        (SMALL + " --validation-split nope", 2, "has no split 'nope'"),
        (SMALL + " --validation-list {}/none.txt", 1, "none.txt"),
        (SMALL + " --validation-list {}/list.txt", 2, "no image of"),
        (SMALL + " --coordinator-address nonsense", 2, "must be HOST:PORT, not 'nonsense'"),
        (SMALL + " --coordinator-address host:99999", 2, "must be HOST:PORT"),
        (SMALL + " --num-processes 2", 2, "several processes need --coordinator-address"),
        ("train --backbone vit --output {}/new", 2, "torchvision has no weights for vit"),
        ("train --backbone __init__ --output {}/new", 2, "unknown backbone '__init__'"),
        ("train --backbone ../vit --output {}/new", 2, "unknown backbone '../vit'"),
        ("train --backbone vgg99 --output {}/new", 2, "unknown backbone 'vgg99'"),
        (
            "train --backbone timm:nonsense --output {}/new",
            2,
            "timm has no pretrained model 'nonsense'",
        ),
        (FIND + " --rates", 2, "no rate given"),
        (FIND + " --rates 1e-3,0", 2, "learning_rate must be positive, not 0.0"),
        (FIND + " --epochs-grid 4 0", 2, "epochs must be at least 1, not 0"),
        (FIND + " --validation-images 0", 2, "--validation-images must be at least 1"),
        ("prepare nonsense --data-dir {}/data", 2, "unknown data set"),
    ],
)
def test_a_command_refuses_it(command, status, message, place, capsys):
    before = contents(place)
    with pytest.raises(SystemExit) as stop:
        main([word.replace("{}", str(place)) for word in command.split()])
    said = capsys.readouterr().err.splitlines()
    assert stop.value.code == status
    assert said[-1].startswith("ttame: ") and message.replace("{}", str(place)) in said[-1]
    assert [line for line in said if "Traceback" in line] == []
    assert contents(place) == before


@pytest.mark.parametrize(
    "command",
    [
        "nonsense",
        "explain",
        "explain a.png --run r --output o --colour red",
        "train --backbone vit --output o --epochs many",
        "train --backbone vit --output o --variant nonsense",
        "train --backbone vit --output o --loss.area-exponent nan",
        "train --backbone vit --output o --loss.cross-entropy-weight -1",
        "train --backbone vit --output o --precision float8",
        "train --backbone vit --output o --backbone-config num_classes",
        "evaluate --run r --output o --limit many",
        "evaluate --run r --output o --masking nonsense",
        "compare --run r --output o --limits rise",
        "lr-find --backbone vit --output o --rates 1e-3,fast",
        "convert verify vit --tolerance small",
    ],
)
def test_arguments_of_another_type_are_refused(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(command.split())
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["evaluate --run r", "train --backbone vit"])
def test_an_empty_data_set_name_is_refused(command, refusal):
    status, said = refusal([*command.split(), "--output", "o", "--dataset", ""])
    assert status == 2 and "dataset is empty" in said


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

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ttame_jax import save_backbone
from ttame_jax.cli import main
from ttame_jax.experiments.explain import _output_stems


@pytest.fixture(scope="module")
def command(random_backbone, tmp_path_factory):
    """`ttame explain` without a run, of a SqueezeNet in a file."""
    weights = tmp_path_factory.mktemp("weights") / "squeezenet.safetensors"
    save_backbone(random_backbone("squeezenet1_1", num_classes=6, image_size=64), weights)

    def explain(*words):
        base = ["explain", "--backbone", "squeezenet1_1", "--weights", str(weights)]
        main([*base, *map(str, words)])

    return explain


@pytest.fixture
def folder(pictures, tmp_path):
    """A folder with two pictures, one of them deeper, and a file that is none."""
    images = sorted((pictures / "validation").iterdir())[:2]
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    shutil.copy(images[0], tmp_path / "in" / "a.png")
    shutil.copy(images[1], tmp_path / "in" / "deeper" / "b.png")
    (tmp_path / "in" / "broken.jpg").write_text("not a picture")
    (tmp_path / "in" / "notes.txt").write_text("no picture, either")
    return tmp_path / "in"


def test_a_folder_is_explained_and_what_is_unreadable_is_listed_at_the_end(command, folder, capsys):
    command(folder, "--output", folder / "out")
    names = {path.name for path in (folder / "out").iterdir()}
    assert names == {"a.png", "a.npz", "b.png", "b.npz"}
    said = capsys.readouterr()
    assert said.err.rstrip().splitlines()[-1].startswith(f"skipped {folder / 'broken.jpg'}: cannot")
    assert f"{folder / 'out' / 'a.png'}: class " in said.out
    command(folder, "--output", folder / "out")  # its results are not explained in turn
    assert {path.name for path in (folder / "out").iterdir()} == names


def test_a_folder_without_a_readable_picture_is_an_error(command, folder, tmp_path, capsys):
    for path in (folder / "a.png", folder / "deeper" / "b.png"):
        path.unlink()
    with pytest.raises(SystemExit) as stop:
        command(folder, "--output", tmp_path / "out")
    assert stop.value.code == 1 and "none of the 1 images can be read" in capsys.readouterr().err


def test_an_unreadable_file_given_by_name_is_refused_before_any_work(command, folder, tmp_path):
    with pytest.raises(SystemExit):
        command(folder / "a.png", folder / "broken.jpg", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_elongated_picture_given_by_name_is_refused_before_any_work(
    folder, tmp_path, refusal, random_backbone
):
    Image.new("RGB", (90, 8)).save(tmp_path / "strip.png")
    words = [folder / "a.png", tmp_path / "strip.png", "--backbone", "squeezenet1_1"]
    save_backbone(random_backbone("squeezenet1_1"), tmp_path / "weights.safetensors")
    words += ["--weights", tmp_path / "weights.safetensors", "--output", tmp_path / "out"]
    _, line = refusal(["explain", *words])
    assert f"{tmp_path / 'strip.png'}: a picture of 90x8 pixels is too elongated" in line
    assert not (tmp_path / "out").exists()


def test_names_of_results_do_not_begin_with_a_dot(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    images = [Path("../one/a.png"), Path("../two/a.png")]
    assert [path.name for path in _output_stems(images, Path("out"))] == ["one_a.png", "two_a.png"]


@pytest.mark.parametrize(("style", "mode"), [("overlay", "RGB"), ("transparent", "RGBA")])
def test_pictures_are_drawn_in_the_given_style(command, folder, tmp_path, style, mode):
    words = ["--style", style, "--opacity", 0.3, "--colour-map", "jet", "--classes", "4"]
    command(folder / "a.png", "--output", tmp_path / "out", *words)
    with Image.open(tmp_path / "out" / "a.png") as drawn, Image.open(folder / "a.png") as image:
        assert drawn.mode == mode and drawn.size == image.size


def test_classes_are_named(command, folder, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\ncow\nhen\nsmall, grey dog\npig\n")
    output = tmp_path / "out"
    flags = ["--output", output, "--class-names", names]
    command(folder / "a.png", *flags, "--classes", "hen, 5,Dog")
    assert np.load(output / "a.npz")["labels"].tolist() == ["hen", "pig", "dog"]
    command(folder / "a.png", *flags, "--classes", "small, grey dog")
    assert np.load(output / "a.npz")["classes"].tolist() == [4]
    with pytest.raises(SystemExit):
        command(folder / "a.png", *flags, "--classes", "hens")
    assert "no class 'hens': did you mean hen" in capsys.readouterr().err


def test_hidden_parts_of_a_picture_are_not_hidden_in_silence(command, tmp_path, capsys):
    panorama = tmp_path / "panorama.png"
    Image.fromarray(np.zeros((60, 300, 3), np.uint8)).save(panorama)
    command(panorama, "--output", tmp_path / "out", "--view", "crop")
    assert "was shown" in capsys.readouterr().err
    assert np.load(tmp_path / "out" / "panorama.npz")["box"].tolist() != [0, 0, 300, 60]
    command(panorama, "--output", tmp_path / "out")
    assert "was shown" not in capsys.readouterr().err
    assert np.load(tmp_path / "out" / "panorama.npz")["box"].tolist() == [0, 0, 300, 60]


def test_slow_methods_say_what_they_cost_and_show_their_passes(command, folder, tmp_path, capsys):
    flags = ["--method", "rise", "--method-config", "masks", 160, "--output", tmp_path / "out"]
    command(folder / "a.png", *flags)
    said = capsys.readouterr().err
    assert "RISE: 160 forward passes for each image, about 00:" in said
    assert "/160 [" in said
    drawn = np.load(tmp_path / "out" / "a.npz")["maps"]
    command(folder / "a.png", *flags[:-1], tmp_path / "again")
    np.testing.assert_array_equal(np.load(tmp_path / "again" / "a.npz")["maps"], drawn)

import re
import shutil

import pytest
from PIL import Image
from tiny import TINY

from ttame_jax import Explainer, load_method
from ttame_jax.cli import main
from ttame_jax.experiments import figures
from ttame_jax.runs import load_explainer


@pytest.fixture
def image(pictures):
    return min((pictures / "validation").iterdir())


@pytest.fixture
def labelled(pictures, tmp_path):
    """A data set with a class of its own for each of five pictures."""
    for name, path in zip("abcde", sorted((pictures / "validation").iterdir())):
        (tmp_path / "labelled" / name).mkdir(parents=True)
        shutil.copy(path, tmp_path / "labelled" / name)
    return f"folder:{tmp_path / 'labelled'}"


def draw(output, *words) -> list[str]:
    """The names in the only figure of the output folder, in their order."""
    main(["figures", *map(str, words), "--output", str(output)])
    (path,) = output.glob("*.svg")
    return [
        text
        for text in re.findall("<!-- (.*?) -->", path.read_text())
        if text[-1].isalnum() and text[0].isalpha()
    ]


def test_a_figure_is_written_for_print_and_for_screens(run, image, tmp_path):
    draw(tmp_path, image, "--run", run)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"predicted.{kind}" for kind in ("svg", "pdf", "png")
    }
    assert (tmp_path / "predicted.pdf").read_bytes().startswith(b"%PDF")
    with Image.open(tmp_path / "predicted.png") as picture:
        assert picture.height > 2 * 1.6 * 300  # two rows of 1.6 inches at 300 dots per inch


def test_classifiers_are_in_rows_and_images_in_columns(run, pictures, labelled, tmp_path):
    again = shutil.copytree(run, tmp_path / "again")
    words = ["--run", run, again, "--dataset", labelled, "--limit", 2]
    said = draw(tmp_path / "out", *words)
    assert said[:2] == ["a", "e"]  # the true classes, above the images
    assert len([text for text in said if text.startswith("class ")]) == 2 * 2
    assert [text for text in said if text in ("run", "again")] == ["run", "again"]


def test_the_images_of_the_run_are_the_default(run, tmp_path):
    said = draw(tmp_path, "--run", run, "--limit", 2)
    assert len([text for text in said if text.startswith("class ")]) == 2


def test_several_classes_of_a_single_classifier_are_in_columns(run, image, tmp_path):
    (tmp_path / "top").mkdir()
    said = draw(tmp_path / "top", image, "--run", run, "--classes", "top2")
    assert len(said) == 2 and said[0] != said[1]
    said = draw(tmp_path / "ids", image, "--run", run, "--classes", "4,0,2")
    assert said == ["class 4", "class 0", "class 2"]
    assert (tmp_path / "ids" / "classes.svg").is_file()
    with Image.open(tmp_path / "ids" / "classes.png") as picture:
        assert picture.width > 3 * picture.height  # an image and three classes beside it


def test_mistakes_are_shown_with_their_true_class(run, labelled, tmp_path):
    words = ["--run", run, "--dataset", labelled, "--classes", "mistakes"]
    said = draw(tmp_path / "out", *words, "--limit", 2)
    assert len(said) == 2 * 3
    for true, one, other in zip(*[iter(said)] * 3):
        assert one == f"class {'abcde'.index(true)}" and other != one


def test_a_classifier_without_mistakes_is_said_to_have_none(run, image, tmp_path, refusal):
    right = int(load_explainer(run).explain_picture(image).classes[0])
    for i, name in enumerate("abcde"):
        (tmp_path / "data" / name).mkdir(parents=True)
        if i == right:
            shutil.copy(image, tmp_path / "data" / name)
        else:
            (tmp_path / "data" / name / "empty.png").touch()
    (tmp_path / "list").write_text(f"{'abcde'[right]}/{image.name} {right}")
    words = ["figures", "--run", run, "--dataset", f"folder:{tmp_path / 'data'}"]
    words += ["--list", tmp_path / "list", "--classes", "mistakes", "--output", tmp_path / "out"]
    status, said = refusal(words)
    assert status == 2 and "no image is misclassified, of 1 whose label" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("cat.jpg", "give one or more runs"),
        ("--backbone vgg16", "no image given"),
        ("cat.jpg --backbone vgg16 vgg19 --weights a.pth", "for each of 2 backbones, or for none"),
        ("cat.jpg --backbone vgg16 --dataset digits", "give either images or --dataset"),
        ("cat.jpg --backbone vgg16 --classes mistakes", "mistakes needs --dataset"),
        ("cat.jpg --backbone vgg16 --colour-map pink-elephants", "no colour map"),
        ("cat.jpg --backbone vgg16 --limit 0", "--limit must be at least 1"),
        ("cat.jpg --backbone vgg16 --max-pixels 0", "--max-pixels must be at least 1"),
    ],
)
def test_what_is_missing_is_named(words, message, refusal):
    status, said = refusal(["figures", *words.split()])
    assert status == 2 and message in said


@pytest.mark.parametrize(
    ("name", "names", "expected"),
    [
        ("2", ("1", "2", "3", "4", "5"), 1),
        ("2", ("a", "b", "c", "d", "e"), None),
        ("B", ("a", "b", "c", "d", "e"), 1),
        ("n01440764", ("a", "b", "tench", "d", "e"), 2),
        ("n01440764", ("a", "n01440764", "c", "d", "e"), 1),
        ("f", ("a", "b", "c", "d", "e"), None),
    ],
)
def test_the_true_class_is_found_by_its_name(name, names, expected, random_backbone):
    method = load_method("gradcam", random_backbone("vit", **TINY))
    assert figures._class_of(name, Explainer(method, names)) == expected


def test_unreadable_images_of_a_data_set_are_left_out(run, labelled, tmp_path):
    first = min((tmp_path / "labelled" / "a").iterdir())
    first.write_bytes(b"no image")
    with pytest.warns(UserWarning, match="skipping an unreadable image: a/"):
        said = draw(tmp_path / "out", "--run", run, run, "--dataset", labelled, "--limit", 2)
    assert "a" not in said and "e" in said


def test_a_data_set_without_a_readable_image_is_refused(run, labelled, tmp_path, refusal):
    for path in (tmp_path / "labelled").rglob("*.png"):
        path.write_bytes(b"no image")
    words = ["--run", run, "--dataset", labelled, "--limit", 1, "--output", tmp_path / "out"]
    with pytest.warns(UserWarning, match="skipping an unreadable image"):
        status, said = refusal(["figures", *words])
    assert status == 1 and "none of the images can be read" in said

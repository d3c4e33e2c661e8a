import numpy as np
import pytest
from PIL import Image

from ttame_jax.data import BoxedSource, load_source, read_boxes
from ttame_jax.errors import Damaged

pytestmark = pytest.mark.quick

HEAD = "file_name,xmin,ymin,xmax,ymax\n"


@pytest.fixture
def folder(tmp_path):
    for name in ("a/one.png", "b/two.png"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path


def boxes_of(folder, text):
    path = folder / "boxes.csv"
    path.write_text(text, encoding="utf-8")
    return read_boxes(path)


def test_images_have_their_boxes_by_file_name(folder):
    boxes = boxes_of(folder, HEAD + "two.png,0.1,0.2,0.3,0.4\ntwo.png,0,0,1,1\n")
    source = BoxedSource(load_source(f"folder:{folder}", "validation"), boxes)
    assert source.has_boxes and source.class_names == ["a", "b"]
    np.testing.assert_allclose(source[1]["boxes"], [[0.2, 0.1, 0.4, 0.3], [0, 0, 1, 1]])
    assert source[0]["boxes"].shape == (0, 4) and source[1]["label"] == 1
    assert source.count(np.arange(2)) == 1


def test_images_of_one_file_name_need_their_folders(folder):
    (folder / "a" / "one.png").rename(folder / "a" / "two.png")
    source, places = load_source(f"folder:{folder}", "validation"), np.arange(2)
    text = HEAD + "b/two.png,0,0,1,1\n"
    assert BoxedSource(source, boxes_of(folder, text)).count(places) == 1
    text += "two.png,0.1,0.2,0.3,0.4\n"
    boxed = BoxedSource(source, boxes_of(folder, text))
    assert boxed.count(places) == 2
    np.testing.assert_array_equal(boxed[1]["boxes"], [[0, 0, 1, 1]])
    boxed = BoxedSource(source, boxes_of(folder, HEAD + "two.png,0,0,1,1\n"))
    with pytest.raises(ValueError, match="could be those of a/two.png and of b/two.png"):
        boxed.count(places)


def test_a_byte_order_mark_is_no_part_of_the_columns(folder):
    assert boxes_of(folder, "\ufeff" + HEAD + "a.png,0,0,1,1\n").keys() == {"a.png"}


def test_other_boxes_are_other_inputs(folder):
    source = load_source(f"folder:{folder}", "validation")
    texts = [HEAD + "two.png,0.1,0.2,0.3,0.4\n", HEAD + "two.png,0.1,0.2,0.3,0.5\n"]
    first, second = (BoxedSource(source, boxes_of(folder, text)).fingerprint for text in texts)
    assert first != second and first.startswith(source.fingerprint)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + "a.png,0,0,200,100\n", "line 2: corners must be fractions"),
        (HEAD + "a.png,0,0,1,1\na.png,0.5,0,0.5,1\n", "line 3: corners must be"),
        (HEAD + "a.png,nan,0,1,1\n", "line 2: corners must be fractions"),
        (HEAD + "a.png,0,0\n", "not a CSV file with the columns"),
        (HEAD + "a.png,0,0,1,high\n", "not a CSV file with the columns"),
        ("a.png 3\nb.png 4\n", "not a CSV file with the columns"),
        (HEAD, "has no boxes"),
    ],
)
def test_a_file_of_something_else_is_refused(folder, text, message):
    with pytest.raises(Damaged, match=message) as error:
        boxes_of(folder, text)
    assert "\n" not in str(error.value)

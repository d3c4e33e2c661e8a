import pytest

from ttame_jax import labels

pytestmark = pytest.mark.quick

NAMES = labels.imagenet_names()


def test_imagenets_classes_have_names_and_wordnet_ids():
    assert len(set(NAMES)) == len(set(labels.imagenet_ids())) == 1000
    for class_id, name, wordnet in (
        (0, "tench", "n01440764"),
        (284, "Siamese cat", "n02123597"),
        (340, "zebra", "n02391049"),
        (999, "toilet tissue", "n15075141"),
    ):
        assert (NAMES[class_id], labels.imagenet_ids()[class_id]) == (name, wordnet)


def test_names_equal_torchvisions():
    torch_import = pytest.importorskip("ttame_jax.convert.pytorch.torch_import")
    torch_import.import_torchvision()
    from torchvision.models import SqueezeNet1_0_Weights

    assert list(NAMES) == SqueezeNet1_0_Weights.IMAGENET1K_V1.meta["categories"]


@pytest.mark.parametrize("text", ["zebra", "Zebra", " ZEBRA ", "340", "n02391049"])
def test_a_class_is_found_by_name_id_or_wordnet_id(text):
    assert labels.find_class(text, NAMES, 1000) == 340


@pytest.mark.parametrize(
    ("text", "names", "count", "message"),
    [
        ("siamese", NAMES, 1000, "no class 'siamese': did you mean Siamese cat"),
        ("zebbra", NAMES, 1000, "did you mean zebra"),
        ("xyzzyx", NAMES, 1000, "no class 'xyzzyx'; give a name or an id"),
        ("1000", NAMES, 1000, "no class 1000: class ids are 0 to 999"),
        ("-1", NAMES, 1000, "no class '-1'"),
        ("zebra", None, 5, "the classes have no names, so 'zebra' is unknown: give ids"),
        ("n02391049", ("cat", "dog"), 2, "no class 'n02391049'"),
        ("", NAMES, 1000, "no class ''"),
    ],
)
def test_unknown_classes_are_refused_with_similar_names(text, names, count, message):
    with pytest.raises(ValueError, match=message) as error:
        labels.find_class(text, names, count)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_a_number_that_is_a_name_is_not_an_id():
    names = tuple(sorted(map(str, range(12))))
    assert names[labels.find_class("2", names, 12)] == "2"
    assert labels.find_class("20", ("10", "20", "30"), 3) == 1
    assert labels.find_class("2", ("a", "b", "c"), 3) == 2


def test_names_are_read_line_by_line(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes("\ufeffcat\r\nbig\x0bdog\u2028s\n".encode())
    assert labels.read_names(path) == ("cat", "big\x0bdog\u2028s")


def test_of_equal_names_the_first_is_found():
    assert labels.find_class("cat", ("dog", "cat", "cat"), 3) == 1


def test_wordnet_ids_become_names():
    assert labels.readable(["n02391049", "own class"]) == ("zebra", "own class")


def test_files_of_names_are_read_and_checked(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("cat\n small dog \n")
    assert labels.read_names(path) == ("cat", "small dog")
    path.write_text("cat\n\ndog\n")
    with pytest.raises(ValueError, match="no class name in line 2"):
        labels.read_names(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a text file"):
        labels.read_names(path)

import io
import pickle
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from data_helpers import encode, noise
from running import HIDE_TENSORFLOW, run_python

from ttame_jax.data import evaluation_batches, load_source, select
from ttame_jax.data.tfds_source import prepare
from ttame_jax.errors import Damaged
from ttame_jax.preprocessing import Preprocessing


def make_folder(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(noise(9, 7)))


def names_of(source):
    return [source.name(index) for index in range(len(source))]


def test_a_flat_folder_is_read_in_the_order_of_names_and_has_no_labels(tmp_path):
    make_folder(tmp_path, "b.png", "a.JPG", "c.webp", ".hidden.png", "notes.txt")
    source = load_source(f"folder:{tmp_path}", "train")
    assert names_of(source) == ["a.JPG", "b.png", "c.webp"]
    assert source.class_names is None
    assert source[0] == {"image": (tmp_path / "a.JPG").read_bytes(), "label": -1}
    assert not source.has_boxes


def test_class_folders_give_labels(tmp_path):
    make_folder(tmp_path, "dog/1.png", "cat/2.png", "cat/deep/3.png", "4.png")
    source = load_source(f"folder:{tmp_path}", "train")
    assert names_of(source) == ["4.png", "cat/2.png", "cat/deep/3.png", "dog/1.png"]
    assert [source[index]["label"] for index in range(4)] == [-1, 0, 0, 1]
    assert [source.label_name(label) for label in (-1, 0, 1)] == ["", "cat", "dog"]
    assert source.class_names == ["cat", "dog"]


def test_labels_that_are_wordnet_ids_have_the_names_of_imagenet(tmp_path):
    make_folder(tmp_path, "n01440764/1.png", "n02102040/2.png")
    source = load_source(f"folder:{tmp_path}", "train")
    assert source.label_name(1) == "English springer"


@pytest.mark.parametrize("validation", ["validation", "val", "test"])
def test_split_folders(tmp_path, validation):
    make_folder(tmp_path, "train/cat/1.png", "train/dog/2.png", f"{validation}/cat/3.png")
    assert names_of(load_source(f"folder:{tmp_path}", "train")) == ["cat/1.png", "dog/2.png"]
    assert names_of(load_source(f"folder:{tmp_path}", "validation")) == ["cat/3.png"]


def test_a_missing_split_folder_is_an_error_that_names_those_there(tmp_path):
    make_folder(tmp_path, "train/1.png")
    with pytest.raises(ValueError, match="no split 'validation'; it has: train"):
        load_source(f"folder:{tmp_path}", "validation")


def test_a_folder_without_splits_is_every_split(tmp_path):
    make_folder(tmp_path, "1.png")
    assert names_of(load_source(f"folder:{tmp_path}", "validation")) == ["1.png"]


@pytest.mark.parametrize(
    "split, expected", [("train[:3]", "012"), ("train[-20%:]", "89"), ("train[4:6]", "45")]
)
def test_folders_take_slices_of_splits(tmp_path, split, expected):
    make_folder(tmp_path, *(f"train/{i}.png" for i in range(10)))
    source = load_source(f"folder:{tmp_path}", split)
    assert names_of(source) == [f"{i}.png" for i in expected]


def test_missing_and_empty_folders_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        load_source(f"folder:{tmp_path}/nowhere", "train")
    with pytest.raises(ValueError, match="no images in"):
        load_source(f"folder:{tmp_path}", "train")


def test_images_are_found_by_name_in_the_order_asked(tmp_path):
    make_folder(tmp_path, "a.png", "b.png", "c.png")
    source = load_source(f"folder:{tmp_path}", "train")
    assert source.indices_of(["c.png", "a.png", "d.png", "c.png"]).tolist() == [2, 0]
    assert source.indices_of(["d.png"]).tolist() == []


def test_a_data_set_that_is_not_prepared_names_the_command(tmp_path):
    command = f"ttame prepare imagenet2012 --manual-dir DIR --data-dir {tmp_path}"
    with pytest.raises(FileNotFoundError, match=f"not prepared .* run: {command}$"):
        load_source("imagenet2012", "train", tmp_path)


def test_an_unknown_data_set_is_an_error_of_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"^unknown data set 'nonsense'.*'digits'$"):
        load_source("nonsense", "train", tmp_path)


def test_preparing_without_the_archives_names_them(tmp_path):
    expected = "imagenet2012 needs archives in .*manual: .*ILSVRC2012_img_train.tar"
    with pytest.raises(FileNotFoundError, match=expected):
        prepare("imagenet2012", tmp_path / "data", tmp_path / "manual")


def test_a_damaged_archive_is_named(tmp_path):
    pytest.importorskip("tensorflow")
    manual = tmp_path / "manual"
    manual.mkdir()
    for name in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"):
        (manual / name).write_text("no archive")
    with pytest.raises(Damaged, match=f"an archive of imagenet2012 in {manual} is damaged: "):
        prepare("imagenet2012", tmp_path / "data", manual)


def test_preparing_without_tensorflow_names_the_extra(tmp_path):
    script = "import sys; from ttame_jax.data.tfds_source import prepare; prepare('imagenet2012', sys.argv[1])"
    run = run_python(HIDE_TENSORFLOW + script, tmp_path, check=False)
    assert run.returncode != 0
    assert run.stderr.splitlines()[-1].endswith("run: pip install 'ttame-jax[prepare]'")


@pytest.fixture(scope="module")
def imagenet(shared, tmp_path_factory):
    """The ImageNet sample as TFDS's own builder prepares it."""
    data_dir = tmp_path_factory.mktemp("tfds")
    prepare("imagenet2012", data_dir, shared / "imagenet_sample" / "manual")
    yield data_dir
    shutil.rmtree(data_dir)


def test_imagenet_by_file_name(imagenet):
    source = load_source("imagenet2012", "validation", imagenet)
    assert len(source) == 893
    assert len(source.class_names) == 1000
    names = names_of(source)
    assert all(name.startswith("ILSVRC2012_val_") for name in names)
    assert source.indices_of([names[70], names[3]]).tolist() == [70, 3]
    assert 0 <= source[3]["label"] < 1000
    copy = pickle.loads(pickle.dumps(source))
    assert copy.name(3) == names[3] and copy[3] == source[3]


def test_imagenet_splits_in_the_syntax_of_tfds(imagenet):
    whole = load_source("imagenet2012", "train", imagenet)
    part = load_source("imagenet2012", "train[10:30]+validation[:5]", imagenet)
    assert len(part) == 25
    assert names_of(part)[:20] == [whole.name(index) for index in range(10, 30)]
    with pytest.raises(ValueError, match="no split 'test'; it has: train, validation"):
        load_source("imagenet2012", "test", imagenet)


def test_every_image_of_imagenet_decodes(imagenet):
    source = load_source("imagenet2012", "validation[:200]", imagenet)
    for batch in evaluation_batches(source, Preprocessing(), 50):
        assert batch["valid"].all()
        assert batch["image"].std((1, 2, 3)).min() > 1


def test_preparing_again_changes_nothing_and_says_so(imagenet, capsys):
    prepare("imagenet2012", imagenet)
    assert "was already prepared" in capsys.readouterr().out


def test_reading_prepared_data_does_not_import_tensorflow(imagenet):
    script = (
        "import sys; from ttame_jax.data import load_source; "
        "load_source('imagenet2012', 'validation[:20]', sys.argv[1])[3]; "
        "print('tensorflow' in sys.modules)"
    )
    assert run_python(script, imagenet).stdout.strip() == "False"


def test_records_in_a_format_without_random_access_are_an_error(tmp_path, digits_dir):
    shutil.copytree(digits_dir, tmp_path, dirs_exist_ok=True)
    (info,) = tmp_path.rglob("dataset_info.json")
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(FileNotFoundError, match="cannot be read by index .tfrecord.; prepare it"):
        load_source("digits", "train", tmp_path)


def test_labels_and_names_survive_in_batches(digits_dir):
    source = load_source("digits", "validation[:10]", digits_dir)
    (batch,) = evaluation_batches(source, Preprocessing(64, 64), 10)
    assert batch["label"].tolist() == [source[index]["label"] for index in range(10)]
    assert len(np.unique(names_of(source))) == 10


BOXES = [[(0.25, 0.0, 0.5, 1.0), (0.0, 0.5, 1.0, 0.75)], [], [(0.0, 0.0, 1.0, 1.0)]]


class SequenceOfBoxes(tfds.core.GeneratorBasedBuilder):
    """Three images with two boxes, none and one."""

    VERSION = tfds.core.Version("1.0.0")
    boxes = tfds.features.Sequence(tfds.features.BBoxFeature())

    def _info(self):
        image = tfds.features.Image(shape=(7, 9, 3), encoding_format="png")
        features = tfds.features.FeaturesDict({"image": image, "boxes": self.boxes})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, boxes in enumerate(BOXES):
            image = io.BytesIO(encode(noise(9, 7)))
            boxes = [self.one(tfds.features.BBox(*box)) for box in boxes]
            yield i, {"image": image, "boxes": boxes}

    def one(self, box):
        return box


class SequenceOfObjects(SequenceOfBoxes):
    boxes = tfds.features.Sequence({"crowd": np.bool_, "bbox": tfds.features.BBoxFeature()})

    def one(self, box):
        return {"crowd": False, "bbox": box}


@pytest.mark.parametrize("builder", ["sequence_of_boxes", "sequence_of_objects"])
def test_images_have_any_number_of_boxes(builder, tmp_path):
    tfds.builder(builder, data_dir=tmp_path, file_format="array_record").download_and_prepare()
    source = load_source(builder, "train", tmp_path)
    assert source.has_boxes
    found = sorted((source[i]["boxes"] for i in range(3)), key=len)
    for boxes, expected in zip(found, sorted(BOXES, key=len), strict=True):
        assert boxes.dtype == np.float32 and boxes.shape == (len(expected), 4)
        np.testing.assert_array_equal(boxes, np.reshape(expected, (-1, 4)))


class AbsoluteBoxes(SequenceOfBoxes):
    boxes = tfds.features.Sequence(tfds.features.BBoxFeature(bbox_format="XYXY"))


def test_boxes_in_another_format_are_not_read(tmp_path):
    builder = tfds.builder("absolute_boxes", data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    source = load_source("absolute_boxes", "train", tmp_path)
    assert not source.has_boxes and source[0].keys() == {"image", "label"}


@pytest.mark.parametrize(
    "split", ["test[:0]", "test[10:5]", "test[2000:]", "test[50%:50%]", "test[5:5]+validation[:0]"]
)
def test_splits_without_images_are_refused(split, digits_dir):
    with pytest.raises(ValueError, match=r"the split '.*' of digits has no images"):
        load_source("digits", split, digits_dir)


def test_class_folders_may_be_links_and_hidden_ones_are_left_out(tmp_path):
    make_folder(tmp_path, "elsewhere/1.png", "train/b/2.png", "train/.thumbnails/3.png")
    (tmp_path / "train" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train" / "c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train" / "b" / "up").symlink_to(tmp_path / "train")
    source = load_source(f"folder:{tmp_path}", "train")
    assert names_of(source) == ["a/1.png", "b/2.png", "c/1.png"]
    assert source.class_names == ["a", "b", "c"]


def test_splits_of_a_folder_cannot_be_added(tmp_path):
    make_folder(tmp_path, "train/1.png", "val/2.png")
    with pytest.raises(ValueError, match="the splits of a folder cannot be added"):
        load_source(f"folder:{tmp_path}", "train+val")


@pytest.mark.parametrize(
    "text",
    ["a b.png 0\nc.JPG 1\n", "\ufeffa b.png\nc.JPG\n", "a b.png n01 5\nc.JPG\tn02\n"],
)
def test_names_in_a_list_may_have_spaces(text, tmp_path):
    make_folder(tmp_path, "train/a b.png", "train/c.JPG", "train/d.png")
    (tmp_path / "list.txt").write_text(text, encoding="utf-8")
    source = load_source(f"folder:{tmp_path}", "train")
    assert select(source, tmp_path / "list.txt").tolist() == [0, 1]

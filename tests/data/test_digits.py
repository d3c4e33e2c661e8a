import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from ttame_jax.data import digits, load_source

SPLITS = {"train": 6000, "validation": 500, "test": 1000}


@pytest.fixture(scope="module")
def records(digits_dir) -> dict[str, list[dict]]:
    """Every record of every split as TFDS reads it, images still encoded."""
    builder = tfds.builder("digits", data_dir=digits_dir)
    decoders = {"image": tfds.decode.SkipDecoding()}
    return {split: list(builder.as_data_source(split, decoders=decoders)) for split in SPLITS}


def test_splits_have_their_sizes_and_every_class(records):
    assert {split: len(each) for split, each in records.items()} == SPLITS
    for each in records.values():
        counts = np.bincount([record["label"] for record in each], minlength=10)
        assert counts.min() > 0.06 * len(each)


def test_splits_share_no_handwritten_digit(records):
    originals = [{record["original"] for record in each} for each in records.values()]
    assert [len(each) for each in originals] == [1200, 200, 397]
    assert len(set.union(*originals)) == 1797


def test_no_two_pictures_are_alike(records):
    pictures = [record["image"] for each in records.values() for record in each]
    assert len(set(pictures)) == len(pictures)


def test_the_source_gives_pictures_with_boxes(digits_dir, records):
    source = load_source("digits", "test", digits_dir)
    assert source.class_names == list("0123456789")
    record = source[7]
    assert Image.open(io.BytesIO(record["image"])).size == (64, 64)
    assert record["label"] == records["test"][7]["label"]
    assert source.has_boxes and record["boxes"].dtype == np.float32
    np.testing.assert_array_equal(record["boxes"], [records["test"][7]["box"]])
    assert source.name(7) == records["test"][7]["id"].decode()


@pytest.mark.parametrize("seed", range(30))
def test_the_box_is_that_of_the_ink(seed):
    """A digit that is all ink, so that it shows as an evenly coloured rectangle."""
    picture, box = digits.draw(np.ones((8, 8)), np.random.default_rng(seed))
    pixels = np.asarray(picture)
    top, left, bottom, right = np.array(box) * 64
    assert top == int(top) >= 0 and left == int(left) >= 0 and bottom <= 64 and right <= 64
    top, left, bottom, right = map(int, (top, left, bottom, right))
    assert bottom - top == right - left and 36 <= bottom - top <= 48
    ink = (pixels == pixels[top, left]).all(-1)
    assert ink[top:bottom, left:right].all()
    around = np.zeros_like(ink)
    around[max(top - 1, 0) : bottom + 1, max(left - 1, 0) : right + 1] = True
    around[top:bottom, left:right] = False
    assert ink[around].mean() < 0.05


def test_the_ink_of_real_digits_lies_in_the_box_and_stands_out(records):
    for record in records["validation"][:100]:
        pixels = np.asarray(Image.open(io.BytesIO(record["image"])), float)
        top, left, bottom, right = np.int64(record["box"] * 64)
        inside = np.zeros((64, 64), bool)
        inside[top:bottom, left:right] = True
        values, counts = np.unique(pixels[inside], axis=0, return_counts=True)
        ink = (pixels == values[counts.argmax()]).all(-1)  # where the digit's colour is full
        assert ink[inside].mean() > 0.1
        assert not ink[~inside].any()
        assert abs(pixels[ink].mean() - pixels[~inside].mean()) > 50


def test_drawing_follows_from_the_generator():
    original = np.random.default_rng(0).random((8, 8))
    pictures = [digits.draw(original, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert pictures[0] == pictures[1] != pictures[2]

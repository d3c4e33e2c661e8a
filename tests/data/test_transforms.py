import dataclasses
import json
import struct

import numpy as np
import pytest
from data_helpers import encode, noise
from PIL import Image

from ttame_jax.convert.pytorch.torch_import import import_torchvision
from ttame_jax.data import transforms as own_transforms
from ttame_jax.data.transforms import (
    UnreadableImage,
    centre_crop,
    crop_boxes,
    decode,
    evaluation_image,
    open_picture,
    preprocess,
    training_image,
)
from ttame_jax.metrics.base import pixels_inside
from ttame_jax.preprocessing import Preprocessing

pytestmark = pytest.mark.quick

SMALL = Preprocessing(image_size=6, resize_size=8)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    "size", [(300, 451), (451, 300), (256, 256), (256, 391), (37, 90), (1001, 257)]
)
def test_evaluation_equals_torchvision_bit_for_bit(size, interpolation):
    transforms = import_torchvision().transforms
    mode = transforms.InterpolationMode(interpolation)
    reference = transforms.Compose(
        [transforms.Resize(256, mode, antialias=True), transforms.CenterCrop(224)]
    )
    image = noise(*size)
    result = evaluation_image(encode(image), Preprocessing(interpolation=interpolation))
    np.testing.assert_array_equal(result, np.asarray(reference(image)))


def test_training_draws_every_crop_and_mirror_image_and_nothing_else():
    image = noise(10, 8)
    pixels = np.asarray(image)
    crops = {}
    for top in range(3):
        for left in range(5):
            crop = pixels[top : top + 6, left : left + 6]
            crops[crop.tobytes()] = (top, left, False)
            crops[crop[:, ::-1].tobytes()] = (top, left, True)
    rng = np.random.default_rng(0)
    encoded = encode(image)
    drawn = {crops[training_image(encoded, SMALL, rng).tobytes()] for _ in range(500)}
    assert drawn == set(crops.values())
    unflipped = {
        crops[training_image(encoded, SMALL, rng, flip=False).tobytes()] for _ in range(300)
    }
    assert unflipped == {draw for draw in crops.values() if not draw[2]}


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(40, 80), (80, 40), (37, 53), (7, 5)])
def test_training_crops_as_if_all_were_resized_first(size, interpolation):
    preprocessing = Preprocessing(image_size=6, resize_size=8, interpolation=interpolation)
    image, short = noise(*size), min(size)
    filtering = Image.Resampling[interpolation.upper()]
    resized = np.asarray(image.resize([8 * side // short for side in size], filtering), int)
    crop = training_image(encode(image), preprocessing, np.random.default_rng(0), flip=False)
    windows = np.lib.stride_tricks.sliding_window_view(resized, (6, 6, 3)).reshape(-1, 6, 6, 3)
    # Pillow may resize rows before columns or after, each rounded to a level.
    assert np.abs(windows - crop).max(axis=(1, 2, 3)).min() <= 1


def test_large_jpegs_are_decoded_smaller_to_train_and_whole_to_evaluate():
    photograph = noise(10, 8).resize((100, 80), Image.Resampling.BICUBIC)
    encoded = encode(photograph, "JPEG", quality=95)
    assert decode(encoded).size == (100, 80)
    assert decode(encoded, shortest=16).size == (25, 20)
    assert decode(encoded, shortest=21).size == (50, 40)
    assert decode(encode(photograph), shortest=16).size == (100, 80)

    whole = encode(decode(encoded))
    np.testing.assert_array_equal(evaluation_image(encoded, SMALL), evaluation_image(whole, SMALL))
    drawn, expected = (
        training_image(data, SMALL, np.random.default_rng(0)).astype(int)
        for data in (encoded, whole)
    )
    assert 0 < np.abs(drawn - expected).max() <= 4


@pytest.mark.parametrize(
    "mode, colour, file_format",
    [
        ("L", 200, "PNG"),
        ("1", 1, "PNG"),
        ("LA", (200, 90), "PNG"),
        ("RGBA", (10, 200, 30, 90), "PNG"),
        ("CMYK", (245, 55, 225, 0), "TIFF"),
        ("I;16", 51400, "PNG"),
    ],
)
def test_every_colour_mode_becomes_rgb(mode, colour, file_format):
    image = Image.new(mode, (9, 9), colour)
    expected = {"1": (255,) * 3, "RGBA": (10, 200, 30), "CMYK": (10, 200, 30)}.get(mode, (200,) * 3)
    decoded = decode(encode(image, file_format))
    assert decoded.mode == "RGB"
    assert decoded.getpixel((4, 4)) == expected


def test_grey_images_of_12_and_16_bits_keep_their_range(tmp_path):
    wide = np.full((9, 9), 200 << 8, ">u2")
    assert decode(b"P5 9 9 65535\n" + wide.tobytes()).getpixel((4, 4)) == (200, 200, 200)
    path = tmp_path / "grey.tif"
    path.write_bytes(
        grey_tiff(bytes([0xC8, 0x0C, 0x80]) * 32, side=8, bits=12)
    )  # pixels of 200 << 4
    for picture in (decode(path.read_bytes()), open_picture(path)):
        assert picture.getpixel((4, 4)) == (200, 200, 200)


def grey_tiff(pixels: bytes, side: int, bits: int) -> bytes:
    """A TIFF of packed pixels, which Pillow reads and does not write."""
    size, white, offset = len(pixels), 1, 8 + 2 + 9 * 12 + 4
    tags = {256: side, 257: side, 258: bits, 259: 1, 262: white, 273: offset, 277: 1, 278: side}
    entries = [
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in (tags | {279: size}).items()
    ]
    return struct.pack("<2sHIH", b"II", 42, 8, 9) + b"".join(entries) + bytes(4) + pixels


@pytest.mark.filterwarnings("error")
def test_palettes_with_transparency_become_rgb():
    image = Image.new("P", (9, 9), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    encoded = encode(image, transparency=bytes([255, 128]))
    assert decode(encoded).getpixel((4, 4)) == (10, 200, 30)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_truncated_and_foreign_files_are_unreadable(tmp_path, file_format):
    whole = encode(noise(60, 60), file_format)
    for data in (whole[: len(whole) // 2], b"no image", b""):
        with pytest.raises(UnreadableImage):
            decode(data)
        path = tmp_path / "image"
        path.write_bytes(data)
        with pytest.raises(UnreadableImage, match=str(path)):
            preprocess(path, SMALL)


def test_single_pictures_are_turned_upright_and_data_sets_are_not(tmp_path):
    upright = noise(8, 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    path = tmp_path / "turned.png"
    path.write_bytes(encode(stored, exif=exif))
    expected = evaluation_image(encode(upright), SMALL)
    np.testing.assert_array_equal(preprocess(path, SMALL), expected)
    with Image.open(path) as opened:
        np.testing.assert_array_equal(preprocess(opened, SMALL), expected)
    assert (evaluation_image(path.read_bytes(), SMALL) != expected).any()


def test_pictures_with_too_many_pixels_are_not_decoded(tmp_path):
    path = tmp_path / "large.png"
    path.write_bytes(encode(Image.new("RGB", (400, 300))))
    with pytest.raises(UnreadableImage, match="400 x 300 pixels, more than 100,000"):
        preprocess(path, SMALL, max_pixels=100_000)
    with pytest.raises(UnreadableImage, match="raise --max-pixels"):
        decode(path.read_bytes(), shortest=8, max_pixels=100_000)
    assert preprocess(path, SMALL, max_pixels=120_000).shape == (6, 6, 3)


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (3, 40_000)])
def test_of_a_very_long_picture_only_the_crop_is_resized(size, monkeypatch):
    resize, sizes = Image.Image.resize, []

    def noted(image, size, *options):
        sizes.append(size)
        return resize(image, size, *options)

    monkeypatch.setattr(Image.Image, "resize", noted)
    crop = centre_crop(Image.new("RGB", size, (10, 20, 30)), Preprocessing(224, 256))
    assert sizes == [(224, 224)] and (crop == (10, 20, 30)).all()


@pytest.mark.parametrize("size", [(97, 33), (33, 97), (40, 40)])
def test_resizing_only_the_crop_gives_the_same_picture(size, monkeypatch):
    image = noise(*size)
    whole = centre_crop(image, SMALL)
    monkeypatch.setattr(own_transforms, "_LARGEST_RESIZED", 0)
    assert np.abs(centre_crop(image, SMALL).astype(int) - whole).max() <= 1


def test_a_missing_picture_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.jpg"):
        preprocess(tmp_path / "nothing.jpg", SMALL)


@pytest.mark.parametrize("size", [(96, 32), (32, 96), (36, 32), (24, 39), (8, 8)])
def test_boxes_are_cropped_like_the_image(size):
    """A white rectangle on black: the crop shows where its box lies."""
    across, down = (8 * side // min(size) for side in size)
    scale = min(size) // 8  # the rectangle's edges lie between pixels of the resized image
    top, left, bottom, right = scale * np.array([down // 2 - 2, across // 2, down - 3, across - 2])
    pixels = np.zeros((*size[::-1], 3), np.uint8)
    pixels[top:bottom, left:right] = 255
    crop = evaluation_image(encode(Image.fromarray(pixels)), SMALL)[..., 0]
    box = np.array([top, left, bottom, right]) / np.tile(size[::-1], 2)
    inside = pixels_inside(crop_boxes(box[None], size, SMALL)[None], crop.shape)[0]
    assert inside.any() and not inside.all()
    np.testing.assert_array_equal(inside, crop > 128)


def test_boxes_outside_the_crop_stay_outside():
    left = np.array([[0, 0, 1, 0.3]], np.float32)  # of an image three times as wide as high
    _, start, _, end = crop_boxes(left, (96, 32), SMALL)[0]
    assert start < end < 0
    _, start, _, end = crop_boxes(left, (32, 96), SMALL)[0]
    assert start < 0.1 < end
    assert crop_boxes(np.zeros((0, 4), np.float32), (9, 9), SMALL).shape == (0, 4)


def test_preprocessing_of_lists_and_of_numpys_numbers_is_hashable_and_writable():
    given = Preprocessing(np.int64(6), np.int64(8), mean=[0.5] * 3, std=np.full(3, 0.25))
    plain = Preprocessing(6, 8, mean=(0.5,) * 3, std=(0.25,) * 3)
    assert given == plain and hash(given) == hash(plain)
    assert json.loads(json.dumps(dataclasses.asdict(given)))["image_size"] == 6

"""Damaged and random input: the only exceptions are the documented ones, and no result is wrong.

`HYPOTHESIS_PROFILE=nightly` tries 10,000 examples of each, instead of 200.
"""

import dataclasses
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ttame_jax.config import TrainConfig
from ttame_jax.convert.authors import Checkpoint, run_config
from ttame_jax.convert.pytorch.checkpoints import checked_state, read_torch
from ttame_jax.data import UnreadableImage, load_source, select
from ttame_jax.data.transforms import decode, preprocess
from ttame_jax.errors import Damaged, Failure
from ttame_jax.experiments.evaluate import read_figures
from ttame_jax.experiments.resumable import ResumableRows
from ttame_jax.files import read_safetensors, seal, to_json, write_safetensors
from ttame_jax.preprocessing import Preprocessing
from ttame_jax.runs import load_config, load_run

PIXELS = Image.fromarray(np.random.default_rng(0).integers(256, size=(20, 24, 3), dtype=np.uint8))


def encoded(file_format: str) -> bytes:
    file = io.BytesIO()
    PIXELS.save(file, file_format)
    return file.getvalue()


IMAGES = [encoded(name) for name in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")]


SLOW = settings(max_examples=settings().max_examples // 5)
"""For what takes a tenth of a second and more."""


@st.composite
def damages(draw):
    """Functions that damage bytes: cut, flip, insert, or replace a part of them."""
    place, length = draw(st.floats(0, 1)), draw(st.integers(0, 40))
    new = draw(st.binary(max_size=40))
    kind = draw(st.sampled_from(["cut", "flip", "insert", "replace"]))

    def damage(data: bytes) -> bytes:
        start = int(place * len(data))
        if kind == "cut":
            return data[:start]
        if kind == "flip":
            flipped = bytearray(data)
            flipped[min(start, len(data) - 1)] ^= 1 + length
            return bytes(flipped)
        return data[:start] + new + data[start + (length if kind == "replace" else 0) :]

    return damage


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@given(st.sampled_from(IMAGES), damages())
def test_damaged_images_are_unreadable_or_images(image, damage):
    try:
        image = decode(damage(image), max_pixels=10**6)
    except UnreadableImage as error:
        assert "\n" not in str(error)
    else:
        assert image.mode == "RGB"


@given(st.binary(max_size=200))
def test_random_bytes_are_no_image(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "random.png"
    path.write_bytes(data)
    with pytest.raises(UnreadableImage):
        preprocess(path, Preprocessing(8, 8))


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_random_lists_choose_no_image(tmp_path_factory, pictures, data):
    path = tmp_path_factory.getbasetemp() / "random.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="random.txt"):
        select(load_source(f"folder:{pictures}", "validation"), path)


@given(damages())
def test_damaged_safetensors_are_refused_or_whole(tmp_path_factory, damage):
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    tensors = {"a.b": np.arange(12.0).reshape(3, 4), "c": np.ones(5, np.float32)}
    write_safetensors(path, tensors, {"name": "vit", "format": "ttame_jax"})
    path.write_bytes(damage(path.read_bytes()))
    try:
        found, _ = read_safetensors(path)
    except Damaged as error:
        assert "\n" not in str(error)
    else:
        assert found.keys() == tensors.keys()
        for name, value in tensors.items():
            np.testing.assert_array_equal(found[name], value)


@given(damages())
def test_damaged_configurations_are_refused_or_configurations(tmp_path_factory, damage):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    TrainConfig(backbone="vit", output=folder).save(inputs={"images": "64 images"})
    path = folder / "config.json"
    path.write_bytes(damage(path.read_bytes()))
    read_config(folder)


@given(st.sampled_from([f.name for f in dataclasses.fields(TrainConfig)]), json_values)
def test_configurations_of_random_values_are_refused_or_meant(tmp_path_factory, name, value):
    folder = tmp_path_factory.getbasetemp() / "random"
    TrainConfig(backbone="vit", output=folder).save()
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    config = read_config(folder)
    if config is not None and name not in ("output", "validation_list", "loss"):
        assert getattr(config, name) == value


def read_config(folder):
    try:
        return load_config(folder)
    except Damaged as error:
        assert "config.json is damaged" in str(error) and "\n" not in str(error)


FIGURES = {"AD": {"15": 24.5}, "ROAD": {"MoRF": {"mean": 5.25}}, "settings": {"limit": None}}


@given(damages())
def test_damaged_figures_are_refused_or_whole(tmp_path_factory, damage):
    path = tmp_path_factory.getbasetemp() / "figures.json"
    path.write_bytes(damage(to_json(seal(FIGURES), indent=2).encode()))
    try:
        found = read_figures(path)
    except Damaged as error:
        assert "figures.json is not a file of figures" in str(error)
    else:
        assert {key: found[key] for key in FIGURES if key in found} == FIGURES


@given(damages())
def test_damaged_rows_are_left_out(tmp_path_factory, damage):
    output = tmp_path_factory.getbasetemp() / "rows.json"
    resumable = ResumableRows(output, {"seed": 0})
    rows = [{"index": i, "confidence": i / 7, "masked": [0.5, None]} for i in range(4)]
    resumable._file(rows).flush()
    resumable.path.write_bytes(damage(resumable.path.read_bytes()))
    found = resumable._read()
    assert all(row in rows for row in found)
    assert resumable._read() == found


@pytest.fixture(scope="module")
def intact(run):
    return [np.asarray(x) for x in leaves(run)]


def leaves(folder):
    import jax
    from flax import nnx

    return jax.tree.leaves(nnx.state(load_run(folder).attention))


@SLOW
@given(st.integers(min_value=0), damages())
@pytest.mark.slow
def test_damaged_checkpoints_are_refused_or_whole(tmp_path_factory, run, intact, number, damage):
    folder = tmp_path_factory.getbasetemp() / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run, folder)
    attention = ("attention", "digests", "_CHECKPOINT_METADATA")
    paths = sorted(
        path
        for path in (folder / "checkpoints").rglob("*")
        if path.is_file() and set(attention) & {*path.parts}
    )
    path = paths[number % len(paths)]
    path.write_bytes(damage(path.read_bytes()))
    try:
        found = leaves(folder)
    except (Failure, FileNotFoundError) as error:
        assert "\n" not in str(error)
    else:
        for value, expected in zip(found, intact, strict=True):
            np.testing.assert_array_equal(value, expected)


@given(st.booleans(), damages())
def test_damaged_checkpoints_of_pytorch_are_refused_or_read(tmp_path_factory, legacy, damage):
    torch = pytest.importorskip("torch")
    content = {"state_dict": {"a.weight": torch.ones(3, 2)}, "hyper_parameters": {"lr": 0.1}}
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    path = tmp_path_factory.getbasetemp() / "damaged.ckpt"
    path.write_bytes(damage(file.getvalue()))
    try:
        state = checked_state(read_torch(path).get("state_dict"), path)
    except (Damaged, AttributeError) as error:  # the latter for what is no dict
        assert "\n" not in str(error) and "weights_only" not in str(error)
    else:
        # PyTorch's older format has no checksums, as the documentation says.
        assert legacy or torch.equal(state["a.weight"], torch.ones(3, 2))


LAYERS = ["features.6", "features.11", "features.12"]


@settings(max_examples=settings().max_examples // 20)  # each builds backbones
@given(
    st.fixed_dictionaries(
        {"model_name": json_values | st.just("squeezenet1_0")},
        optional={
            "layers": json_values | st.just(LAYERS),
            "train_method": json_values,
            "attention_version": json_values,
            "epochs": json_values,
            "lr": json_values,
        },
    )
)
def test_random_hyper_parameters_are_refused(given):
    checkpoint = Checkpoint(Path("a.ckpt"), {"fuser.bias": np.zeros(1000)}, {}, given, step=1)
    with pytest.raises(ValueError, match="a.ckpt") as error:
        run_config(checkpoint, Path("out"), "torchvision")
    assert "\n" not in str(error.value)


@settings(max_examples=settings().max_examples // 20)
@given(json_values, json_values)
def test_random_numbers_of_a_checkpoint_are_refused_or_meant(epochs, rate):
    known = {"model_name": "squeezenet1_0", "layers": LAYERS, "epochs": epochs, "lr": rate}
    checkpoint = Checkpoint(Path("a.ckpt"), {"fuser.bias": np.zeros(1000)}, {}, known, step=1)
    try:
        config = run_config(checkpoint, Path("out"), "torchvision")
    except ValueError as error:
        assert str(error).startswith("a.ckpt has ") and "\n" not in str(error)
    else:
        assert (config.epochs, config.learning_rate) == (epochs, rate)

import dataclasses
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny import TINY

from ttame_jax import Explainer, load_backbone, load_method, save_backbone
from ttame_jax.cli import main
from ttame_jax.config import TrainConfig
from ttame_jax.data import evaluation_batches, load_source
from ttame_jax.data.evaluation import EvaluationBatches
from ttame_jax.data.sources import FolderSource
from ttame_jax.data.transforms import MAX_PIXELS
from ttame_jax.experiments.evaluate import Selection
from ttame_jax.files import locked
from ttame_jax.preprocessing import to_float
from ttame_jax.runs import load_config

COUNT = 19


@pytest.fixture(scope="module")
def weights(random_backbone, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_backbone(random_backbone("vit", **TINY), path)
    return path


@pytest.fixture
def command(weights, pictures, tmp_path):
    def explain(*words):
        base = ["explain", "--dataset", f"folder:{pictures}", "--backbone", "vit", "--weights"]
        config = ["--backbone-config", *(str(word) for item in TINY.items() for word in item)]
        limits = ["--limit", COUNT, "--shard-size", 9, "--batch-size", 8]
        words = [*base, weights, *config, *limits, "--output", tmp_path / "maps", *words]
        main([str(word) for word in words])
        return tmp_path / "maps"

    return explain


def tensor(table, name):
    return table[name].combine_chunks().to_numpy_ndarray()


def test_every_image_has_its_maps_names_and_probabilities(command, weights, pictures):
    folder = command("--classes", "top2")
    files = sorted(path.name for path in folder.glob("*.parquet"))
    assert files == [f"maps-{i:05d}-of-00003.parquet" for i in range(3)]
    table = pq.read_table(folder)

    source = load_source(f"folder:{pictures}", "validation")
    backbone = load_backbone("vit", weights, **TINY)
    indices = table["index"].to_numpy()
    assert len(indices) == COUNT and (np.diff(indices) > 0).all()
    (batch,) = evaluation_batches(source, backbone.preprocessing, COUNT, indices=indices)
    expected = Explainer(load_method("gradcam", backbone))(to_float(batch["image"]), "top2")
    assert table["name"].to_pylist() == [source.name(i) for i in indices.tolist()]
    np.testing.assert_array_equal(table["label"], batch["label"])
    np.testing.assert_array_equal(tensor(table, "classes"), expected.classes)
    np.testing.assert_allclose(
        tensor(table, "probabilities"), expected.probabilities, rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(tensor(table, "maps"), expected.maps, atol=1e-4)
    info = json.loads((folder / "_explanations.json").read_text())
    assert info["settings"]["method"] == "gradcam" and info["image_size"] == TINY["image_size"]
    assert info["settings"]["preprocessing"]["image_size"] == TINY["image_size"]


def test_classes_are_compared_by_their_ids(command, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("a\nb\nc\nd\ne\n")
    command("--class-names", names, "--classes", "a,b")
    command("--classes", "0,1")
    names.write_text("b\na\nc\nd\ne\n")
    with pytest.raises(SystemExit):
        command("--class-names", names, "--classes", "a,b")
    assert "has maps of another setting (classes)" in capsys.readouterr().err


def test_slow_methods_have_batches_of_one_image_per_device(command, tmp_path, monkeypatch):
    from ttame_jax.experiments import explain_dataset

    sizes = []

    def batches(source, preprocessing, indices, **options):
        sizes.append(indices.shape[1])
        return EvaluationBatches(source, preprocessing, indices, **options)

    monkeypatch.setattr(explain_dataset, "EvaluationBatches", batches)
    options = ["--limit", 8, "--shard-size", 8, "--batch-size", 16, "--method-config", "masks"]
    command("--method", "rise", *options, 4000)
    command("--method", "rise", *options, 1000, "--output", tmp_path / "fewer")
    assert sizes == [8, 16]


def test_only_missing_files_are_computed_again(command):
    folder = command()
    first, second, third = sorted(folder.glob("*.parquet"))
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (first, second, third)}
    second.unlink()
    command()
    for path in (first, third):
        assert path.stat().st_mtime_ns == before[path][1]
    assert second.read_bytes() == before[second][0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "layercam"), "has maps of another setting (method)"),
        (("--shard-size", "7"), "has maps of another setting (shard_size)"),
        (("--split", "train"), "has maps of another setting (images)"),
        (("--view", "whole"), "--view whole: the images of a data set are explained as crops"),
        (("--batch-size", "9"), "--batch-size 9 does not divide over 8 devices"),
        (("--limit", "0"), "--limit must be at least 1, not 0"),
        (("--classes", "zebra"), "zebra"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_line(command, words, message, capsys):
    folder = command()
    capsys.readouterr()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SystemExit):
        command(*words)
    (*_, line) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def damage(monkeypatch, *places):
    read = FolderSource.__getitem__

    def damaged(self, index):
        return read(self, index) | ({"image": b"none"} if index in places else {})

    monkeypatch.setattr(FolderSource, "__getitem__", damaged)


@pytest.mark.parametrize("shard_size", [1, 9])
def test_an_unreadable_image_is_left_out(shard_size, command, monkeypatch):
    damage(monkeypatch, 0)
    with pytest.warns(UserWarning, match="skipping an unreadable image"):
        folder = command("--shard-size", shard_size)
    table = pq.read_table(folder)
    assert len(table) == COUNT - 1 and 0 not in table["index"].to_pylist()


@pytest.mark.filterwarnings("ignore:skipping")
def test_unreadable_images_are_counted_over_all_files(command, monkeypatch, capsys):
    damage(monkeypatch, 0, 10)
    for _ in range(2):  # the second command finds the files of the first
        with pytest.raises(SystemExit):
            command("--shard-size", 1)
        assert f"2 of {COUNT} images of" in capsys.readouterr().err


def test_the_last_image_may_be_unreadable_after_an_interruption(command, monkeypatch):
    folder = command("--shard-size", 1)
    (*_, last) = sorted(folder.glob("*.parquet"))
    damage(monkeypatch, pq.read_table(last)["index"][0].as_py())
    last.unlink()
    with pytest.warns(UserWarning, match="skipping an unreadable image"):
        command("--shard-size", 1)
    assert pq.read_metadata(last).num_rows == 0


def test_a_folder_of_images_needs_no_data_dir_of_the_run(pictures, tmp_path):
    run = TrainConfig(backbone="vit", output=tmp_path, data_dir=str(tmp_path / "gone"))
    assert len(Selection(dataset=f"folder:{pictures}").source(run, MAX_PIXELS)) == 20


def test_data_sets_are_read_from_the_folder_of_the_run(run, digits_dir, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    dataclasses.replace(load_config(run), output=tmp_path / "run", data_dir=str(digits_dir)).save()
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path / "default"))
    words = ["--dataset", "digits", "--split", "test", "--limit", "2", "--batch-size", "8"]
    main(["explain", "--run", str(tmp_path / "run"), *words, "--output", str(tmp_path / "maps")])
    assert len(pq.read_table(tmp_path / "maps")) == 2
    assert not (tmp_path / "default").exists()


def test_a_folder_is_written_by_one_command_at_a_time(command, tmp_path, capsys):
    with locked(tmp_path / "maps"), pytest.raises(SystemExit):
        command()
    assert "another process is writing to" in capsys.readouterr().err
    assert not list((tmp_path / "maps").glob("*.parquet"))

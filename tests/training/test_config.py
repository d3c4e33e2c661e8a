import dataclasses
import json
import os
from pathlib import Path

import pytest
from etils import epath

from ttame_jax.cli import main
from ttame_jax.config import TrainConfig, command, preset
from ttame_jax.losses import LossConfig
from ttame_jax.runs import check_architecture, digests_of, load_config
from ttame_jax.training.loop import settle

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("bucket", [False, True])
def test_a_run_folder_may_be_in_a_bucket(tmp_path, monkeypatch, bucket):
    """From the command line to config.json and back, gs:// keeps both of its slashes."""
    output = "gs://bucket/runs/one" if bucket else str(tmp_path / "one")
    started = []
    monkeypatch.setattr("ttame_jax.experiments.train.train", started.append)
    words = ["train", "--backbone", "vit_b16", "--output", output, "--num-processes", "1"]
    main([*words, "--validation-list", "gs://bucket/list.txt"])
    (config,) = started
    assert os.fspath(config.output) == str(config.output) == output
    config.save(tmp_path)  # where a bucket would be
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["output"] == output
    assert saved["validation_list"] == "gs://bucket/list.txt"
    loaded = load_config(tmp_path)
    assert str(loaded.validation_list) == "gs://bucket/list.txt"
    assert loaded.output == tmp_path


def test_settings_that_an_old_run_did_not_have_are_the_defaults(tmp_path):
    config = TrainConfig(backbone="vit_b16", output=tmp_path, loss=LossConfig().resolved())
    config.save()
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    del fields["synchronise"]
    path.write_text(json.dumps(fields))
    assert load_config(str(tmp_path)) == config


def test_the_command_of_a_saved_run_leaves_the_weights_of_its_recipe_to_it(tmp_path):
    for loss, flags in (
        (LossConfig(), ""),
        (LossConfig("relevance"), " --loss.recipe relevance"),
        (
            LossConfig("relevance", regulariser_weight=2.0),
            " --loss.recipe relevance --loss.regulariser-weight 2.0",
        ),
    ):
        config = dataclasses.replace(preset("vit_b16"), loss=loss)
        config.save(tmp_path)
        saved = dataclasses.replace(load_config(tmp_path), output=config.output)
        assert command(saved) == f"ttame train --backbone vit_b16{flags}"


def test_a_run_moves_together_with_what_it_reads(tmp_path, monkeypatch):
    project, other = tmp_path / "project", tmp_path / "other"
    (project / "photos").mkdir(parents=True)
    (project / "w.safetensors").touch()
    (project / "list.txt").touch()
    monkeypatch.chdir(project)
    config = TrainConfig(
        backbone="vit",
        output=Path("runs/one"),
        weights="w.safetensors",
        dataset="folder:photos",
        data_dir=str(tmp_path / "elsewhere"),
        validation_list=Path("list.txt"),
        loss=LossConfig().resolved(),
    )
    config.save()
    assert load_config("runs/one") == config
    project.rename(other)
    monkeypatch.chdir(tmp_path)
    moved = load_config("other/runs/one")
    assert moved.weights == "other/w.safetensors"
    assert moved.dataset == "folder:other/photos"
    assert moved.validation_list == Path("other/list.txt")
    assert moved.data_dir == str(tmp_path / "elsewhere")


def test_paths_of_earlier_versions_are_those_of_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    TrainConfig(backbone="vit", output=Path("run"), weights="w.safetensors").save()
    (tmp_path / "w.safetensors").touch()
    assert load_config("run").weights == "w.safetensors"


def test_a_run_is_the_same_by_relative_and_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    config = TrainConfig(backbone="vit", output=Path("run"), dataset="folder:photos")
    config.save()
    settle(dataclasses.replace(config, output=tmp_path / "run"))
    with pytest.raises(ValueError, match="--dataset was folder:"):
        settle(dataclasses.replace(config, dataset="folder:pictures"))


def test_a_model_of_a_local_folder_moves_with_its_run(tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(backbone="hf:models/mine", weights="hf", output=Path("runs/mine"))
    config.save()
    assert (
        json.loads(Path("runs/mine/config.json").read_text())["backbone"] == "hf:../../models/mine"
    )
    monkeypatch.chdir(tmp_path / "models")
    moved = load_config(tmp_path / "runs" / "mine")
    saved = {"architecture": {"backbone": "hf:models/mine"}}  # by an earlier version
    for digests in (saved, digests_of({}, config)):
        digests_file = tmp_path / "runs" / "mine" / "checkpoints" / "4" / "digests" / "metadata"
        digests_file.parent.mkdir(parents=True, exist_ok=True)
        digests_file.write_text(json.dumps(digests))
        check_architecture(epath.Path(digests_file.parents[2]), [4], moved)
    found = moved.backbone
    assert Path(found.removeprefix("hf:")).samefile(tmp_path / "models" / "mine")


def test_a_model_of_the_hub_stays_as_it_is(tmp_path):
    TrainConfig(backbone="hf:google/vit-base", weights="hf", output=tmp_path).save()
    assert load_config(tmp_path).backbone == "hf:google/vit-base"

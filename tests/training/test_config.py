import json
import os

import pytest

from ttame_jax.cli import main
from ttame_jax.config import TrainConfig
from ttame_jax.runs import load_config

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
    config = TrainConfig(backbone="vit_b16", output=tmp_path)
    config.save()
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    del fields["synchronise"]
    path.write_text(json.dumps(fields))
    assert load_config(str(tmp_path)) == config

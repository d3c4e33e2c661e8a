import dataclasses
import io
import json
import os
import shutil
import signal
import sys
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from launch import wait_for_steps
from PIL import Image
from tiny import TINY

from ttame_jax.config import resolved
from ttame_jax.data import load_source
from ttame_jax.errors import Damaged, Failure, one_line_errors
from ttame_jax.experiments.train import panel, train
from ttame_jax.files import locked
from ttame_jax.losses import LossConfig
from ttame_jax.methods import TTAME
from ttame_jax.runs import (
    build_attention,
    build_backbone,
    load_attention,
    load_config,
    load_run,
    save_attention,
)
from ttame_jax.training import loop
from ttame_jax.training import step as step_module
from ttame_jax.training.loop import Diverged, Trainer, preemption
from ttame_jax.training.optimizer import one_cycle_sgd
from ttame_jax.weights import load_backbone, save_backbone


@pytest.fixture
def config(config):
    return dataclasses.replace(
        config, epochs=3, batch_size=16, learning_rate=0.01, validation_images=10, log_every=3
    )


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def parameters(run_dir):
    return jax.tree.leaves(nnx.state(load_run(run_dir).attention))


def assert_same_parameters(one, other):
    for a, b in zip(parameters(one), parameters(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_run_writes_what_it_promises(config, capfd):
    train(config)
    assert load_config(config.output) == resolved(config)
    logged = lines(config.output / "metrics.jsonl")
    assert [line["step"] for line in logged] == [3, 6, 9, 12]
    assert set(logged[0]) == {
        "step",
        "loss",
        "cross_entropy",
        "area",
        "variation",
        "learning_rate",
        "images_per_second",
        "waiting",
    }
    assert all(0 <= line["waiting"] <= 1 for line in logged)
    measured = lines(config.output / "validation.jsonl")
    epochs = [(line["epoch"], line["step"]) for line in measured]
    assert epochs == [(0, 0), (1, 4), (2, 8), (3, 12)]  # 0 is before training
    assert {"AD_100", "IC_100", "AD_50", "IC_50", "AD_15", "IC_15"} < set(measured[0])
    (events,) = (config.output / "tensorboard").glob("events*")
    pictures = events.read_bytes().split(b"\x89PNG")[1:]
    assert len(pictures) == 4  # the same images before training and after each epoch
    side = config.backbone_config["image_size"]
    shown = [np.asarray(Image.open(io.BytesIO(b"\x89PNG" + data))) for data in pictures]
    assert {picture.shape for picture in shown} == {(2 * side, 8 * side, 3)}
    assert all((picture[:side] == shown[0][:side]).all() for picture in shown)
    assert (shown[3][side:] != shown[0][side:]).any()  # maps change
    said = capfd.readouterr().err
    assert "starting: 8 x cpu, vit frozen, 3,845 trained parameters, 64 images, 12 steps" in said
    assert f"before training: AD_100 {measured[0]['AD_100']:.1f}" in said


def test_the_same_seed_gives_the_same_run_and_another_seed_another(config, tmp_path):
    outputs = [tmp_path / name for name in ("one", "two", "other")]
    for output, seed in zip(outputs, (0, 0, 1)):
        train(dataclasses.replace(config, output=output, seed=seed, epochs=1))
    assert_same_parameters(outputs[0], outputs[1])
    different = zip(parameters(outputs[0]), parameters(outputs[2]))
    assert any(not np.array_equal(a, b) for a, b in different)


def test_the_best_checkpoint_is_kept_and_loaded(config):
    config = dataclasses.replace(config, epochs=6)
    train(config)
    measured = lines(config.output / "validation.jsonl")
    best = max(measured[1:], key=lambda line: line["IC_15"] - line["AD_15"])["step"]
    kept = {int(path.name) for path in (config.output / "checkpoints").iterdir()}
    assert kept == {best, 20, 24}
    attention = build_attention(config, build_backbone(config))
    assert load_attention(config.output, attention) == best


def train_until(number, config):
    """Trains until a signal, sent after a few steps."""

    def send():
        wait_for_steps(config.output, 10)
        os.kill(os.getpid(), number)

    threading.Thread(target=send).start()
    long = {"epochs": 500, "log_every": 1, "checkpoint_every": 10_000, "validation_images": 0}
    return train(dataclasses.replace(config, **long))


def test_sigterm_saves_and_ends_cleanly(config):
    assert train_until(signal.SIGTERM, config) is False
    last = lines(config.output / "metrics.jsonl")[-1]["step"]
    saved = max(int(path.name) for path in (config.output / "checkpoints").iterdir())
    assert saved >= last > 10


def test_a_run_is_written_by_one_process_at_a_time(config):
    trainer = Trainer(config)
    with locked(config.output), pytest.raises(Failure, match="another process is writing to"):
        trainer.train()
    assert not (config.output / "config.json").exists()


def test_a_run_whose_folder_was_taken_meanwhile_is_refused(config):
    trainer = Trainer(config)
    dataclasses.replace(config, learning_rate=0.5).save()
    with pytest.raises(ValueError, match="holds a run with other settings"):
        trainer.train()


def test_a_full_disk_ends_in_one_line_and_the_run_goes_on(config, monkeypatch, capsys):
    config = dataclasses.replace(config, validation_images=0, checkpoint_every=2)
    free, usage = [2**30] * 3 + [0], shutil.disk_usage
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(free=free.pop(0) if free else 0)
    )
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as stop, one_line_errors("ttame"):
        train(config)
    line = "ttame: no space is left on the disk for"
    assert stop.value.code == 1 and capsys.readouterr().err.splitlines()[-1].startswith(line)
    monkeypatch.setattr(shutil, "disk_usage", usage)
    train(config)
    assert "resuming after step 2" in capsys.readouterr().err


def test_a_folder_with_a_run_of_other_settings_is_refused(config):
    config.save()
    weights = json.loads((config.output / "config.json").read_text())["loss"]
    assert (weights["regulariser_weight"], weights["relevance_weight"]) == (2, 0)
    other = dataclasses.replace(config, learning_rate=0.5, loss=LossConfig("reference"))
    with pytest.raises(ValueError, match="--learning-rate was 0.01.*choose another --output"):
        train(other)


def flip_a_byte(path, place):
    """Flips all bits of the byte at a share of the file's length."""
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 0xFF
    path.write_bytes(content)


def test_no_flipped_byte_of_a_checkpoint_is_loaded(config, tmp_path, capfd):
    train(dataclasses.replace(config, epochs=2, validation_images=0))
    attention = load_run(config.output).attention

    def arrays(run):
        step = load_attention(run, attention)
        return step, [np.asarray(x) for x in jax.tree.leaves(nnx.state(attention))]

    intact = dict([arrays(config.output)])
    checkpoints = config.output / "checkpoints"
    older = shutil.copytree(config.output, tmp_path / "older")
    shutil.rmtree(older / "checkpoints" / "8")
    intact |= dict([arrays(older)])
    assert set(intact) == {4, 8}
    newest = checkpoints / "8"
    files = [x for x in (newest / "attention").rglob("*") if x.is_file()]
    files += [x for x in (newest / "digests").rglob("*") if x.is_file()]
    found = []
    for path in files:
        content = path.read_bytes()
        for place in (0.1, 0.5, 0.9):
            flip_a_byte(path, place)
            step, values = arrays(config.output)
            for value, expected in zip(values, intact[step], strict=True):
                np.testing.assert_array_equal(value, expected)
            found.append(step)
            path.write_bytes(content)
    assert found.count(4) >= 5  # the others are in what is not read
    assert f"checkpoint {newest} is damaged" in capfd.readouterr().err


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(config, tmp_path, capfd):
    config = dataclasses.replace(config, validation_images=0)
    train(config)
    damaged = dataclasses.replace(config, output=tmp_path / "damaged")
    shutil.copytree(config.output, damaged.output)
    newest = damaged.output / "checkpoints" / "12"
    (arrays,) = (newest / "optimizer" / "d").iterdir()
    flip_a_byte(arrays, 0.5)
    train(damaged)
    said = capfd.readouterr().err
    assert f"checkpoint {newest} is damaged" in said and "resuming after step 8" in said
    assert_same_parameters(config.output, damaged.output)


@pytest.fixture
def own_pictures(pictures, tmp_path):
    return shutil.copytree(pictures, tmp_path / "pictures")


def test_other_images_under_the_same_name_are_refused(config, own_pictures):
    config = dataclasses.replace(
        config, dataset=f"folder:{own_pictures}", epochs=1, validation_images=0
    )
    train(config)
    shutil.copy(own_pictures / "train" / "000.png", own_pictures / "train" / "more.png")
    with pytest.raises(ValueError, match="its images were 64 images .*, now 65 images"):
        train(config)


def test_other_weights_under_the_same_name_are_refused_and_moved_ones_are_not(config, tmp_path):
    weights, moved = tmp_path / "w.safetensors", tmp_path / "moved.safetensors"
    save_backbone(load_backbone("vit", **TINY), weights)
    config = dataclasses.replace(config, weights=str(weights), epochs=1, validation_images=0)
    train(config)
    weights.rename(moved)
    train(dataclasses.replace(config, weights=str(moved), workers=1, log_every=1))
    save_backbone(load_backbone("vit", **TINY, seed=1), weights)
    with pytest.raises(ValueError, match=r"its weights were \w{16}, now \w{16}.* restore them"):
        train(config)


def test_a_run_that_was_trained_elsewhere_is_not_trained_on(config):
    save_attention(config.output, build_attention(config, build_backbone(config)), 5, config)
    config.save()
    with pytest.raises(
        ValueError, match="run was imported from another program's .* another --output"
    ):
        train(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 12}, "--batch-size 12 does not divide over 8 devices"),
        ({"batch_size": 128}, "64 images, less than one batch"),
        ({"dataset": "folder:missing"}, "missing"),
        ({"weights": "missing.safetensors"}, "missing.safetensors"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(config, change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(dataclasses.replace(config, **change))
    assert not config.output.exists()


def test_impossible_numbers_are_refused(config):
    with pytest.raises(ValueError, match="epochs must be at least 1, not 0"):
        dataclasses.replace(config, epochs=0)


def test_a_run_that_diverges_stops_and_saves_nothing_of_it(config, monkeypatch):
    make = step_module.total_loss

    def spoilt(*arguments):
        total, terms = make(*arguments)
        return total * jnp.nan, terms

    monkeypatch.setattr(step_module, "total_loss", spoilt)
    monkeypatch.setattr(loop, "_optimizer", one_cycle_sgd)  # so that no other run has its step
    config = dataclasses.replace(config, log_every=1, checkpoint_every=2)
    with pytest.raises(Diverged, match="at step 2, with a learning rate of .* nothing was saved"):
        train(config)
    assert not list((config.output / "checkpoints").iterdir())
    logged = (config.output / "metrics.jsonl").read_text()
    assert "NaN" not in logged
    assert [line["loss"] for line in lines(config.output / "metrics.jsonl")] == [None, None]


def test_an_impossible_rate_is_reported_and_not_done(config):
    with pytest.raises(Diverged, match="training diverged: .* lower --learning-rate"):
        train(dataclasses.replace(config, learning_rate=1e30))


@pytest.mark.filterwarnings("ignore:skipping")
def test_unreadable_validation_images_are_not_taken_for_divergence(config, own_pictures):
    for path in (own_pictures / "validation").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(Damaged, match="10 of 10 images .* are unreadable"):
        train(dataclasses.replace(config, dataset=f"folder:{own_pictures}"))


def test_a_panel_leaves_out_unreadable_images(config, own_pictures):
    first = min((own_pictures / "validation").iterdir())
    first.write_bytes(b"no image")
    source = load_source(f"folder:{own_pictures}", "validation")
    method = TTAME(build_backbone(config), build_attention(config, build_backbone(config)))
    drawn = panel(method, source, np.arange(3))(nnx.state(method))
    size = method.backbone.preprocessing.image_size
    assert drawn.shape == (2 * size, 2 * size, 3)
    assert panel(method, source, np.arange(1)) is None


def test_a_second_ctrl_c_ends_at_once():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), preemption() as preempted:
        signal.raise_signal(signal.SIGINT)
        assert preempted(1)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second one was ignored")
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_saves_and_exits_with_130(config, capfd):
    with pytest.raises(SystemExit) as stop, one_line_errors("ttame"):
        train_until(signal.SIGINT, config)
    assert stop.value.code == 130
    said = capfd.readouterr().err
    assert "stopped after step" in said and said.splitlines()[-1] == "ttame: interrupted"
    assert any((config.output / "checkpoints").iterdir())


@pytest.mark.slow
def test_half_precision_runs(config):
    train(dataclasses.replace(config, precision="bfloat16", epochs=1))
    assert all(np.isfinite(p).all() for p in parameters(config.output))


def test_class_names_that_the_user_edits_are_kept(config, pictures, tmp_path):
    for i, path in enumerate(sorted((pictures / "train").iterdir())):
        folder = tmp_path / "named" / "train" / "abcde"[i % 5]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    config = dataclasses.replace(
        config, dataset=f"folder:{tmp_path / 'named'}", validation_images=0
    )
    train(config)
    names = config.output / "class_names.txt"
    assert names.read_text().split() == list("abcde")
    names.write_text("e\nd\nc\nb\na\n")
    train(config)
    assert names.read_text().split() == list("edcba")

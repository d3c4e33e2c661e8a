import dataclasses
import json
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from flax import nnx
from tiny import TINY

from ttame_jax.config import TrainConfig
from ttame_jax.experiments.train import train
from ttame_jax.losses import LossConfig
from ttame_jax.runs import (
    build_attention,
    build_backbone,
    load_attention,
    load_config,
    load_run,
    save_attention,
)


@pytest.fixture
def config(pictures, tmp_path):
    return TrainConfig(
        backbone="vit",
        backbone_config=TINY,
        weights=None,
        dataset=f"folder:{pictures}",
        output=tmp_path / "run",
        epochs=3,
        batch_size=16,
        learning_rate=0.01,
        validation_images=10,
        log_every=3,
        workers=0,
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
    assert load_config(config.output) == config
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
    assert [(line["epoch"], line["step"]) for line in measured] == [(1, 4), (2, 8), (3, 12)]
    assert {"AD_100", "IC_100", "AD_50", "IC_50", "AD_15", "IC_15"} < set(measured[0])
    assert list((config.output / "tensorboard").glob("events*"))
    said = capfd.readouterr().err
    assert "starting: 8 x cpu, vit frozen, 3,845 trained parameters, 64 images, 12 steps" in said


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
    best = max(measured, key=lambda line: line["IC_15"] - line["AD_15"])["step"]
    kept = {int(path.name) for path in (config.output / "checkpoints").iterdir()}
    assert kept == {best, 20, 24}
    attention = build_attention(config, build_backbone(config))
    assert load_attention(config.output, attention) == best


def command(config, output, **flags):
    flags = {
        "backbone": "vit",
        "weights": "None",
        "dataset": config.dataset,
        "output": output,
        "epochs": 50,
        "batch-size": 16,
        "learning-rate": 0.01,
        "validation-images": 0,
        "log-every": 1,
        "checkpoint-every": 3,
        "workers": 1,
    } | flags
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    sizes = [str(word) for pair in TINY.items() for word in pair]
    return [sys.executable, "train.py", *words, "--backbone-config", *sizes]


def interrupt(arguments, output, sent):
    """Sends a signal in the middle of the run; returns its exit status."""
    process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL)
    log = output / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and len(log.read_text().splitlines()) > 30):
        assert process.poll() is None, "the run ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(sent)
    return process.wait(60)


def test_killed_and_resumed_it_ends_with_the_same_parameters_bit_for_bit(config, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(config, whole), check=True, stderr=subprocess.DEVNULL)
    assert interrupt(command(config, killed), killed, signal.SIGKILL) == -signal.SIGKILL
    assert len(lines(killed / "metrics.jsonl")) < 200
    # The last line may be cut short; it must not matter.
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 19')
    result = subprocess.run(command(config, killed), check=True, stderr=subprocess.PIPE, text=True)
    assert "resuming after step" in result.stderr
    assert_same_parameters(whole, killed)
    assert [line["step"] for line in lines(killed / "metrics.jsonl")] == list(range(1, 201))


def test_sigterm_saves_and_exits_cleanly(config, tmp_path):
    output = tmp_path / "stopped"
    arguments = command(config, output, **{"checkpoint-every": 10_000, "epochs": 500})
    assert interrupt(arguments, output, signal.SIGTERM) == 0
    last = lines(output / "metrics.jsonl")[-1]["step"]
    saved = max(int(path.name) for path in (output / "checkpoints").iterdir())
    assert saved >= last > 30


def test_a_folder_with_a_run_of_other_settings_is_refused(config):
    config.save()
    other = dataclasses.replace(config, learning_rate=0.5, loss=LossConfig("reference"))
    with pytest.raises(ValueError, match="--learning-rate was 0.01.*choose another --output"):
        train(other)


def test_a_run_that_was_trained_elsewhere_is_not_trained_on(config):
    save_attention(config.output, build_attention(config, build_backbone(config)), step=5)
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


def test_half_precision_runs(config):
    train(dataclasses.replace(config, precision="bfloat16", epochs=1))
    assert all(np.isfinite(p).all() for p in parameters(config.output))

"""`--batch-size auto` and `--scale-learning-rate`."""

import dataclasses
import json
import os
import shlex

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from launch import Launcher, fellows, train_command

from ttame_jax.cli import main
from ttame_jax.config import command, resolved
from ttame_jax.experiments.train import train
from ttame_jax.losses import LossConfig
from ttame_jax.mesh import AXIS, data_mesh
from ttame_jax.runs import load_config
from ttame_jax.training import batch_size
from ttame_jax.training.batch_size import largest_batch, largest_fitting, usable_memory
from ttame_jax.training.loop import Trainer

FLOATS = 1000  # of an image in the programs below


@pytest.fixture
def config(config):
    return dataclasses.replace(config, epochs=1, batch_size="auto", validation_images=0)


def compiler(function, axis=AXIS):
    """Compiles a function of a batch over that axis; `.sizes` lists those it was asked for."""

    def compile_step(size):
        compile_step.sizes.append(size)
        sharding = NamedSharding(data_mesh(), P(axis))
        batch = jax.ShapeDtypeStruct((size, FLOATS), jnp.float32, sharding=sharding)
        return jax.jit(function).lower(batch).compile()

    compile_step.sizes = []
    return compile_step


def give(monkeypatch, memory):
    monkeypatch.setattr(batch_size, "usable_memory", lambda: memory)


BYTES = 2 * 4 * FLOATS / 8  # of an image on a device: in and out


@pytest.mark.parametrize(
    ("memory", "images", "expected"),
    [
        (256 * BYTES, 5000, 256),
        (256 * BYTES - 1, 5000, 128),
        (8 * BYTES, 5000, 8),
        (1e12, 5000, 1024),  # the most that auto takes
        (1e12, 600, 512),  # a batch holds an image once
    ],
)
def test_the_largest_batch_that_fits_is_taken(memory, images, expected, monkeypatch, capfd):
    give(monkeypatch, memory)
    assert largest_batch(compiler(lambda x: x + 1), images) == expected
    assert f"--batch-size auto: {expected}." in capfd.readouterr().err


def test_only_what_may_fit_is_compiled(monkeypatch):
    give(monkeypatch, 512 * BYTES)
    compile_step = compiler(lambda x: x + 1)
    assert largest_batch(compile_step, 5000) == 512
    assert sorted(compile_step.sizes) == [128, 256, 512]


@pytest.mark.parametrize("images", [8, 17, 100])
def test_no_step_of_more_images_than_there_are_is_compiled(images, monkeypatch):
    give(monkeypatch, 1e12)
    compile_step = compiler(lambda x: x + 1)
    assert largest_batch(compile_step, images) == max(compile_step.sizes) <= images


def test_memory_below_a_full_group_does_not_count(monkeypatch):
    """As of a ViT on TPUs: activations of up to 16 images per device, and little for each image."""
    sizes = [8 << k for k in range(8)]
    share = lambda size: (1000 * min(size // 8, 16) + size // 8) / 20_000
    assert largest_fitting(share, 8, sizes) == (1024, share(1024))


def test_the_estimate_is_corrected_by_what_fits():
    """Memory that grows by 10 per image up to 64 images per device, and by 1 above."""
    sizes, tried = [8 << k for k in range(12)], []

    def share(size):
        tried.append(size // 8)
        return (10 * min(size // 8, 64) + size // 8) / 2000

    assert largest_fitting(share, 8, sizes) == (8 * 1024, share(8 * 1024))
    assert tried[:-1] == [16, 32, 128, 256, 1024]


def test_batches_grow_by_no_more_than_8_times():
    """Nearly no memory up to 32 images per device, from which everything seems to fit."""
    sizes, tried = [8 << k for k in range(13)], []

    def share(size):
        tried.append(size // 8)
        return max(size // 8 - 32, 0) / 300

    assert largest_fitting(share, 8, sizes) == (8 * 256, share(8 * 256))
    assert tried[:-1] == [16, 32, 256]


def test_a_batch_that_needs_more_than_estimated_is_not_taken(monkeypatch):
    """A square of the batch: 128 need 4 times what 64 do, the straight line says 2.5."""
    needed = 4 * (128 * FLOATS + 128**2)
    give(monkeypatch, needed - 1)
    compile_step = compiler(lambda x: x @ x.T, axis=None)
    assert largest_batch(compile_step, 5000) == 64
    assert 128 in compile_step.sizes
    give(monkeypatch, needed)
    assert largest_batch(compile_step, 5000) == 128


def test_what_the_compiler_refuses_does_not_fit(monkeypatch):
    give(monkeypatch, 1e12)
    compile_step = compiler(lambda x: x + 1)

    def refusing(size):
        if size > 100:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in hbm")
        return compile_step(size)

    assert largest_batch(refusing, 5000) == 64


def test_a_step_that_never_fits_is_refused(monkeypatch):
    give(monkeypatch, 8 * BYTES - 1)
    with pytest.raises(
        ValueError, match="one image per device does not fit: a step of 8 needs 100%"
    ):
        largest_batch(compiler(lambda x: x + 1), 5000)


def test_a_device_that_does_not_tell_its_memory_gets_the_papers_batch(monkeypatch, capfd):
    give(monkeypatch, None)
    compile_step = compiler(lambda x: x + 1)
    assert largest_batch(compile_step, 5000) == 32
    assert not compile_step.sizes
    assert "--batch-size auto: 32, because cpu does not report its memory" in capfd.readouterr().err


def test_devices_that_are_processors_share_half_of_the_machines_memory():
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert usable_memory() == physical / 2 / 8


def test_a_run_keeps_the_number_it_has_found(config, monkeypatch, capfd):
    trainer = Trainer(dataclasses.replace(config, batch_size=16))
    needs = trainer._compiled_step(16).memory_analysis()
    outputs = needs.output_size_in_bytes - needs.alias_size_in_bytes
    give(monkeypatch, needs.argument_size_in_bytes + outputs + needs.temp_size_in_bytes)
    train(config)
    assert load_config(config.output) == resolved(dataclasses.replace(config, batch_size=16))
    assert "4 steps of 16, peak rate 0.001" in capfd.readouterr().err
    give(monkeypatch, 1e12)
    train(config)
    assert "resuming after step 4" in capfd.readouterr().err
    with pytest.raises(ValueError, match="--batch-size was 16"):
        train(dataclasses.replace(config, batch_size=32))


@pytest.mark.slow
def test_two_processes_take_the_same_number(pictures, tmp_path):
    launcher = Launcher(tmp_path)
    output = tmp_path / "run"
    words = train_command(f"folder:{pictures}", output, epochs=1, batch_size="auto")
    try:
        processes = [launcher.start([*words, *flags], devices=2) for flags in fellows(2)]
        launcher.finish(*processes)
    finally:
        launcher.close()
    assert json.loads((output / "config.json").read_text())["batch_size"] == 64
    assert ["auto: 64." in process.log.read_text() for process in processes] == [True, False]


@pytest.mark.parametrize(("rule", "peak"), [("none", 0.01), ("sqrt", 0.005), ("linear", 0.0025)])
def test_the_rate_follows_the_batch_by_the_rule(rule, peak, config):
    config = dataclasses.replace(config, batch_size=8, learning_rate=0.01, scale_learning_rate=rule)
    cycle = Trainer(config).plan.cycle
    assert cycle.peak == pytest.approx(peak)
    turn = 0.3 * 8 - 1  # of 64 / 8 steps
    assert cycle.learning_rate(turn) == pytest.approx(peak)


@pytest.mark.parametrize("rule", ["none", "sqrt", "linear"])
def test_the_papers_batch_has_the_rate_as_given(rule, config):
    config = dataclasses.replace(config, batch_size=32, scale_learning_rate=rule)
    assert config.peak_learning_rate(config.batch_size) == config.learning_rate


def test_a_runs_command_gives_its_configuration(config, monkeypatch):
    config = dataclasses.replace(
        config,
        batch_size=48,
        scale_learning_rate="sqrt",
        learning_rate=3e-4,
        flip=False,
        synchronise=True,
        loss=LossConfig("reference"),
        data_dir="/a folder",
    )
    started = []
    monkeypatch.setattr("ttame_jax.experiments.train.train", started.append)
    words = shlex.split(command(config))
    assert words[:2] == ["ttame", "train"] and "--seed" not in words
    main([*words[1:], "--num-processes", "1"])
    assert started == [config]

"""Runs on several devices and of several processes, on this machine."""

import json
import os
import re
import signal
import threading

import jax
import numpy as np
import pytest
from flax import nnx
from launch import (
    Launcher,
    fellows,
    free_port,
    train_command,
    wait_for_checkpoint,
    wait_for_steps,
)
from tiny import training

from ttame_jax import load_explainer
from ttame_jax.data import load_source
from ttame_jax.experiments.train import train
from ttame_jax.methods import TTAME
from ttame_jax.metrics.evaluation import Evaluator
from ttame_jax.runs import load_run


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    launcher = Launcher(tmp_path_factory.mktemp("processes"))
    yield launcher
    launcher.close()


@pytest.fixture(scope="module")
def dataset(pictures, tmp_path_factory):
    """320 pictures, five names for each: an epoch of 40 steps of 8."""
    folder = tmp_path_factory.mktemp("many")
    (folder / "train").mkdir()
    for picture in (pictures / "train").iterdir():
        for i in range(5):
            (folder / "train" / f"{i}_{picture.name}").symlink_to(picture)
    return f"folder:{folder}"


FIELDS = {"epochs": 1, "batch_size": 8, "checkpoint_every": 10}


def train_here(dataset, output):
    """What `command` starts, on the 8 devices of this process."""
    fields = {"learning_rate": 0.01, "validation_images": 0, "log_every": 1, "synchronise": True}
    train(training(dataset, output, scale_features=True, **fields, **FIELDS))


def command(dataset, output):
    return [*train_command(dataset, output, **FIELDS), "--scale-features"]


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """A run that nothing has interrupted."""
    output = tmp_path_factory.mktemp("whole") / "run"
    train_here(dataset, output)
    return output


def assert_same_parameters(one, other):
    leaves = [jax.tree.leaves(nnx.state(load_run(run).attention)) for run in (one, other)]
    for a, b in zip(*leaves, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def steps(output):
    return [json.loads(x)["step"] for x in (output / "metrics.jsonl").read_text().splitlines()]


def saved(output):
    return max(int(path.name) for path in (output / "checkpoints").iterdir())


def start_two(launcher, dataset, output):
    """Two processes with two devices each."""
    return [launcher.start([*command(dataset, output), *flags], devices=2) for flags in fellows(2)]


@pytest.mark.slow
def test_synchronised_runs_on_1_and_8_devices_are_the_same(whole, dataset, tmp_path, launcher):
    output = tmp_path / "run"
    launcher.finish(launcher.start(command(dataset, output), devices=1))
    assert steps(output) == list(range(1, 41))
    assert_same_parameters(whole, output)


@pytest.mark.parametrize("killed", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_two_processes_end_when_either_is_killed_and_resume(
    killed, whole, dataset, tmp_path, launcher
):
    output = tmp_path / "run"
    processes = start_two(launcher, dataset, output)
    wait_for_checkpoint(output, 10, *processes)
    processes[killed].kill()
    other = processes[1 - killed]
    assert other.wait(20) != 0  # heartbeats are missed after 10 s
    assert re.search("lost another|another task died", other.log.read_text())
    assert steps(output)[-1] < 40
    first, second = start_two(launcher, dataset, output)
    launcher.finish(first, second)
    assert "resuming after step" in first.log.read_text()
    assert "resuming" not in second.log.read_text()  # one of them speaks
    assert steps(output) == list(range(1, 41))
    assert_same_parameters(whole, output)


@pytest.mark.slow
def test_sigterm_to_one_process_stops_all_and_one_process_resumes(
    whole, dataset, tmp_path, launcher
):
    output = tmp_path / "run"
    processes = start_two(launcher, dataset, output)
    wait_for_steps(output, 12, *processes)
    processes[1].send_signal(signal.SIGTERM)
    launcher.finish(*processes)
    assert f"stopped after step {saved(output)}" in processes[0].log.read_text()
    assert steps(output)[-1] == saved(output) < 40
    train_here(dataset, output)
    assert steps(output) == list(range(1, 41))
    assert_same_parameters(whole, output)


@pytest.mark.slow
def test_a_run_of_8_devices_resumes_on_4(whole, dataset, tmp_path, launcher):
    output = tmp_path / "run"

    def stop():
        wait_for_steps(output, 12)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    train_here(dataset, output)
    thread.join()
    assert saved(output) < 40
    launcher.finish(launcher.start(command(dataset, output), devices=4))
    assert steps(output) == list(range(1, 41))
    assert_same_parameters(whole, output)


MEASURES = ("ad", "ic", "road")
EVALUATE = """
import json, sys
from pathlib import Path
import jax
from ttame_jax import load_explainer
from ttame_jax.runs import load_run
from ttame_jax.data import load_source
from ttame_jax.methods import TTAME
from ttame_jax.metrics.evaluation import Evaluator
from ttame_jax.startup import Processes, joined
run, dataset, output, address, index = sys.argv[1:]
with joined(Processes(address, 2, int(index), 10)):
    explainer = load_explainer(run)
    method = TTAME(explainer.backbone, explainer.method.attention)
    source = load_source(dataset, "validation")
    evaluator = Evaluator(method, source, metrics=("ad", "ic", "road"), batch_size=8)
    rows = evaluator()
    text = json.dumps({name: values.tolist() for name, values in rows.items()})
    Path(output, f"{jax.process_index()}.json").write_text(text)
"""


def test_evaluation_by_two_processes_gives_the_figures_of_one(whole, pictures, tmp_path, launcher):
    words = ["-c", EVALUATE, str(whole), f"folder:{pictures}", str(tmp_path)]
    address = f"127.0.0.1:{free_port()}"
    launcher.finish(*(launcher.start([*words, address, str(i)], devices=2) for i in range(2)))
    explainer = load_explainer(whole)
    source = load_source(f"folder:{pictures}", "validation")
    method = TTAME(explainer.backbone, explainer.method.attention)
    expected = Evaluator(method, source, metrics=MEASURES, batch_size=8)()
    for i in range(2):
        rows = json.loads((tmp_path / f"{i}.json").read_text())
        assert rows.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_allclose(rows[name], values, atol=1e-4)


def test_a_process_described_in_part_is_refused(dataset, tmp_path, launcher):
    command = train_command(dataset, tmp_path / "run", **FIELDS)
    process = launcher.start([*command, "--process-id", "1"], devices=1)
    assert process.wait(60) == 2
    said = process.log.read_text()
    assert said.startswith("ttame: without a detected cluster, several processes need")
    assert "--coordinator-address HOST:PORT, --num-processes and --process-id" in said
    assert said.count("\n") == 1 and not (tmp_path / "run").exists()

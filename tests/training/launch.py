"""Real processes of `train.py`, on simulated devices."""

import atexit
import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import pytest
from tiny import TINY

ROOT = Path(__file__).parents[2]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["preloaded"])


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def train_command(dataset: str, output: Path, **flags) -> list[str]:
    """`train.py` on the tiny ViT without weights; `batch_size=8` is `--batch-size 8`."""
    flags = {
        "backbone": "vit",
        "weights": None,
        "dataset": dataset,
        "output": output,
        "learning_rate": 0.01,
        "validation_images": 0,
        "log_every": 1,
        "workers": 0,
    } | flags
    words = [str(w) for name, v in flags.items() for w in (f"--{name.replace('_', '-')}", v)]
    sizes = [str(word) for pair in TINY.items() for word in pair]
    return ["train.py", *words, "--synchronise", "--backbone-config", *sizes]


def fellows(count: int, heartbeat_timeout: int = 10) -> list[list[str]]:
    """The flags that make processes of this machine fellows, a list for each."""
    address = f"127.0.0.1:{free_port()}"
    shared = ["--coordinator-address", address, "--num-processes", str(count)]
    shared += ["--heartbeat-timeout", str(heartbeat_timeout)]
    return [[*shared, "--process-id", str(i)] for i in range(count)]


def run(command: list[str], environment: dict[str, str], log: Path) -> None:
    """Runs `python *command`, in a fork that has imported what it needs and started nothing."""
    with log.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(ROOT)
    os.environ.update(environment)
    jax.config.update(
        "jax_persistent_cache_min_compile_time_secs", 0.0
    )  # all run the same programs
    try:
        if command[0] == "-c":
            sys.argv = ["-c", *command[2:]]
            exec(command[1], {"__name__": "__main__"})  # noqa: S102
        else:
            sys.argv = command
            runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which a fork leaves out


class Started:
    """A process, as `subprocess.Popen` has it."""

    def __init__(self, *arguments, log: Path):
        self.log = log
        self._process = CONTEXT.Process(target=run, args=(*arguments, log))
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"still running: {self.log.read_text()}"
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)


class Launcher:
    """Starts Python with simulated devices; ends what is left of it at the end."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.processes: list[Started] = []

    def start(self, command: list[str], devices: int) -> Started:
        # The last one counts.
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        environment = os.environ | {"XLA_FLAGS": flags}
        log = self.folder / f"{len(self.processes)}.log"
        with pytest.MonkeyPatch.context() as patch:  # read when the first process starts
            patch.setenv("PYTHONPATH", f"{Path(__file__).parent}{os.pathsep}{ROOT}")
            process = Started([str(word) for word in command], dict(environment), log=log)
        self.processes.append(process)
        return process

    def finish(self, *processes: Started) -> None:
        for process in processes:
            assert process.wait(120) == 0, process.log.read_text()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def wait_for_steps(output: Path, steps: int, *processes: Started) -> None:
    """Waits until a run has logged so many steps."""
    log = output / "metrics.jsonl"
    _wait(lambda: log.exists() and len(log.read_text().splitlines()) > steps, processes)


def wait_for_checkpoint(output: Path, step: int, *processes: Started) -> None:
    """Waits until a run has finished the checkpoint of a step, which is written behind the steps."""
    _wait((output / "checkpoints" / str(step)).exists, processes)


def _wait(condition: Callable[[], bool], processes: Sequence[Started]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        for process in processes:
            assert process.poll() is None, process.log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)

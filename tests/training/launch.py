"""Real processes of `train.py`, on simulated devices."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from tiny import TINY

ROOT = Path(__file__).parents[2]


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


class Launcher:
    """Starts Python with simulated devices; ends what is left of it at the end."""

    def __init__(self, folder: Path):
        self.folder = folder
        # Training needs no PyTorch, which TensorBoard's writer would import for nothing.
        (folder / "torch.py").write_text("raise ImportError('no PyTorch here')")
        self.processes: list[subprocess.Popen] = []

    def start(self, command: list[str], devices: int) -> subprocess.Popen:
        # The last one counts.
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        environment = os.environ | {
            "XLA_FLAGS": flags,
            "PYTHONPATH": str(self.folder),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # the processes run the same programs
        }
        log = self.folder / f"{len(self.processes)}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=environment, stdout=file, stderr=file
            )
        process.log = log
        self.processes.append(process)
        return process

    def finish(self, *processes: subprocess.Popen) -> None:
        for process in processes:
            assert process.wait(120) == 0, process.log.read_text()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def wait_for_steps(output: Path, steps: int, *processes: subprocess.Popen) -> None:
    """Waits until a run has logged so many steps."""
    log = output / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and len(log.read_text().splitlines()) > steps):
        for process in processes:
            assert process.poll() is None, process.log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)

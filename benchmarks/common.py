"""Shared by the benchmarks: flags, interleaved timing, and a description of the machine."""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1]))  # also without installing the project
# Leaves GPU memory for PyTorch.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

TURN = 1.0  # minimum seconds of one measurement


@dataclass(frozen=True)
class Setting:
    """The model and the device. Weights are random, which does not affect speed."""

    backbone: str = "vit_b16"
    """vgg16, resnet50, vit_b16 or another classifier by name."""
    batch_size: int = 8
    """Images per batch, over all devices."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the computation."""
    device: Literal["cpu", "cuda", "tpu"] = "cpu"
    """Device to run on."""
    image_size: int = 224
    """Height and width of the images."""
    rounds: int = 5
    """Number of interleaved measurements; the median is reported."""


def median_seconds(
    sides: Mapping[str, Callable[[int], Any]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of one repetition of each side.

    The sides are measured in turns, so that other load on the machine affects all of them.

    Args:
      sides: functions of a number of repetitions that return when the last one has finished.
      rounds: number of measurements of each side, after a warm-up.
      clock: wall time, or this process's time.
    """
    return {name: statistics.median(times) for name, times in turns(sides, rounds, clock).items()}


def turns(
    sides: Mapping[str, Callable[[int], Any]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """The seconds of one repetition in every turn (see `median_seconds`)."""

    def timed(side, count):
        start = clock()
        side(count)
        return (clock() - start) / count

    def repetitions(side):
        timed(side, 1)  # compiles
        count = 1
        while (seconds := timed(side, count)) * count < TURN / 10:
            count *= 10
        return max(1, round(TURN / max(seconds, 1e-9)))

    counts = {name: repetitions(side) for name, side in sides.items()}
    times = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            times[name].append(timed(side, counts[name]))
    return times


def machine() -> dict[str, Any]:
    """The host and the versions of the relevant packages."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cpu_cores": cpu_cores(),
        "load_before": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("jax", "flax", "torch", "pillow", "grain")},
    }


def cpu_cores() -> int:
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main(run: Callable[[Any], dict], options: Any) -> None:
    """Runs a benchmark and prints its setting, the machine and the results as JSON."""
    setting = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in asdict(options).items()
    }
    print(json.dumps({"setting": setting, "machine": machine(), **run(options)}, indent=2))

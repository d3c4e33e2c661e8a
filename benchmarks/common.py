"""What the benchmarks share: their flags, timing side by side, and the machine's description."""

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
# PyTorch's share of the GPU's memory stays free.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

TURN = 1.0  # seconds that a measurement of one side takes, at least


@dataclass(frozen=True)
class Setting:
    """What is measured, and on what; weights are random, which changes no speed."""

    backbone: str = "vit_b16"
    """vgg16, resnet50, vit_b16 or another classifier by name."""
    batch_size: int = 8
    """Images at a time, over all devices."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the computation."""
    device: Literal["cpu", "cuda", "tpu"] = "cpu"
    """What to run on."""
    image_size: int = 224
    """Side of the images."""
    rounds: int = 5
    """Measurements of each thing, in turns; the median counts."""


def median_seconds(
    sides: Mapping[str, Callable[[int], Any]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds that one repetition of each side takes.

    The sides take turns, so that whatever else the machine does strikes all of them alike.

    Args:
      sides: functions of a number of repetitions that return when the last one is done.
      rounds: turns of each side; one before them warms it up and is not counted.
      clock: of the wall, or of this process.
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
    """The host, and the versions that its speed depends on."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cpu_cores": cpu_cores(),
        "load_before": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("jax", "flax", "torch", "pillow", "grain")},
    }


def cpu_cores() -> int:
    """Cores that this process may use."""
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
    """Runs a benchmark and prints its setting, machine and results as JSON."""
    setting = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in asdict(options).items()
    }
    print(json.dumps({"setting": setting, "machine": machine(), **run(options)}, indent=2))

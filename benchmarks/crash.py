"""Kills commands at random moments, runs them again, and compares all that they leave, as JSON.

    python benchmarks/crash.py --kills 100

Each command first runs undisturbed. Then it is killed (SIGKILL, with its whole process group) in a
new folder, at a moment drawn from that run's time, and run again there. Its results must be equal
to the undisturbed ones, bit for bit.

Commands run in forks of this process, which has imported everything and started nothing.
"""

import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import common
import numpy as np
import tensorboardX  # noqa: F401  so that no fork has to import it
import tyro
from PIL import Image

import ttame_jax.experiments.compare
import ttame_jax.experiments.explain  # noqa: F401
from ttame_jax import cli, config
from ttame_jax.experiments import demo
from ttame_jax.experiments.arguments import listed
from ttame_jax.runs import CHECKPOINT_FOLDER, load_run
from ttame_jax.weights.transfer import digest

ROOT = Path(__file__).parents[1]
SIZES = [
    "image_size",
    "32",
    "patch_size",
    "8",
    "width",
    "32",
    "depth",
    "3",
    "num_heads",
    "2",
    "num_classes",
    "5",
]
VARYING = ("seconds_per_image", "images_per_second", "waiting", "digest")
"""Keys of JSON files that differ from run to run."""


def folder_of_images(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 64), ("validation", 24)):
        (folder / split).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(256, size=(5, 5, 3), dtype=np.uint8)
            image = Image.fromarray(pixels).resize((40, 40))
            image.save(folder / split / f"{i:02}.png")


def train(place: Path, output: Path) -> None:
    words = ["--backbone", "vit", "--weights", "None", "--dataset", f"folder:{place / 'images'}"]
    words += ["--epochs", "2", "--batch-size", "8", "--validation-images", "16", "--workers", "0"]
    words += ["--log-every", "1", "--checkpoint-every", "3", "--output", str(output / "run")]
    cli.main(["train", *words, "--backbone-config", *SIZES])


def evaluate(place: Path, output: Path) -> None:
    words = ["--run", str(place / "train" / "run"), "--method", "rise", "--batch-size", "2"]
    words += ["--method-config", "masks", "64", "--measures", "ad,ic,road"]
    cli.main(["evaluate", *words, "--output", str(output / "figures.json")])


def compare(place: Path, output: Path) -> None:
    words = ["--run", str(place / "train" / "run"), "--methods", "gradcam,rise,ttame"]
    words += ["--method-config", "rise.masks", "64", "--batch-size", "4"]
    cli.main(["compare", *words, "--output", str(output)])


def explain(place: Path, output: Path) -> None:
    images = sorted(map(str, (place / "images" / "validation").iterdir()))[:8]
    words = ["--run", str(place / "train" / "run"), "--classes", "top2", "--output", str(output)]
    cli.main(["explain", *images, *words])


def small_demo(place: Path, output: Path) -> None:
    """`ttame demo` with the shortest trainings."""
    short = dataclasses.replace(
        config.preset(demo.BACKBONE), epochs=1, batch_size=500, validation_images=100, workers=0
    )
    vars(demo).update(preset=lambda name: short, CLASSIFIER_EPOCHS=1)
    cli.main(["demo", "--output", str(output)])


COMMANDS: dict[str, Callable[[Path, Path], None]] = {
    "train": train,
    "evaluate": evaluate,
    "compare": compare,
    "explain": explain,
    "demo": small_demo,
}


@dataclass(frozen=True)
class Options:
    kills: int = 20
    """Number of kills, spread over the commands."""
    commands: Annotated[tuple[str, ...], listed(str, "NAME,...")] = tuple(COMMANDS)
    """The commands to kill: train, evaluate, compare, explain, demo."""
    seed: int = 0
    """Seed of the moments."""


def run(options: Options) -> dict[str, Any]:
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_parallel_codegen_split_count=1")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        folder_of_images(place / "images")
        os.environ["XDG_CACHE_HOME"] = str(place / "cache")
        if "train" not in options.commands:
            finish(train, place, place / "train")
        rng = random.Random(options.seed)
        count = len(options.commands)
        reports = {
            name: killed(name, range(i, options.kills, count), place, rng)
            for i, name in enumerate(options.commands)
        }
    return {"different": sum(len(r["different"]) for r in reports.values()), "commands": reports}


def killed(name: str, numbers: Sequence[int], place: Path, rng: random.Random) -> dict[str, Any]:
    """Kills a command once for each number. Returns what was found."""
    expected, seconds = finish(COMMANDS[name], place, place / name)
    report: dict[str, Any] = {
        "kills": len(numbers),
        "seconds": seconds,
        "left_over": 0,
        "different": [],
    }
    for number in numbers:
        output = place / f"{name}_{number}"
        while (took := kill(COMMANDS[name], place, output, rng.uniform(0, seconds))) is not None:
            seconds = took  # the command was faster than before: an earlier moment is drawn
            shutil.rmtree(output, ignore_errors=True)
        report["left_over"] += sum(path.name.startswith(".") for path in files(output))
        found, _ = finish(COMMANDS[name], place, output)
        differing = sorted(k for k in {*expected, *found} if expected.get(k) != found.get(k))
        if differing:
            report["different"].append({"folder": output.name, "files": differing})
    return report


def kill(command: Callable, place: Path, output: Path, moment: float) -> float | None:
    """Kills a command so many seconds after its start. Returns its time if it ended before."""
    start = time.perf_counter()
    child = fork(command, place, output)
    while time.perf_counter() - start < moment:
        if os.waitpid(child, os.WNOHANG)[0] == child:
            return time.perf_counter() - start
        time.sleep(0.01)
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:  # it has no group of its own yet
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def finish(command: Callable, place: Path, output: Path) -> tuple[dict[str, str], float]:
    """Runs a command to its end. Returns what it has left, and its time in seconds."""
    start = time.perf_counter()
    wait(fork(command, place, output), output)
    seconds = time.perf_counter() - start
    answer = output.with_suffix(".contents")
    wait(fork(describe, output, answer), answer)
    return json.loads(answer.read_text()), seconds


def wait(child: int, output: Path) -> None:
    if os.waitpid(child, 0)[1]:
        raise RuntimeError(f"a command failed: {output.with_suffix('.log').read_text()[-2000:]}")


def fork(function: Callable, place: Path, output: Path) -> int:
    """Calls a function in a new process and process group. Returns its id."""
    if child := os.fork():
        return child
    status = 1
    try:
        os.setsid()
        log = os.open(output.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        output.parent.mkdir(parents=True, exist_ok=True)
        function(place, output)
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def describe(folder: Path, answer: Path) -> None:
    """Writes a digest of every file and run in a folder; times are left out."""
    found = {}
    for path in files(folder):
        name = str(path.relative_to(folder))
        if path.name.startswith(".") or {CHECKPOINT_FOLDER, "tensorboard"} & set(path.parts):
            continue
        if path.suffix in (".json", ".jsonl"):
            text = path.read_text()
            values = [json.loads(text)] if path.suffix == ".json" else lines(text)
            found[name] = json.dumps([steady(value, folder) for value in values])
        elif path.suffix != ".html" and not path.name.startswith("table_"):  # these tell times
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    for checkpoints in folder.rglob(CHECKPOINT_FOLDER):
        found["attention"] = digest(load_run(checkpoints.parent).attention)
        steps = sorted(path.name for path in checkpoints.iterdir())
        found["checkpoints"] = " ".join(steps)
    answer.write_text(json.dumps(found))


def lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def steady(value: Any, folder: Path) -> Any:
    """A JSON value without the keys that differ from run to run."""
    if isinstance(value, dict):
        return {key: steady(item, folder) for key, item in value.items() if key not in VARYING}
    if isinstance(value, list):
        return [steady(item, folder) for item in value]
    return value.replace(str(folder), "FOLDER") if isinstance(value, str) else value


if __name__ == "__main__":
    common.main(run, tyro.cli(Options, description=__doc__))

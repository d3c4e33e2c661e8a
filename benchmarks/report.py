"""Runs all benchmarks and writes docs/benchmarks.md; prints their results as one JSON.

    make bench                # or: python benchmarks/report.py
    make bench DEVICE=cuda

On a GPU or TPU it uses bfloat16 and the batch size with the fastest training. On a GPU, PyTorch
runs with torch.compile and autocast. Each benchmark runs in its own process; a failure is reported
in its place.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

HERE = Path(__file__).parent
BACKBONES = ("vit_b16", "resnet50", "vgg16")


@dataclass(frozen=True)
class Options:
    device: Literal["cpu", "cuda", "tpu"] = "cpu"
    """What to run on."""
    backbones: tuple[str, ...] = BACKBONES
    """Which classifiers."""
    batch_sizes: tuple[int, ...] = ()
    """To choose from; by default 8 on CPU, and 64 to 512 elsewhere."""
    precision: Literal["float32", "bfloat16"] | None = None
    """By default float32 on CPU and bfloat16 elsewhere."""
    image_size: int = 224
    """Side of the images."""
    rounds: int = 5
    """Measurements of each thing, in turns; the median counts."""
    output: Path = HERE.parent / "docs" / "benchmarks.md"
    """The report."""


def main(options: Options) -> None:
    on_cpu = options.device == "cpu"
    precision = options.precision or ("float32" if on_cpu else "bfloat16")
    sizes = options.batch_sizes or ((8,) if on_cpu else (64, 128, 256, 512))
    common = ["--device", options.device, "--precision", precision]
    common += ["--image-size", str(options.image_size), "--rounds", str(options.rounds)]
    results = {"train_step": {}, "explain": {}}
    for backbone in options.backbones:
        setting = ["--backbone", backbone, *common]
        batch = ["--batch-size", str(fastest(setting, sizes))]
        # PyTorch has no part in a measurement on TPU.
        compare = {"cpu": ["--compare"], "cuda": ["--compare", "--compile"], "tpu": []}
        results["train_step"][backbone] = benchmark(
            "train_step", *setting, *batch, *compare[options.device]
        )
        results["explain"][backbone] = benchmark("explain", *setting, *batch)
    results["input_pipeline"] = benchmark("input_pipeline", *common)
    print(json.dumps(results, indent=2))
    options.output.write_text(report(results, options))


def fastest(setting: list[str], sizes: tuple[int, ...]) -> int:
    """The batch size that trains the most images a second; those that do not fit fail."""
    if len(sizes) == 1:
        return sizes[0]
    runs = {size: benchmark("train_step", *setting, "--batch-size", str(size)) for size in sizes}
    return max(sizes, key=lambda size: runs[size].get("images_per_second", 0))


def benchmark(name: str, *flags: str) -> dict:
    """A script's JSON, or its last words as `error`."""
    command = [sys.executable, str(HERE / f"{name}.py"), *flags]
    print(" ".join(command[1:]), file=sys.stderr)
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout)


def report(results: dict, options: Options) -> str:
    machine = next((r["machine"] for r in flatten(results) if "machine" in r), {})
    text = (HERE / "report.md").read_text()
    values = {
        "command": "make bench" + ("" if options.device == "cpu" else f" DEVICE={options.device}"),
        "machine": "\n".join(f"- {key}: {value}" for key, value in machine.items() if value),
        "train_step": table(results["train_step"], TRAIN_COLUMNS),
        "explain": table(results["explain"], EXPLAIN_COLUMNS),
        "input_pipeline": table({"500x375 JPEG": results["input_pipeline"]}, INPUT_COLUMNS),
    }
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def flatten(results: dict) -> list[dict]:
    return [*results["train_step"].values(), *results["explain"].values()]


TRAIN_COLUMNS = {
    "batch": "setting.batch_size",
    "precision": "setting.precision",
    "images/s": "images_per_second",
    "PyTorch images/s": "torch_images_per_second",
    "ratio": "ratio",
    "GFLOP/image": "gflops_per_image",
    "GFLOP/image, compiler's count": "gflops_per_image_compiled",
    "TFLOP/s": "tflops_per_second",
    "share of peak": "share_of_peak",
    "program's memory, GB": "program_memory_bytes",
    "peak memory, GB": "peak_memory_bytes",
}
EXPLAIN_COLUMNS = {
    "batch": "setting.batch_size",
    "images/s, one class": "images_per_second.one_class",
    "all classes": "images_per_second.all_classes",
    "overhead, one class": "overhead.one_class",
    "overhead, all classes": "overhead.all_classes",
    "one image, one class, s": "latency_of_one_image.one_class",
    "one image, classifier alone, s": "latency_of_one_image.logits",
}
INPUT_COLUMNS = {
    "images/s per core": "images_per_second_per_core",
    "read": "by_stage.read",
    "decode": "by_stage.decode",
    "resize and crop": "by_stage.resize_and_crop",
    "batch": "by_stage.batch",
    "device put": "by_stage.device_put",
    "to evaluate": "evaluation_images_per_second_per_core",
}


def table(rows: dict[str, dict], columns: dict[str, str]) -> str:
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    for name, result in rows.items():
        cells = [shown(result, path) for path in columns.values()]
        lines.append([name, *([result["error"]] if "error" in result else cells)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def shown(result: dict, path: str) -> str:
    value: Any = result
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, int | float) and path.endswith("_bytes"):
        value /= 1e9
    return f"{value:.3g}" if isinstance(value, float) else str("" if value is None else value)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

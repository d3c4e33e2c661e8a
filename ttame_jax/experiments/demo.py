"""`ttame demo`: a classifier of digits, its T-TAME, and their report."""

import dataclasses
import time
from pathlib import Path

import numpy as np

from ttame_jax.config import preset
from ttame_jax.data import Source, load_source, thin
from ttame_jax.experiments.report import ReportConfig, report
from ttame_jax.experiments.train import train
from ttame_jax.files import check_output_folder, locked, write_atomically
from ttame_jax.runs import load_run
from ttame_jax.training.classifier import accuracy, train_classifier
from ttame_jax.weights import load_backbone, save_backbone

BACKBONE = "digits_vit"
CLASSIFIER_EPOCHS = 4
TEST = "test"  # split
SAVED = 12  # test images
METRICS = ("ad", "ic", "pointing")


def run_demo(output: Path) -> None:
    """Trains and evaluates T-TAME on the built-in digits in minutes on two cores.

    A second call reuses the classifier and the run of the first, or resumes their training.
    """
    check_output_folder(output)
    with locked(output):
        start = time.monotonic()
        weights, run = output / f"{BACKBONE}.safetensors", output / "run"
        config = dataclasses.replace(preset(BACKBONE), weights=str(weights), output=run)
        if _train_classifier(weights) and train(config):
            _explain_and_write(output, run, start)
        else:
            print("stopped: the same command resumes the demo")


def _train_classifier(weights: Path) -> bool:
    """Trains the classifier, unless its file exists. Returns whether it is trained."""
    if weights.exists():
        return True
    backbone, checkpoint = load_backbone(BACKBONE), weights.with_suffix(".checkpoint")
    source = load_source("digits", "train")
    if not train_classifier(backbone, source, epochs=CLASSIFIER_EPOCHS, checkpoint=checkpoint):
        return False
    save_backbone(backbone, weights)
    return True


def _explain_and_write(output: Path, run: Path, start: float) -> None:
    test = load_source("digits", TEST)
    _save_pictures(test, output / "pictures")
    correct = 100 * accuracy(load_run(run).backbone, test)
    note = (
        f"A small ViT tells handwritten digits on cluttered canvases, {correct:.1f} % of the test "
        "images correctly. Its attention mechanism was then trained without labels."
    )
    page = output / "index.html"
    config = ReportConfig(run=run, output=page, split=TEST, limit=None, measures=METRICS)
    figures = report(config, note)
    print(
        f"classifier accuracy {correct:.1f} %; the map's maximum lies on the digit in "
        f"{figures['pointing']['mean']:.1f} % of the test images; AD(15 %) "
        f"{figures['AD']['15']:.1f}, IC(15 %) {figures['IC']['15']:.1f}; "
        f"{(time.monotonic() - start) / 60:.1f} minutes"
    )


def _save_pictures(source: Source, folder: Path) -> None:
    """Saves a few of the images, as files to explain."""
    for i, index in enumerate(thin(np.arange(len(source)), SAVED)):
        write_atomically(folder / f"{i:02}_image.png", source[index]["image"])

"""`ttame demo`: a classifier of digits, its T-TAME, their metrics and a page of pictures."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from ttame_jax.config import preset
from ttame_jax.data import Source, evaluation_batches, load_source
from ttame_jax.experiments.train import train
from ttame_jax.explainer import Explainer
from ttame_jax.files import check_output_folder, locked, write_atomically
from ttame_jax.metrics.evaluation import Evaluator, summarise
from ttame_jax.pictures import heatmap, overlay, save_image
from ttame_jax.preprocessing import to_float
from ttame_jax.runs import load_explainer
from ttame_jax.training.classifier import accuracy, train_classifier
from ttame_jax.weights import load_backbone, save_backbone

BACKBONE = "digits_vit"
CLASSIFIER_EPOCHS = 4
SHOWN = 12  # pictures on the page
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
    explainer = load_explainer(run)
    test = load_source("digits", "test")
    facts: dict[str, Any] = {
        "accuracy": 100 * accuracy(explainer.backbone, test),
        **summarise(Evaluator(explainer.method, test, metrics=METRICS)(), METRICS),
    }
    facts["minutes"] = (time.monotonic() - start) / 60
    _write_page(explainer, test, output, facts)
    print(
        f"classifier accuracy {facts['accuracy']:.1f} %; the map's maximum lies on the digit in "
        f"{facts['pointing']['mean']:.1f} % of the test images; AD(15 %) {facts['AD']['15']:.1f}, "
        f"IC(15 %) {facts['IC']['15']:.1f}; {facts['minutes']:.1f} minutes"
    )
    print(f"pictures: {output / 'index.html'}")


def _write_page(explainer: Explainer, source: Source, output: Path, facts: dict) -> None:
    indices = np.linspace(0, len(source) - 1, SHOWN).astype(int)
    preprocessing = explainer.backbone.preprocessing
    (batch,) = evaluation_batches(source, preprocessing, SHOWN, indices=indices)
    images = batch["image"]
    explanation = explainer(to_float(images), "top2")
    rows = []
    for i, image in enumerate(images):
        maps, classes, probabilities = (
            np.asarray(values[i])
            for values in (explanation.maps, explanation.classes, explanation.probabilities)
        )
        pictures = {
            "image": image,
            "map": heatmap(maps[0], image.shape[:2]),
            "overlay": overlay(image, maps[0]),
            "runner_up": overlay(image, maps[1]),
        }
        for name, picture in pictures.items():
            save_image(picture, output / "pictures" / f"{i:02}_{name}.png")
        rows.append({"classes": classes.tolist(), "probabilities": probabilities.tolist()})
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("ttame_jax.experiments", "."), autoescape=True
    )
    page = templates.get_template("demo.html").render(rows=rows, facts=facts, backbone=BACKBONE)
    write_atomically(output / "index.html", page)

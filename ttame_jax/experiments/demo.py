"""The demo: a classifier of digits, its T-TAME, their measures and a page of pictures."""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import jinja2
import numpy as np

from ttame_jax.backbones import load_backbone, save_backbone
from ttame_jax.data import Source, evaluation_batches, load_source
from ttame_jax.explainer import Explainer, Explanation, load_explainer
from ttame_jax.files import write_atomically
from ttame_jax.methods import TTAME
from ttame_jax.metrics.evaluation import Evaluator, summarise
from ttame_jax.metrics.pointing import pointing_hits
from ttame_jax.plots import heatmap, overlay, save_image
from ttame_jax.training.classifier import accuracy, train_classifier
from ttame_jax.training.config import preset
from ttame_jax.training.loop import train

BACKBONE = "digits_vit"
CLASSIFIER_EPOCHS = 6
SHOWN = 12  # pictures on the page


def run_demo(output: Path) -> None:
    """Trains, measures and shows T-TAME on the built-in digits, in minutes on two cores.

    A second call reuses what the first has trained.
    """
    start = time.monotonic()
    weights = output / f"{BACKBONE}.safetensors"
    if not weights.exists():
        backbone = load_backbone(BACKBONE)
        train_classifier(backbone, load_source("digits", "train"), epochs=CLASSIFIER_EPOCHS)
        save_backbone(backbone, weights)
    run = output / "run"
    train(dataclasses.replace(preset(BACKBONE), weights=str(weights), output=run))

    explainer = load_explainer(run)
    test = load_source("digits", "test")
    method = TTAME(explainer.backbone, explainer.attention)
    facts = {
        "accuracy": 100 * accuracy(explainer.backbone, test),
        "pointing": 100 * pointing_accuracy(explainer, test),
        **summarise(Evaluator(method, test)(), ("ad", "ic")),
    }
    facts["minutes"] = (time.monotonic() - start) / 60
    _write_page(explainer, test, output, facts)
    print(
        f"classifier {facts['accuracy']:.1f} % right; the map's maximum lies on the digit in "
        f"{facts['pointing']:.1f} % of the test images; AD(15 %) {facts['AD']['15']:.1f}, "
        f"IC(15 %) {facts['IC']['15']:.1f}; {facts['minutes']:.1f} minutes"
    )
    print(f"pictures: {output / 'index.html'}")


def pointing_accuracy(explainer: Explainer, source: Source) -> float:
    """Share (0 to 1) of images on whose box the predicted class's map has its maximum."""
    hits = []
    for images, explanation, index in _explained(explainer, source, "top1"):
        boxes = np.stack([source[i]["box"] for i in index])
        hits.append(pointing_hits(explanation.maps[:, 0], boxes, images.shape[1:3]))
    return float(np.concatenate(hits).mean())


def _explained(
    explainer: Explainer, source: Source, classes: str, indices=None
) -> Iterator[tuple[np.ndarray, Explanation, np.ndarray]]:
    """Images uint8, their explanations and indices, a batch at a time."""
    batches = evaluation_batches(source, explainer.backbone.preprocessing, 100, indices=indices)
    for batch in batches:
        valid = batch["valid"]
        images = batch["image"][valid]
        yield images, explainer(images.astype(np.float32) / 255, classes), batch["index"][valid]


def _write_page(explainer: Explainer, source: Source, output: Path, facts: dict) -> None:
    indices = np.linspace(0, len(source) - 1, SHOWN).astype(int)
    ((images, explanation, _),) = _explained(explainer, source, "top2", indices)
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

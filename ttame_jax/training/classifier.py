"""Trains a small backbone on labelled images, for data sets without a published classifier."""

import contextlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from ttame_jax.backbones import Backbone
from ttame_jax.data import Source, evaluation_batches, train_batches
from ttame_jax.losses import cross_entropy


def train_classifier(
    backbone: Backbone,
    source: Source,
    *,
    epochs: int,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> None:
    """Trains a backbone in place with AdamW, its rate rising for a tenth of the steps.

    BatchNorms keep the running statistics that they have: they are affine layers here.

    Args:
      backbone: a randomly initialised classifier.
      source: its labelled images; they are cropped but not mirrored.
      epochs: passes over them.
      batch_size: images a step.
      learning_rate: the peak of a cosine schedule.
      seed: of the order of the images and their crops.
    """
    steps = epochs * (len(source) // batch_size)
    schedule = optax.warmup_cosine_decay_schedule(0, learning_rate, steps // 10, steps)
    optimizer = optax.adamw(schedule, weight_decay=0.05)
    graph, params, rest = nnx.split(backbone, nnx.Param, ...)
    step_fn = jax.jit(_make_step(graph, rest, optimizer), donate_argnums=(0, 1))
    opt_state = optimizer.init(params)
    params = jax.tree.map(jnp.copy, params)  # the step donates them; the backbone keeps its own
    batches = train_batches(
        source, backbone.preprocessing, batch_size, seed=seed, flip=False, workers=0
    )
    with contextlib.closing(batches):
        for _ in tqdm(range(steps), desc=f"training {backbone.name}", unit="step"):
            batch = next(batches)
            params, opt_state = step_fn(params, opt_state, batch["image"], batch["label"])
    nnx.update(backbone, params)


def _make_step(graph, rest, optimizer: optax.GradientTransformation) -> Callable:
    def step(params, opt_state, images, labels):
        def loss_fn(params):
            backbone = nnx.merge(graph, params, rest)
            images_in = backbone.preprocessing.standardise(images.astype(jnp.float32) / 255)
            return cross_entropy(backbone(images_in)[0], labels)

        updates, opt_state = optimizer.update(jax.grad(loss_fn)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step


def accuracy(backbone: Backbone, source: Source, batch_size: int = 100) -> float:
    """Share (0 to 1) of a source's images whose label is the likeliest class."""
    graph, state = nnx.split(backbone)

    @jax.jit
    def predict(state, images):
        backbone = nnx.merge(graph, state)
        images = backbone.preprocessing.standardise(images.astype(jnp.float32) / 255)
        return backbone(images)[0].argmax(-1)

    right = total = 0
    for batch in evaluation_batches(source, backbone.preprocessing, batch_size):
        hits = np.asarray(predict(state, batch["image"])) == batch["label"]
        right += int(hits[batch["valid"]].sum())
        total += int(batch["valid"].sum())
    return right / total

"""Trains a small classifier on labelled images, for data sets without a published one."""

import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from ttame_jax.backbones import Backbone
from ttame_jax.data import Source, evaluation_batches
from ttame_jax.errors import Damaged
from ttame_jax.files import read_safetensors, write_safetensors
from ttame_jax.losses import cross_entropy
from ttame_jax.preprocessing import Preprocessing, to_float
from ttame_jax.training.loop import preemption

Model = TypeVar("Model", bound=nnx.Module)

Loss = Callable[[Model, tuple[jax.Array, ...], jax.Array, jax.Array], jax.Array]
"""Of the model, a batch, the share of the training that is done (0 to 1), and a random key."""


def train_classifier(backbone: Backbone, source: Source, *, shift: int = 3, **options: Any) -> bool:
    """Trains a backbone in place on the cross-entropy of its labels.

    BatchNorms keep their running statistics, so they are affine layers here. All images are decoded
    once and kept in memory.

    Args:
      backbone: a randomly initialised classifier.
      source: its labelled images.
      shift: largest random shift of an image in pixels, with wrap-around.
      **options: those of `fit`.

    Returns:
      Whether the training is finished. SIGTERM ends it early.

    Raises:
      KeyboardInterrupt: Ctrl-C.
    """

    def loss(backbone, batch, progress, key):
        images, labels = batch
        shifts = jax.random.randint(key, (len(images), 2), -shift, shift + 1)
        images = jax.vmap(lambda image, by: jnp.roll(image, by, (0, 1)))(images, shifts)
        inputs = backbone.preprocessing.standardise(to_float(images))
        return cross_entropy(backbone(inputs)[0], labels).mean()

    return fit(backbone, loss, decode(source, backbone.preprocessing), **options)


def fit(
    model: Model,
    loss: Loss[Model],
    arrays: tuple[np.ndarray, ...],
    *,
    epochs: int,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    seed: int = 0,
    checkpoint: Path | None = None,
) -> bool:
    """Minimises a loss in place, with linear warmup over a tenth of the steps and cosine decay.

    Matrices are trained with Muon, with which small transformers need a third of the steps, and
    all other parameters with AdamW.

    Args:
      model: its `nnx.Param` are trained.
      loss: a scalar.
      arrays: the training data, ``[N, ...]`` each.
      epochs: passes over the data.
      batch_size: examples per step.
      learning_rate: peak rate of AdamW; Muon's is ten times that.
      seed: of the order of the examples and of the keys.
      checkpoint: a file for the state after each epoch, from which an interrupted training
        resumes. It is deleted at the end.

    Returns:
      Whether the training is finished. SIGTERM ends it early.

    Raises:
      KeyboardInterrupt: Ctrl-C.
      ValueError: the checkpoint is of a training with other options.
    """
    steps_per_epoch = len(arrays[0]) // batch_size
    steps = epochs * steps_per_epoch
    optimizer = _optimizer(learning_rate, steps)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    params = jax.tree.map(jnp.copy, params)  # the step donates its copy
    opt_state = optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step_fn(params, opt_state, batch, step):
        def loss_fn(params):
            step_key = jax.random.fold_in(jax.random.key(seed), step)
            return loss(nnx.merge(graph, params, rest), batch, step / steps, step_key)

        updates, opt_state = optimizer.update(jax.grad(loss_fn)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    options = f"{epochs=}, {batch_size=}, {learning_rate=}, {seed=}"
    done, (params, opt_state) = _restored(checkpoint, (params, opt_state), options)
    batches = _batches(len(arrays[0]), batch_size, epochs, seed)
    bar = tqdm(total=steps, initial=done, desc="training the classifier", unit="step")
    with bar, preemption() as preempted:
        for step, chosen in enumerate(itertools.islice(batches, done, None), start=done):
            batch = tuple(array[chosen] for array in arrays)
            params, opt_state = step_fn(params, opt_state, batch, np.int32(step))
            bar.update()
            stop = preempted(step)
            if checkpoint and (stop or (step + 1) % steps_per_epoch == 0):
                _save(checkpoint, step + 1, (params, opt_state), options)
            if stop:
                return False
    nnx.update(model, params)
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    return True


def _batches(images: int, batch_size: int, epochs: int, seed: int) -> Iterator[np.ndarray]:
    """The indices of the images of each step; every epoch has an order of its own."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(images)
        yield from order[: images - images % batch_size].reshape(-1, batch_size)


def _save(path: Path, step: int, state: Any, options: str) -> None:
    leaves = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    write_safetensors(path, leaves, {"step": str(step), "options": options})


def _restored(path: Path | None, state: Any, options: str) -> tuple[int, Any]:
    """The number of steps done and the state after them, from a file; 0 and the given state if
    there is none, or if it is damaged."""
    if path is None or not path.is_file():
        return 0, state
    try:
        tensors, metadata = read_safetensors(path)
    except Damaged as error:
        print(f"{error}; training starts anew", file=sys.stderr)
        return 0, state
    if metadata.get("options") != options:
        raise ValueError(
            f"{path} is of a training with {metadata.get('options', 'unknown options')}, not "
            f"{options}: delete it to start anew"
        )
    leaves = [jnp.asarray(tensors[str(i)]) for i in range(len(tensors))]
    return int(metadata["step"]), jax.tree.unflatten(jax.tree.structure(state), leaves)


def decode(source: Source, preprocessing: Preprocessing) -> tuple[np.ndarray, np.ndarray]:
    """The centre crops of labelled images, uint8 ``[N, S, S, 3]``, and their labels ``[N]``.

    Unreadable images are left out.
    """
    batches = list(evaluation_batches(source, preprocessing, 100))
    valid = np.concatenate([batch["valid"] for batch in batches])
    images, labels = (
        np.concatenate([batch[name] for batch in batches])[valid] for name in ("image", "label")
    )
    return images, labels


def _optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0, learning_rate, steps // 10, steps)
    return optax.contrib.muon(
        lambda step: 10 * schedule(step), weight_decay=0.05, adam_learning_rate=schedule
    )


def accuracy(backbone: Backbone, source: Source, batch_size: int = 100) -> float:
    """Top-1 accuracy (0 to 1) on the images of a source."""
    graph, state = nnx.split(backbone)

    @jax.jit
    def predict(state, images):
        backbone = nnx.merge(graph, state)
        images = backbone.preprocessing.standardise(to_float(images))
        return backbone(images)[0].argmax(-1)

    right = total = 0
    for batch in evaluation_batches(source, backbone.preprocessing, batch_size):
        hits = np.asarray(predict(state, batch["image"])) == batch["label"]
        right += int(hits[batch["valid"]].sum())
        total += int(batch["valid"].sum())
    return right / total

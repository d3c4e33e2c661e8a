"""A training run from its configuration to its checkpoints."""

import dataclasses
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from tensorboardX import SummaryWriter
from tqdm import tqdm

from ttame_jax.attention import AttentionMechanism
from ttame_jax.backbones import Backbone, load_backbone
from ttame_jax.data import Source, evaluation_batches, load_source, train_batches
from ttame_jax.files import write_atomically
from ttame_jax.metrics.ad_ic import PERCENTAGES, average_drop, increase_in_confidence
from ttame_jax.training.checkpoints import Checkpoints
from ttame_jax.training.config import CONFIG_FILE, TrainConfig, load_config
from ttame_jax.training.optimizer import OneCycle, one_cycle_sgd
from ttame_jax.training.step import (
    TrainState,
    data_mesh,
    initial_state,
    make_measure_step,
    make_train_step,
    replicate,
    shard_batch,
)


def build_backbone(config: TrainConfig) -> Backbone:
    """The run's frozen classifier."""
    return load_backbone(
        config.backbone,
        config.weights,
        dtype=jnp.dtype(config.precision),
        **config.backbone_config,
    )


def build_attention(config: TrainConfig, backbone: Backbone) -> AttentionMechanism:
    """The run's attention mechanism before training."""
    return AttentionMechanism(
        [channels for _, _, channels in backbone.feature_shapes()],
        backbone.num_classes,
        variant=config.variant,
        dtype=jnp.dtype(config.precision),
        rngs=nnx.Rngs(config.seed),
    )


def train(config: TrainConfig) -> None:
    """Trains an attention mechanism, or resumes the run in ``config.output``.

    Writes ``config.json``, ``metrics.jsonl``, ``validation.jsonl``, TensorBoard events and
    ``checkpoints/`` there. SIGTERM saves a checkpoint and returns.

    Raises:
      ValueError: if the folder holds a run of another configuration, or the batch does not
        divide over the devices.
      FileNotFoundError: if weights or images are missing; the message says what brings them.
    """
    Run(config).train()


class Run:
    """All that a run needs, built and checked before the first step."""

    def __init__(self, config: TrainConfig):
        _check(config)
        self.config = config
        self.mesh = data_mesh()
        self.source = load_source(config.dataset, config.train_split, config.data_dir)
        self.steps_per_epoch = len(self.source) // config.batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"{config.dataset} has {len(self.source)} images, less than one batch: "
                f"lower --batch-size to at most that"
            )
        self.total_steps = config.epochs * self.steps_per_epoch
        self.backbone = build_backbone(config)
        self.attention = build_attention(config, self.backbone)
        self.cycle = OneCycle(config.learning_rate, self.total_steps)
        self.optimizer = one_cycle_sgd(self.cycle)
        self.masking = config.masking or self.backbone.masking
        self.backbone_state = replicate(nnx.state(self.backbone), self.mesh)
        self.validation = Validation(config, self.backbone, self.attention, self.mesh)

    def train(self) -> None:
        config = self.config
        step_fn = make_train_step(
            self.backbone, self.attention, self.optimizer, self.mesh, self.masking, config.loss
        )
        batches = train_batches(
            self.source,
            self.backbone.preprocessing,
            config.batch_size,
            seed=config.seed,
            workers=config.workers,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        state = replicate(initial_state(self.attention, self.optimizer), self.mesh)
        with Checkpoints(config.output) as checkpoints, stop_on_sigterm() as stopping:
            state = checkpoints.restore(state, batches)
            first = int(state.step)
            config.save()
            self._announce(first)
            with Log(config.output, first, self.total_steps) as log:
                for step in range(first + 1, self.total_steps + 1):
                    images = shard_batch(next(batches)["image"], self.mesh)
                    state, metrics = step_fn(state, self.backbone_state, images)
                    if step % config.log_every == 0 or step == self.total_steps:
                        rate = self.cycle.learning_rate(step - 1)
                        log.write(step, {**metrics, "learning_rate": rate}, config.batch_size)
                    log.advance()
                    self._save(step, state, batches, checkpoints, log, stopping)
                    if stopping.is_set():
                        log.say(f"stopped at step {step}: the same command resumes there")
                        return
            log.say(f"done: ttame explain IMAGE --run {config.output} --output DIR")

    def _save(self, step, state, batches, checkpoints, log, stopping) -> None:
        measured = None
        if step % self.steps_per_epoch == 0 and self.validation.indices is not None:
            epoch = step // self.steps_per_epoch
            measured = self.validation.measure(self.backbone_state, state)
            log.write_validation(step, epoch, measured)
        elif (
            step % self.steps_per_epoch
            and step % self.config.checkpoint_every
            and not stopping.is_set()
        ):
            return
        checkpoints.save(state, batches, measured)

    def _announce(self, first: int) -> None:
        devices = jax.devices()
        trained = sum(p.size for p in jax.tree.leaves(nnx.state(self.attention, nnx.Param)))
        start = f"resuming after step {first}" if first else "starting"
        _say(
            f"{start}: {len(devices)} x {devices[0].device_kind}, {self.backbone.name} frozen, "
            f"{trained:,} parameters trained, {len(self.source):,} images, "
            f"{self.total_steps:,} steps of {self.config.batch_size}"
        )


class Validation:
    """AD and IC of the maps on part of the validation split, as they are after an epoch."""

    def __init__(self, config: TrainConfig, backbone: Backbone, attention, mesh):
        self.indices = None
        if config.validation_images:
            self.source = load_source(
                config.dataset, config.validation_split, config.data_dir
            )
            self.indices = spread(len(self.source), config.validation_images)
        self.config, self.mesh, self.preprocessing = config, mesh, backbone.preprocessing
        masking = config.masking or backbone.masking
        self._measure = make_measure_step(backbone, attention, mesh, masking)

    def measure(self, backbone_state, state: TrainState) -> dict[str, float]:
        """``{"AD_100": ..., "IC_15": ...}`` in %."""
        attention_state = nnx.merge_state(state.params, state.batch_stats)
        confidences, masked = [], []
        for batch in self._batches():
            result = self._measure(
                backbone_state, attention_state, shard_batch(batch["image"], self.mesh)
            )
            valid = shard_batch(batch["valid"], self.mesh)
            psi, psi_masked, valid = multihost_utils.process_allgather(
                (*result, valid), tiled=True
            )
            confidences.append(psi[valid])
            masked.append(psi_masked[valid])
        confidences, masked = np.concatenate(confidences), np.concatenate(masked)
        drops = average_drop(confidences, masked)
        increases = increase_in_confidence(confidences, masked)
        named = zip(PERCENTAGES, drops, increases)
        return {
            name: float(value)
            for percent, drop, increase in named
            for name, value in ((f"AD_{percent}", drop), (f"IC_{percent}", increase))
        }

    def _batches(self) -> Iterator[dict[str, np.ndarray]]:
        return evaluation_batches(
            self.source,
            self.preprocessing,
            self.config.batch_size,
            indices=self.indices,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )


def spread(total: int, wanted: int) -> np.ndarray:
    """At most `wanted` indices, evenly spread over `total`."""
    return np.unique(np.linspace(0, total - 1, min(wanted, total)).astype(int))


def _check(config: TrainConfig) -> None:
    if config.batch_size % jax.device_count():
        raise ValueError(
            f"--batch-size {config.batch_size} does not divide over {jax.device_count()} devices"
        )
    if not (config.output / CONFIG_FILE).is_file():
        return
    before = load_config(config.output)
    changed = [
        f"--{field.name.replace('_', '-')} was {getattr(before, field.name)}"
        for field in dataclasses.fields(config)
        if field.name != "output" and getattr(before, field.name) != getattr(config, field.name)
    ]
    if changed:
        raise ValueError(
            f"{config.output} holds a run of other settings ({'; '.join(changed)}): "
            "resume it with those, or choose another --output"
        )


@contextmanager
def stop_on_sigterm():
    """An event that SIGTERM (preemption) sets; the handler before is put back at the end."""
    event = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(line: str) -> None:
    if jax.process_index() == 0:
        tqdm.write(line, file=sys.stderr)


class Log:
    """A progress bar, ``metrics.jsonl``, ``validation.jsonl`` and TensorBoard events."""

    def __init__(self, folder: Path, first: int, total: int):
        self.metrics, self.validation = folder / "metrics.jsonl", folder / "validation.jsonl"
        for path in (self.metrics, self.validation):
            _drop_lines_after(path, first)
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first)
        self.bar = tqdm(initial=first, total=total, unit="step", dynamic_ncols=True)
        self._since, self._last = time.perf_counter(), first

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()
        self.writer.close()

    def advance(self) -> None:
        self.bar.update()

    def write(self, step: int, metrics: dict[str, jax.Array], batch_size: int) -> None:
        values = {name: float(value) for name, value in metrics.items()}  # waits for the step
        now = time.perf_counter()
        values["images_per_second"] = (step - self._last) * batch_size / (now - self._since)
        self._since, self._last = now, step
        self.bar.set_postfix(loss=f"{values['loss']:.3f}", rate=f"{values['learning_rate']:.1e}")
        self._append(self.metrics, step, values)

    def write_validation(self, step: int, epoch: int, values: dict[str, float]) -> None:
        table = ", ".join(f"{name} {value:.1f}" for name, value in values.items())
        self.say(f"epoch {epoch}: {table}")
        self._append(self.validation, step, {"epoch": epoch, **values})
        self._since, self._last = time.perf_counter(), step

    def say(self, line: str) -> None:
        _say(line)

    def _append(self, path: Path, step: int, values: dict[str, float]) -> None:
        with path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self.writer.add_scalar(f"{path.stem}/{name}", value, step)
        self.writer.flush()


def _drop_lines_after(path: Path, step: int) -> None:
    """Forgets what was logged after the checkpoint that a run resumes from."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
        write_atomically(path, "".join(line + "\n" for line in lines))

"""A training run from its configuration to its checkpoints."""

import contextlib
import dataclasses
import signal
import threading

import jax
from flax import nnx

from ttame_jax.data import Batches, load_source, select, train_batches
from ttame_jax.mesh import data_mesh, replicate, shard_batch
from ttame_jax.methods import TTAME
from ttame_jax.metrics.evaluation import Evaluator, summarise
from ttame_jax.training.checkpoints import Checkpoints
from ttame_jax.training.config import CONFIG_FILE, TrainConfig, load_config
from ttame_jax.training.log import Log, say
from ttame_jax.training.models import build_attention, build_backbone
from ttame_jax.training.optimizer import OneCycle, one_cycle_sgd
from ttame_jax.training.step import TrainState, initial_state, make_train_step


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
        self.backbone = build_backbone(config)
        self.attention = build_attention(config, self.backbone)
        self.source = load_source(config.dataset, config.train_split, config.data_dir)
        self.steps_per_epoch = len(self.source) // config.batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"{config.dataset} has {len(self.source)} images, less than one batch: "
                f"lower --batch-size to at most that"
            )
        self.total_steps = config.epochs * self.steps_per_epoch
        self.cycle = OneCycle(config.learning_rate, self.total_steps)
        self.optimizer = one_cycle_sgd(self.cycle)
        self.masking = config.masking or self.backbone.masking
        self.backbone_state = replicate(nnx.state(self.backbone), self.mesh)
        self.validation = None
        if config.validation_images:
            source = load_source(config.dataset, config.validation_split, config.data_dir)
            self.validation = Evaluator(
                TTAME(self.backbone, self.attention),
                source,
                masking=self.masking,
                indices=select(source, config.validation_list, config.validation_images),
                batch_size=config.batch_size,
            )

    def train(self) -> None:
        """Runs all steps that are left, or those until SIGTERM."""
        config = self.config
        step_fn = make_train_step(
            self.backbone, self.attention, self.optimizer, self.mesh, self.masking, config.loss
        )
        state = replicate(initial_state(self.attention, self.optimizer), self.mesh)
        with (
            contextlib.closing(self._batches()) as batches,
            Checkpoints(config.output) as checkpoints,
            stop_on_sigterm() as stopping,
        ):
            state = checkpoints.restore(state, batches)
            first = int(state.step)
            config.save()
            self._announce(first)
            with Log(config.output, first, self.total_steps) as log:
                for step in range(first + 1, self.total_steps + 1):
                    images = shard_batch(next(batches)["image"], self.mesh)
                    state, metrics = step_fn(state, self.backbone_state, images)
                    log.advance()
                    if step % config.log_every == 0 or step == self.total_steps:
                        rate = self.cycle.learning_rate(step - 1)
                        log.write(step, {**metrics, "learning_rate": rate}, config.batch_size)
                    if step % self.steps_per_epoch == 0:
                        checkpoints.save(state, batches, self._measure(step, state, log))
                    elif step % config.checkpoint_every == 0 or stopping.is_set():
                        checkpoints.save(state, batches)
                    if stopping.is_set():
                        return say(f"stopped after step {step}: the same command resumes there")
            say(f"done: ttame explain IMAGE --run {config.output} --output DIR")

    def _batches(self) -> Batches:
        return train_batches(
            self.source,
            self.backbone.preprocessing,
            self.config.batch_size // jax.process_count(),
            seed=self.config.seed,
            flip=self.config.flip,
            workers=self.config.workers,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def _measure(self, step: int, state: TrainState, log: Log) -> dict[str, float] | None:
        if self.validation is None:
            return None
        attention_state = nnx.merge_state(state.params, state.batch_stats)
        rows = self.validation(
            nnx.State({"backbone": self.backbone_state, "attention": attention_state})
        )
        summary = summarise(rows, self.validation.measures)
        measured = {
            f"{name}_{percent}": value
            for name, values in summary.items()
            for percent, value in values.items()
        }
        log.write_validation(step, step // self.steps_per_epoch, measured)
        return measured

    def _announce(self, first: int) -> None:
        devices = jax.devices()
        trained = sum(p.size for p in jax.tree.leaves(nnx.state(self.attention, nnx.Param)))
        start = f"resuming after step {first}" if first else "starting"
        say(
            f"{start}: {len(devices)} x {devices[0].device_kind}, {self.backbone.name} frozen, "
            f"{trained:,} parameters trained, {len(self.source):,} images, "
            f"{self.total_steps:,} steps of {self.config.batch_size}"
        )


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


@contextlib.contextmanager
def stop_on_sigterm():
    """An event that SIGTERM (preemption) sets; the handler before is put back at the end."""
    event = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)

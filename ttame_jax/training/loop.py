"""A training run from its configuration to its checkpoints."""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils

from ttame_jax.data import Batches, load_source, select, train_batches
from ttame_jax.mesh import check_batch_size, data_mesh, replicate
from ttame_jax.methods import TTAME
from ttame_jax.metrics.evaluation import Evaluator, summarise
from ttame_jax.training.checkpoints import Checkpoints
from ttame_jax.training.config import CONFIG_FILE, TrainConfig, load_config
from ttame_jax.training.feed import Feed
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
        cycle = OneCycle(config.learning_rate, self.total_steps)
        self.learning_rate = jax.jit(cycle.learning_rate)
        self.optimizer = one_cycle_sgd(cycle)
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
            self.backbone,
            self.attention,
            self.optimizer,
            self.mesh,
            self.masking,
            config.loss,
            synchronise=config.synchronise,
        )
        state = replicate(initial_state(self.attention, self.optimizer), self.mesh)
        with (
            contextlib.closing(self._batches()) as batches,
            Checkpoints(config.output) as checkpoints,
            preemption() as preempted,
        ):
            state, place = checkpoints.restore(state)
            if place is not None:
                batches.set_state(place)
            first, metrics = int(state.step), None
            if jax.process_index() == 0:
                config.save()
            self._announce(first)
            with (
                Feed(batches, self.mesh) as feed,
                Log(config.output, first, self.total_steps, feed) as log,
            ):
                for step in range(first + 1, self.total_steps + 1):
                    images = feed.take(running=metrics)
                    state, metrics = step_fn(state, self.backbone_state, images)
                    log.advance()
                    if step % config.log_every == 0 or step == self.total_steps:
                        rate = self.learning_rate(step - 1)
                        log.write(step, {**metrics, "learning_rate": rate}, config.batch_size)
                    stop = preempted(step)
                    if step % self.steps_per_epoch == 0:
                        checkpoints.save(state, feed.state, self._measure(step, state, log))
                    elif step % config.checkpoint_every == 0 or stop:
                        checkpoints.save(state, feed.state)
                    if stop:
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
    check_batch_size(config.batch_size)
    if not (epath.Path(config.output) / CONFIG_FILE).is_file():
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
def preemption() -> Iterator[Callable[[int], bool]]:
    """Whether to stop after a step, to be asked after each: SIGTERM has come.

    Of several processes any one may get it, and all stop after the same step: JAX's preemption
    service, which listens for the signal then, has them agree.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    event = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield lambda step: event.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)

"""A training run, from its configuration to its checkpoints."""

import contextlib
import dataclasses
import functools
import math
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ttame_jax import labels
from ttame_jax.config import CONFIG_FILE, TrainConfig, resolved
from ttame_jax.data import load_source
from ttame_jax.data.loader import Batches, train_batches
from ttame_jax.errors import Failure
from ttame_jax.files import LEAST_SPACE, check_output_folder, locked, write_atomically
from ttame_jax.mesh import AXIS, check_batch_size, data_mesh, replicate
from ttame_jax.runs import build_attention, build_backbone, load_config, load_inputs
from ttame_jax.training.batch_size import largest_batch
from ttame_jax.training.checkpoints import Checkpoints
from ttame_jax.training.feature_scale import measure_feature_scale
from ttame_jax.training.feed import Feed
from ttame_jax.training.log import Log, Validation, say
from ttame_jax.training.optimizer import OneCycle, one_cycle_sgd
from ttame_jax.training.step import TrainState, initial_state, make_train_step
from ttame_jax.weights.transfer import digest

Validate = Callable[[TrainState], Validation]
"""Validates a state. ``AD_15`` and ``IC_15`` are among its metrics."""


_optimizer = functools.lru_cache(maxsize=8)(one_cycle_sgd)
"""Plans of the same cycle share their optimizer, and therefore their step."""


PATIENCE = 3
"""Logged losses in a row that may be infinite or NaN before a run counts as diverged."""


UNRELATED = frozenset({"output", "workers", "log_every", "checkpoint_every"})
"""Settings that a resumed run may change, since no result depends on them."""


CHECKPOINTS_SPACE = 8
"""Space that checkpoints need, as a multiple of the attention mechanism: the last two, the best and
the next one, each with the optimizer's momentum."""


class Diverged(Failure):
    """Training has diverged: the loss or the parameters are no longer finite."""


class Plan(NamedTuple):
    """What follows from the batch size."""

    steps_per_epoch: int
    total_steps: int
    cycle: OneCycle
    optimizer: optax.GradientTransformation
    step: jax.stages.Wrapped  # compiled at its first call


class Trainer:
    """Everything that a run needs, built and checked before the first step.

    Args:
      config: of the run.

    Raises:
      ValueError: the folder holds a run of another configuration, or the batch does not divide
        over the devices.
      FileNotFoundError: weights or images are missing; the message tells how to get them.
    """

    def __init__(self, config: TrainConfig):
        check_output_folder(config.output)
        self.config = config = settle(config)
        self.mesh = data_mesh()
        self.backbone = build_backbone(config)
        self.attention = build_attention(config, self.backbone)
        size = sum(x.nbytes for x in jax.tree.leaves(nnx.state(self.attention)))
        check_output_folder(config.output, LEAST_SPACE + CHECKPOINTS_SPACE * size)
        self.masking = config.masking or self.backbone.masking
        self.backbone_state = replicate(nnx.state(self.backbone), self.mesh)
        self.source = load_source(
            config.dataset, config.train_split, config.data_dir, config.max_pixels
        )
        self.inputs = {"weights": digest(self.backbone), "images": self.source.fingerprint}
        _check_inputs(config, self.inputs)
        batch_size = config.batch_size
        if batch_size == "auto":
            batch_size = largest_batch(self._compiled_step, len(self.source))
            self.config = dataclasses.replace(config, batch_size=batch_size)
        self.batch_size = batch_size
        self.plan = self._plan(batch_size)

    def train(self, validate: Validate | None = None) -> bool:
        """Runs all remaining steps, or those until SIGTERM or Ctrl-C, which save a checkpoint.

        Writes ``config.json``, ``metrics.jsonl``, ``validation.jsonl``, TensorBoard events and
        ``checkpoints/`` into the run's folder.

        Args:
          validate: called before the first step and after each epoch; None disables validation.

        Returns:
          Whether the run is finished.

        Raises:
          Diverged: the loss or the parameters are no longer finite. They are not saved.
          Failure: another process writes to the run's folder.
          KeyboardInterrupt: Ctrl-C, after the checkpoint; at once if it is pressed twice.
        """
        config, plan = self.config, self.plan
        learning_rate = jax.jit(plan.cycle.learning_rate)
        with (
            contextlib.closing(self._batches()) as batches,
            locked(config.output),
            Checkpoints(config) as checkpoints,
            preemption() as preempted,
        ):
            state = self._start(batches, checkpoints)
            first, metrics = int(state.step), None
            with (
                Feed(batches, self.mesh) as feed,
                Log(config.output, first, plan.total_steps, feed) as log,
            ):
                if first == 0 and validate:
                    log.write_validation(0, 0, validate(state))
                infinite = 0  # logged losses in a row
                for step in range(first + 1, plan.total_steps + 1):
                    images = feed.take(running=metrics)
                    state, metrics = plan.step(state, self.backbone_state, images)
                    log.advance()
                    if step % config.log_every == 0 or step == plan.total_steps:
                        rate = learning_rate(step - 1)
                        log.write(step, {**metrics, "learning_rate": rate}, self.batch_size)
                        infinite = 0 if math.isfinite(metrics["loss"]) else infinite + 1
                    stop = preempted(step)
                    epoch_ends = step % plan.steps_per_epoch == 0
                    saves = epoch_ends or step % config.checkpoint_every == 0 or stop
                    if infinite == PATIENCE or (saves and not _all_finite(state)):
                        raise self._diverged(step, learning_rate(step - 1), checkpoints.latest)
                    if epoch_ends:
                        validation = validate(state) if validate else None
                        if validation:
                            log.write_validation(step, step // plan.steps_per_epoch, validation)
                        metrics_saved = validation.metrics if validation else None
                        checkpoints.save(state, feed.state, metrics_saved)
                    elif saves:
                        checkpoints.save(state, feed.state)
                    if stop:
                        say(f"stopped after step {step}: the same command resumes there")
                        return step == plan.total_steps
            say(f"done: ttame explain IMAGE --run {config.output} --output DIR")
        return True

    def _start(self, batches: Batches, checkpoints: Checkpoints) -> TrainState:
        """The state to begin with, restored or new. Sets the batches' position, too."""
        settle(self.config)  # another process may have written since the first check
        _check_inputs(self.config, self.inputs)
        state, position = checkpoints.restore(self._initial_state(self.plan))
        if position is not None:
            batches.set_state(position)
        elif self.config.scale_features:
            state = self._scaled_state(self.plan)
        if jax.process_index() == 0:
            self.config.save(inputs=self.inputs)
            if position is None:  # later the user may have edited them
                self._save_class_names()
        self._announce(int(state.step))
        return state

    def _save_class_names(self) -> None:
        """Saves the backbone's class names, or the data set's if their number fits."""
        names = self.backbone.architecture.class_names or self.source.class_names
        if names and len(names) == self.backbone.num_classes:
            text = "".join(f"{name}\n" for name in labels.readable(names))
            write_atomically(self.config.output / labels.FILE, text)

    def _diverged(self, step: int, rate: jax.Array, saved: int | None) -> Diverged:
        last = f"the last good checkpoint is of step {saved}" if saved else "nothing was saved"
        return Diverged(
            f"training diverged: at step {step}, with a learning rate of {float(rate):.2g}, the loss "
            f"or the parameters are not finite; {last}. Choose a lower --learning-rate and another "
            "--output"
        )

    def _plan(self, batch_size: int) -> Plan:
        config = self.config
        steps_per_epoch = count_steps(config, len(self.source), batch_size)
        total_steps = config.epochs * steps_per_epoch
        cycle = OneCycle(config.peak_learning_rate(batch_size), total_steps)
        optimizer = _optimizer(cycle)
        step = make_train_step(
            self.backbone,
            self.attention,
            optimizer,
            self.mesh,
            self.masking,
            config.loss,
            synchronise=config.synchronise,
        )
        return Plan(steps_per_epoch, total_steps, cycle, optimizer, step)

    def _initial_state(self, plan: Plan) -> TrainState:
        return replicate(initial_state(self.attention, plan.optimizer), self.mesh)

    def _scaled_state(self, plan: Plan) -> TrainState:
        """The initial state with the scale of the feature maps."""
        with contextlib.closing(self._batches()) as batches:
            scale = measure_feature_scale(
                self.backbone,
                self.backbone_state,
                self.mesh,
                batches,
                self.batch_size,
                self.attention.first_layer,
            )
        self.attention.feature_scale = nnx.BatchStat(jnp.asarray(scale))
        say(f"root mean squares of the feature maps: {', '.join(f'{x:.3g}' for x in scale)}")
        return self._initial_state(plan)

    def _compiled_step(self, batch_size: int) -> jax.stages.Compiled:
        """The compiled step for a batch size. JAX's cache keeps the program for training."""
        plan, side = self._plan(batch_size), self.backbone.preprocessing.image_size
        sharding = NamedSharding(self.mesh, P(AXIS))
        images = jax.ShapeDtypeStruct((batch_size, side, side, 3), jnp.uint8, sharding=sharding)
        state = self._initial_state(plan)
        return plan.step.lower(state, self.backbone_state, images).compile()

    def _batches(self) -> Batches:
        return train_batches(
            self.source,
            self.backbone.preprocessing,
            self.batch_size // jax.process_count(),
            seed=self.config.seed,
            flip=self.config.flip,
            workers=self.config.workers,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def _announce(self, first: int) -> None:
        devices = jax.devices()
        trained = sum(p.size for p in jax.tree.leaves(nnx.state(self.attention, nnx.Param)))
        start = f"resuming after step {first}" if first else "starting"
        say(
            f"{start}: {len(devices)} x {devices[0].device_kind}, {self.backbone.name} frozen, "
            f"{trained:,} trained parameters, {len(self.source):,} images, "
            f"{self.plan.total_steps:,} steps of {self.batch_size}, "
            f"peak rate {self.plan.cycle.peak:g}"
        )


def count_steps(config: TrainConfig, images: int, batch_size: int) -> int:
    """The steps of an epoch. The last images, less than a batch, are left out.

    Raises:
      ValueError: there are fewer images than a batch has.
    """
    if images < batch_size:
        raise ValueError(
            f"{config.dataset} has {images} images, less than one batch: "
            f"lower --batch-size to at most that"
        )
    return images // batch_size


@jax.jit
def _all_finite(state: TrainState) -> jax.Array:
    leaves = jax.tree.leaves((state.params, state.batch_stats))
    return jnp.array([jnp.isfinite(x).all() for x in leaves]).all()


def settle(config: TrainConfig) -> TrainConfig:
    """Checks a configuration against the run in its folder, and adopts that run's batch size if
    the configuration says auto.

    Raises:
      ValueError: the folder holds a run of another configuration, or the batch does not divide
        over the devices.
    """
    if (epath.Path(config.output) / CONFIG_FILE).is_file():
        before = load_config(config.output)
        if config.batch_size == "auto":
            config = dataclasses.replace(config, batch_size=before.batch_size)
        _check_same(before, config)
    if config.batch_size != "auto":
        check_batch_size(config.batch_size)
    return config


def _check_same(before: TrainConfig, config: TrainConfig) -> None:
    free = UNRELATED
    if load_inputs(config.output):  # what is read is compared itself, and may have moved
        free = free | {"weights", "data_dir"}
    old, new = resolved(before), resolved(config)
    changed = [
        f"--{field.name.replace('_', '-')} was {getattr(before, field.name)}"
        for field in dataclasses.fields(config)
        if field.name not in free and getattr(old, field.name) != getattr(new, field.name)
    ]
    if changed:
        raise ValueError(
            f"{config.output} holds a run with other settings ({'; '.join(changed)}): "
            "resume it with those, or choose another --output"
        )


def _check_inputs(config: TrainConfig, inputs: Mapping[str, str]) -> None:
    """Refuses to resume a run with other weights or images than it has been trained with."""
    if not (epath.Path(config.output) / CONFIG_FILE).is_file():
        return
    changed = [
        f"its {name} were {before}, now {inputs[name]}"
        for name, before in load_inputs(config.output).items()
        if before != inputs[name]
    ]
    if changed:
        raise ValueError(
            f"{config.output} was trained with other inputs ({'; '.join(changed)}): restore them, "
            "or choose another --output"
        )


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[int], bool]]:
    """Yields a function that tells after each step whether a signal has asked to stop.

    The signals are SIGTERM and, in a run of a single process, SIGINT (Ctrl-C). After SIGINT the
    context manager raises KeyboardInterrupt at its end; a second SIGINT raises it at once.

    Of several processes any one may receive SIGTERM. JAX's preemption service, which then listens
    for it, makes all of them stop after the same step.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    received = []

    def stop(number, frame):
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda step: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if signal.SIGINT in received:
        raise KeyboardInterrupt

"""Orbax checkpoints of a run in training: the last ones, and the best by AD and IC at 15 %."""

from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

from ttame_jax.config import TrainConfig
from ttame_jax.files import absolute, check_space
from ttame_jax.runs import (
    CHECKPOINT_FOLDER,
    attention_item,
    check_architecture,
    check_digest,
    digests_of,
    first_intact,
    score,
)
from ttame_jax.training.step import TrainState

LAST_KEPT = 2
OVERHEAD = 2**20
"""Bytes that a checkpoint needs besides its arrays."""


class Checkpoints:
    """The checkpoints of a run, saved in the background. A context manager.

    Each checkpoint holds the attention mechanism, the optimizer's state and the position in the
    data as separate items, so that explaining reads only the first. All processes save and restore
    together. A checkpoint can be restored with another number of processes.
    """

    def __init__(self, config: TrainConfig):
        self._config = config
        self._manager = ocp.CheckpointManager(
            absolute(config.output / CHECKPOINT_FOLDER),
            options=ocp.CheckpointManagerOptions(
                best_fn=score,
                cleanup_tmp_directories=True,
                preservation_policy=policy.AnyPreservationPolicy(
                    [
                        policy.LatestN(LAST_KEPT),
                        policy.BestN(
                            get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False
                        ),
                    ]
                ),
            ),
        )

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        # Waits for pending writes, which finish only if no other process has failed.
        if error is None or jax.process_count() == 1:
            self._manager.close()

    def save(
        self,
        state: TrainState,
        data: Mapping[str, int],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Saves the state and the position in the data, unless this step is saved already.

        Raises:
          OSError: too little space is left.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = {**_arrays(state), "data": dict(data)}
        check_space(self._manager.directory / str(step), OVERHEAD + _size(items))
        arguments = ocp.args.Composite(
            attention=ocp.args.StandardSave(items["attention"]),
            optimizer=ocp.args.StandardSave(items["optimizer"]),
            data=ocp.args.JsonSave(items["data"]),
            digests=ocp.args.JsonSave(digests_of(items, self._config)),
        )
        self._manager.save(step, args=arguments, metrics=metrics)

    @property
    def latest(self) -> int | None:
        """The step of the last checkpoint."""
        return self._manager.latest_step()

    def restore(self, state: TrainState) -> tuple[TrainState, dict[str, int] | None]:
        """Restores the last checkpoint: its state on the given state's devices, and its position.

        If the last checkpoints are damaged, a message is printed, they are deleted and the last
        intact one is restored. Returns the given state and None if there is no checkpoint.

        Raises:
          ValueError: the checkpoint comes from another program (`ttame_jax.runs.save_attention`),
            or all checkpoints are damaged.
          Failure: see `ttame_jax.runs.check_architecture`.
        """
        if self.latest is None:
            return state, None
        folder = self._manager.directory
        if not (folder / str(self.latest) / "optimizer").exists():
            raise ValueError(
                f"{folder.parent} was imported from another program's checkpoint. "
                "It can be explained with and evaluated, but not trained further: choose another "
                "--output"
            )
        steps = sorted(self._manager.all_steps(), reverse=True)
        check_architecture(folder, steps, self._config)
        intact, restored = first_intact(folder, steps, lambda step: self._restore(step, state))
        for step in steps:
            if step > intact:  # Orbax saves no step before its last one
                self._manager.delete(step)
        state = TrainState(
            restored.optimizer["step"],
            restored.attention["params"],
            restored.attention["batch_stats"],
            restored.optimizer["state"],
        )
        return state, restored.data

    def _restore(self, step: int, state: TrainState) -> Any:
        like = _arrays(state)
        restored: Any = self._manager.restore(
            step,
            args=ocp.args.Composite(
                attention=ocp.args.StandardRestore(like["attention"]),
                optimizer=ocp.args.StandardRestore(like["optimizer"]),
                data=ocp.args.JsonRestore(),
            ),
        )
        for name in (*like, "data"):
            check_digest(self._manager.directory / str(step), name, restored[name])
        return restored


def _size(items: Mapping[str, Any]) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(items) if isinstance(leaf, jax.Array))


def _arrays(state: TrainState) -> dict[str, Any]:
    """The items of a checkpoint that hold arrays."""
    return {
        "attention": attention_item(state.params, state.batch_stats),
        "optimizer": {"step": state.step, "state": state.opt_state},
    }

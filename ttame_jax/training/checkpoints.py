"""Orbax checkpoints of a run: the last ones and the best one by AD and IC at 15 %."""

import math
from collections.abc import Mapping
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

from ttame_jax.attention import AttentionMechanism
from ttame_jax.files import absolute
from ttame_jax.training.step import TrainState

CHECKPOINT_FOLDER = "checkpoints"
LAST_KEPT = 2


def score(metrics: Mapping[str, float]) -> float:
    """What makes a checkpoint the best: high IC(15 %) and low AD(15 %), by their difference.

    Minus infinity where training diverged.
    """
    difference = metrics["IC_15"] - metrics["AD_15"]
    return difference if math.isfinite(difference) else -math.inf


class Checkpoints:
    """The checkpoints of a run, saved in the background; a context manager.

    Each holds the attention mechanism, the optimizer's state and the place in the data, as
    separate items, so that explaining reads only the first. All processes save and restore
    together, and any number of them restores what another number has saved.
    """

    def __init__(self, run_dir: Path):
        self._manager = ocp.CheckpointManager(
            absolute(run_dir / CHECKPOINT_FOLDER),
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
        # Waits for what is being written, which ends only if no other process has failed.
        if error is None or jax.process_count() == 1:
            self._manager.close()

    def save(
        self,
        state: TrainState,
        data: Mapping[str, int],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Saves the state and the place in the data, unless this step is saved already."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            attention=ocp.args.StandardSave(_attention_item(state.params, state.batch_stats)),
            optimizer=ocp.args.StandardSave({"step": state.step, "state": state.opt_state}),
            data=ocp.args.JsonSave(dict(data)),
        )
        self._manager.save(step, args=items, metrics=metrics)

    def restore(self, state: TrainState) -> tuple[TrainState, dict[str, int] | None]:
        """The last checkpoint's state, on the given one's devices, and its place in the data.

        Without a checkpoint it is the given one, and None.

        Raises:
          ValueError: the checkpoint comes from elsewhere (`save_attention`).
        """
        step = self._manager.latest_step()
        if step is None:
            return state, None
        if not (self._manager.directory / str(step) / "optimizer").exists():
            raise ValueError(
                f"{self._manager.directory.parent} was made from another program's checkpoint, "
                "which can be explained with and evaluated but not trained on: choose another "
                "--output"
            )
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                attention=ocp.args.StandardRestore(
                    _attention_item(state.params, state.batch_stats)
                ),
                optimizer=ocp.args.StandardRestore({"step": state.step, "state": state.opt_state}),
                data=ocp.args.JsonRestore(),
            ),
        )
        state = TrainState(
            restored.optimizer["step"],
            restored.attention["params"],
            restored.attention["batch_stats"],
            restored.optimizer["state"],
        )
        return state, restored.data


def _attention_item(params: nnx.State, batch_stats: nnx.State) -> dict[str, nnx.State]:
    return {"params": params, "batch_stats": batch_stats}


def save_attention(run_dir: Path, attention: AttentionMechanism, step: int) -> None:
    """Saves a mechanism from elsewhere as a run's one checkpoint: to explain with, not to resume.

    Args:
      run_dir: the run's folder.
      attention: with its parameters and statistics.
      step: how many training steps it has had.
    """
    _, params, batch_stats = nnx.split(attention, nnx.Param, nnx.BatchStat)
    item = ocp.args.StandardSave(_attention_item(params, batch_stats))
    with ocp.CheckpointManager(absolute(run_dir / CHECKPOINT_FOLDER)) as manager:
        manager.save(step, args=ocp.args.Composite(attention=item))


def load_attention(run_dir: str | Path, attention: AttentionMechanism) -> int:
    """Fills the mechanism from the run's best checkpoint, its last where none was measured.

    Returns:
      The checkpoint's step.

    Raises:
      FileNotFoundError: if the run has no checkpoint yet.
    """
    folder = absolute(epath.Path(run_dir) / CHECKPOINT_FOLDER)
    missing = FileNotFoundError(f"{run_dir} has no checkpoint yet: train it with ttame train")
    if not folder.is_dir():
        raise missing
    _, params, batch_stats = nnx.split(attention, nnx.Param, nnx.BatchStat)
    options = ocp.CheckpointManagerOptions(best_fn=score, read_only=True)
    with ocp.CheckpointManager(folder, options=options) as manager:
        step = manager.best_step()
        if step is None:
            step = manager.latest_step()
        if step is None:
            raise missing
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, _attention_item(params, batch_stats))
        items = ocp.args.Composite(attention=ocp.args.StandardRestore(shapes))
        restored = manager.restore(step, args=items).attention
    nnx.update(attention, restored["params"], restored["batch_stats"])
    return step

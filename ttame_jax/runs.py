"""A run on disk: its configuration, backbone, attention mechanism and best checkpoint."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx

from ttame_jax.attention import AttentionMechanism
from ttame_jax.backbones import Backbone
from ttame_jax.config import CONFIG_FILE, TrainConfig
from ttame_jax.explainer import Explainer
from ttame_jax.files import absolute
from ttame_jax.losses import LossConfig
from ttame_jax.methods import load_method
from ttame_jax.weights import load_backbone

CHECKPOINT_FOLDER = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run, at its best checkpoint.

    Attributes:
      config: the configuration.
      backbone: the frozen classifier.
      attention: the trained attention mechanism.
      step: number of training steps of the checkpoint.
    """

    config: TrainConfig
    backbone: Backbone
    attention: AttentionMechanism
    step: int


def load_run(run_dir: str | Path, weights: str | None = None) -> Run:
    """Loads a run at its best checkpoint, or at its last one if none was validated.

    Args:
      run_dir: the run's ``--output`` folder.
      weights: of the backbone, if they are no longer where the run found them.

    Raises:
      FileNotFoundError: the folder is not a run, or has no checkpoint yet.
    """
    config = load_config(run_dir)
    if weights is not None:
        config = dataclasses.replace(config, weights=weights)
    backbone = build_backbone(config)
    attention = build_attention(config, backbone)
    return Run(config, backbone, attention, load_attention(run_dir, attention))


def load_explainer(
    run_dir: str | Path, weights: str | None = None, method: str | None = None
) -> Explainer:
    """Loads the explainer that a training run produced, at its best checkpoint.

    Args:
      run_dir: the run's ``--output`` folder.
      weights: of the backbone, if they are no longer where the run found them.
      method: another method to explain the run's backbone with, one of
        `ttame_jax.methods.list_methods()`.

    Raises:
      FileNotFoundError: the folder is not a run, or has no checkpoint yet.
      ValueError: unknown method.
    """
    run = load_run(run_dir, weights)
    return Explainer(load_method(method or run.config.variant, run.backbone, run.attention))


def load_config(run_dir: str | Path) -> TrainConfig:
    """Reads the configuration of a run.

    Raises:
      FileNotFoundError: the folder has no ``config.json``.
    """
    path = epath.Path(run_dir) / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{run_dir} is not a run: {CONFIG_FILE} is missing; create one with ttame train"
        )
    fields = json.loads(path.read_text())
    fields["output"] = epath.Path(run_dir)
    fields["loss"] = LossConfig(**fields["loss"])
    if fields.get("validation_list") is not None:
        fields["validation_list"] = epath.Path(fields["validation_list"])
    return TrainConfig(**fields)


def build_backbone(config: TrainConfig) -> Backbone:
    """The frozen classifier of a run."""
    options: dict[str, Any] = config.backbone_config
    return load_backbone(
        config.backbone, config.weights, dtype=jnp.dtype(config.precision), **options
    )


def build_attention(config: TrainConfig, backbone: Backbone) -> AttentionMechanism:
    """The attention mechanism of a run before training.

    Raises:
      ValueError: ``start="head"`` for a classifier whose head does not read feature maps.
    """
    attention = AttentionMechanism(
        [channels for _, _, channels in backbone.feature_shapes()],
        backbone.num_classes,
        variant=config.variant,
        dtype=jnp.dtype(config.precision),
        rngs=nnx.Rngs(config.seed),
    )
    if config.start == "head":
        if backbone.class_weights is None:
            raise ValueError(
                f"--start head needs a classifier that averages its last feature map, which "
                f"{backbone.name} does not: use --start random"
            )
        attention.start_from_head(backbone.class_weights)
    return attention


def score(metrics: Mapping[str, float]) -> float:
    """The criterion for the best checkpoint: IC(15 %) - AD(15 %), higher is better.

    Minus infinity if training diverged.
    """
    difference = metrics["IC_15"] - metrics["AD_15"]
    return difference if math.isfinite(difference) else -math.inf


def attention_item(params: nnx.State, batch_stats: nnx.State) -> dict[str, nnx.State]:
    """The item of a checkpoint that holds the attention mechanism."""
    return {"params": params, "batch_stats": batch_stats}


def save_attention(run_dir: Path, attention: AttentionMechanism, step: int) -> None:
    """Saves a mechanism from another program as the only checkpoint of a run.

    The run can be explained with and evaluated, but not resumed.

    Args:
      run_dir: the run's folder.
      attention: with its parameters and statistics.
      step: the number of training steps it has had.
    """
    _, params, batch_stats = nnx.split(attention, nnx.Param, nnx.BatchStat)
    item = ocp.args.StandardSave(attention_item(params, batch_stats))
    with ocp.CheckpointManager(absolute(run_dir / CHECKPOINT_FOLDER)) as manager:
        manager.save(step, args=ocp.args.Composite(attention=item))


def load_attention(run_dir: str | Path, attention: AttentionMechanism) -> int:
    """Fills the mechanism from the run's best checkpoint, or its last one if none was validated.

    Returns:
      The checkpoint's step.

    Raises:
      FileNotFoundError: the run has no checkpoint yet.
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
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, attention_item(params, batch_stats))
        items = ocp.args.Composite(attention=ocp.args.StandardRestore(shapes))
        restored = manager.restore(step, args=items).attention
    nnx.update(attention, restored["params"], restored["batch_stats"])
    return step

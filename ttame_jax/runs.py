"""A run on disk: its configuration, backbone, attention mechanism and best checkpoint."""

import dataclasses
import json
import math
import operator
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from ttame_jax import labels
from ttame_jax.attention import AttentionMechanism
from ttame_jax.backbones import Backbone
from ttame_jax.checks import accepts
from ttame_jax.config import CONFIG_FILE, INPUTS, Precision, TrainConfig, located
from ttame_jax.errors import Damaged, Failure, no_word_of_closed_loops, only_errors_logged
from ttame_jax.explainer import Explainer
from ttame_jax.files import absolute, check_bucket, digest
from ttame_jax.losses import RECIPES, LossConfig
from ttame_jax.methods import load_method
from ttame_jax.weights import load_backbone, module_files
from ttame_jax.weights.backbones import parts_of, unmoved

CHECKPOINT_FOLDER = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained run, at its best checkpoint.

    Attributes:
      config: the configuration.
      backbone: the frozen classifier.
      attention: the trained attention mechanism. A scale of the feature maps is part of its weights.
      step: number of training steps of the checkpoint.
    """

    config: TrainConfig
    backbone: Backbone
    attention: AttentionMechanism
    step: int


def load_run(
    run_dir: str | Path, weights: str | None = None, precision: Precision | None = None
) -> Run:
    """Loads a run at its best checkpoint, or at its last one if none was validated.

    Args:
      run_dir: the run's ``--output`` folder.
      weights: of the backbone, if they are no longer where the run found them. Of a backbone that is
        a file or "hf:FOLDER", that name. It must be given for "FILE.py:FUNCTION", since its code is
        run.
      precision: of the computation; None is that of the training.

    Raises:
      FileNotFoundError: the folder is not a run, or has no checkpoint yet.
      Failure: the backbone is code, and is not given.
    """
    config = load_config(run_dir)
    if precision is not None:
        config = dataclasses.replace(config, precision=precision)
    parts = parts_of(config.backbone)
    if weights is not None and parts and weights.startswith(parts.prefix):
        config = dataclasses.replace(config, backbone=weights)
    elif weights is not None:
        config = dataclasses.replace(config, weights=weights)
    elif module_files.parse(config.backbone):
        raise Failure(
            f"the backbone of {run_dir} is code, which runs only if you name it: "
            f"--weights {config.backbone}"
        )
    backbone = build_backbone(config)
    attention = build_attention(config, backbone)
    step = load_attention(run_dir, attention)
    attention.fold_feature_scale()
    return Run(config, backbone, attention, step)


def load_explainer(
    run_dir: str | Path,
    weights: str | None = None,
    method: str | None = None,
    method_config: Mapping[str, float | str] | None = None,
    class_names: Sequence[str] | None = None,
) -> Explainer:
    """Loads the explainer that a training run produced, at its best checkpoint.

    Args:
      run_dir: the run's ``--output`` folder.
      weights: see `load_run`.
      method: another method to explain the run's backbone with, one of
        `ttame_jax.methods.list_methods()`.
      method_config: options of the method, as for `ttame_jax.load_method`.
      class_names: one for each class; None is those of the run.

    Raises:
      FileNotFoundError: the folder is not a run, or has no checkpoint yet.
      ValueError: unknown method, or not one name for each class.
    """
    run, options = load_run(run_dir, weights), dict[str, Any](method_config or {})
    loaded = load_method(method or run.config.variant, run.backbone, run.attention, **options)
    names = load_class_names(run_dir) if class_names is None else class_names
    return Explainer(loaded, names)


def load_class_names(run_dir: str | Path) -> tuple[str, ...] | None:
    """The class names of a run, or None if it has none."""
    path = epath.Path(run_dir) / labels.FILE
    return labels.read_names(path) if path.is_file() else None


def load_config(run_dir: str | Path) -> TrainConfig:
    """Reads the configuration of a run.

    Raises:
      FileNotFoundError: the folder has no ``config.json``.
      Damaged: the file is damaged, or has other fields than this version writes.
    """
    path = epath.Path(run_dir) / CONFIG_FILE
    check_bucket(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{run_dir} is not a run: {CONFIG_FILE} is missing; create one with ttame train"
        )
    try:
        fields = json.loads(path.read_text())
        for name in (INPUTS, "output"):
            fields.pop(name, None)
        loss = LossConfig(**_typed(fields.pop("loss"), LossConfig))
        listed = fields.pop("validation_list", None)
        built: dict[str, Any] = {
            "output": epath.Path(run_dir),
            "loss": loss,
            "validation_list": None if listed is None else epath.Path(listed),
        }
        return located(run_dir, TrainConfig(**_typed(fields, TrainConfig), **built))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Damaged(
            f"{path} is damaged, or was written by another version: "
            f"{type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error


def _typed(fields: dict[str, Any], kind: type) -> dict[str, Any]:
    """The fields, after checking that they have the types that a dataclass gives them."""
    hints = typing.get_type_hints(kind)
    for name, value in fields.items():
        if not accepts(hints[name], value):
            raise ValueError(f"{name} cannot be {value!r}")
    return fields


def load_inputs(run_dir: str | Path) -> dict[str, str]:
    """The fingerprints of what a run has read; empty for a run of an earlier version."""
    return json.loads((epath.Path(run_dir) / CONFIG_FILE).read_text()).get(INPUTS, {})


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
        scale_features=config.scale_features,
        sigmoid_maps=RECIPES[config.loss.recipe].scaled,
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


DIGESTS = "digests"
"""The item of a checkpoint with the digests of the others, by name."""


def item_digest(item: Any) -> str:
    """A digest of the arrays of a checkpoint's item."""
    return digest(np.asarray(leaf) for leaf in jax.tree.leaves(item))


def check_digest(folder: epath.Path, name: str, item: Any) -> None:
    """Compares an item with the digest that was saved with it. Older checkpoints have none.

    Raises:
      Damaged: the item is not what was saved.
    """
    path = folder / DIGESTS / "metadata"
    if path.exists() and json.loads(path.read_text()).get(name) != item_digest(item):
        raise Damaged(f"its {name} is not what was saved")


ARCHITECTURE = ("backbone", "backbone_config", "variant", "scale_features", "loss.recipe")
"""The settings of a run that must not change once it has a checkpoint."""


def digests_of(items: Mapping[str, Any], config: TrainConfig) -> dict[str, Any]:
    """The item `DIGESTS`: a digest of each other item, and the settings that define the model."""
    digests: dict[str, Any] = {name: item_digest(item) for name, item in items.items()}
    return digests | {"architecture": _architecture(config)}


def _architecture(config: TrainConfig) -> dict[str, Any]:
    """The settings that define the model. Of a backbone's path only the name, since a run can move."""
    settings = {name: operator.attrgetter(name)(config) for name in ARCHITECTURE}
    return settings | {"backbone": unmoved(config.backbone)}


def check_architecture(folder: epath.Path, steps: Iterable[int], config: TrainConfig) -> None:
    """Compares the settings that define the model with those that checkpoints were saved with.

    Raises:
      Failure: they differ, as after an edit of ``config.json``.
    """
    settings = _architecture(config)
    for step in steps:
        for name, saved in _saved_digests(folder / str(step)).get("architecture", {}).items():
            if name == "backbone":
                saved = unmoved(saved)  # earlier versions saved the path of hf:FOLDER
            if name in settings and saved != settings[name]:
                raise Failure(
                    f"{folder.parent / CONFIG_FILE} has {name} {settings[name]}, but "
                    f"checkpoint {step} was trained with {saved}: restore the file"
                )


def _saved_digests(checkpoint: epath.Path) -> dict[str, Any]:
    """The item `DIGESTS` of a checkpoint; empty if an earlier version wrote it, or it is damaged."""
    path = checkpoint / DIGESTS / "metadata"
    try:
        digests = json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        return {}
    return digests if isinstance(digests, dict) else {}


DAMAGE = (ValueError, KeyError, FileNotFoundError)
"""What reading a damaged checkpoint raises."""


def save_attention(
    run_dir: Path, attention: AttentionMechanism, step: int, config: TrainConfig
) -> None:
    """Saves a mechanism from another program as the only checkpoint of a run.

    The run can be explained with and evaluated, but not resumed.

    Args:
      run_dir: the run's folder.
      attention: with its parameters and statistics.
      step: the number of training steps it has had.
      config: of the run.
    """
    import orbax.checkpoint as ocp  # takes as long to import as Flax

    _, params, batch_stats = nnx.split(attention, nnx.Param, nnx.BatchStat)
    item = attention_item(params, batch_stats)
    items = ocp.args.Composite(
        attention=ocp.args.StandardSave(item),
        digests=ocp.args.JsonSave(digests_of({"attention": item}, config)),
    )
    with ocp.CheckpointManager(absolute(run_dir / CHECKPOINT_FOLDER)) as manager:
        manager.save(step, args=items)


@only_errors_logged()
def load_attention(run_dir: str | Path, attention: AttentionMechanism) -> int:
    """Fills the mechanism from the run's best checkpoint, or its last one if none was validated.

    If that checkpoint is damaged, a message is printed and the last intact one is used.

    Returns:
      The checkpoint's step.

    Raises:
      FileNotFoundError: the run has no checkpoint yet.
      Damaged: all checkpoints are damaged.
      Failure: see `check_architecture`.
    """
    import orbax.checkpoint as ocp  # see save_attention

    folder = absolute(epath.Path(run_dir) / CHECKPOINT_FOLDER)
    missing = FileNotFoundError(f"{run_dir} has no checkpoint yet: train it with ttame train")
    if not folder.is_dir():
        raise missing
    _, params, batch_stats = nnx.split(attention, nnx.Param, nnx.BatchStat)
    options = ocp.CheckpointManagerOptions(best_fn=score, read_only=True)
    with ocp.CheckpointManager(folder, options=options) as manager:
        steps = sorted(manager.all_steps(), reverse=True)
        if not steps:
            raise missing
        best = manager.best_step()
        check_architecture(folder, steps, load_config(run_dir))
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, attention_item(params, batch_stats))
        items = ocp.args.Composite(attention=ocp.args.StandardRestore(shapes))

        def restore(step):
            item = manager.restore(step, args=items).attention
            check_digest(folder / str(step), "attention", item)
            return item

        steps = steps if best is None else [best, *(step for step in steps if step != best)]
        step, restored = first_intact(folder, steps, restore)
    nnx.update(attention, restored["params"], restored["batch_stats"])
    return step


def first_intact(
    folder: epath.Path, steps: Sequence[int], restore: Callable[[int], Any]
) -> tuple[int, Any]:
    """The first of several checkpoints that can be restored, and what it holds.

    Prints a message for each damaged one before it.

    Raises:
      Damaged: all are damaged.
    """
    for step in steps:
        try:
            with no_word_of_closed_loops():
                return step, restore(step)
        except DAMAGE as error:
            reason = str(error).splitlines()[0].partition(": Error opening")[0][:200]
            print(f"checkpoint {folder / str(step)} is damaged: {reason}", file=sys.stderr)
    raise Damaged(f"all checkpoints in {folder} are damaged: see the lines above")

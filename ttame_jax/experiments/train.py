"""`ttame train`: trains an attention mechanism and validates it by AD and IC."""

from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from ttame_jax.config import TrainConfig
from ttame_jax.data import Source, load_source, readable_crops, select
from ttame_jax.errors import Damaged
from ttame_jax.explainer import Explainer
from ttame_jax.methods import TTAME, Method
from ttame_jax.metrics.evaluation import Evaluator
from ttame_jax.pictures import overlay
from ttame_jax.preprocessing import to_float
from ttame_jax.training.log import Validation
from ttame_jax.training.loop import Diverged, Trainer, Validate
from ttame_jax.training.step import TrainState

PANEL_IMAGES = 8


def train(config: TrainConfig) -> bool:
    """Trains an attention mechanism, or resumes the run in ``config.output``.

    Returns:
      Whether the run is finished. SIGTERM ends it early.

    Raises:
      ValueError: the folder holds a run of another configuration, or the batch does not divide
        over the devices.
      FileNotFoundError: weights or images are missing; the message tells how to get them.
      Diverged: the loss, the parameters or the maps are no longer finite.
    """
    trainer = Trainer(config)
    return trainer.train(make_validate(trainer))


def make_validate(trainer: Trainer) -> Validate | None:
    """The validation that the run's configuration asks for; None if it disables validation."""
    config = trainer.config
    if not config.validation_images:
        return None
    source = load_source(
        config.dataset, config.validation_split, config.data_dir, config.max_pixels
    )
    indices = select(source, config.validation_list, config.validation_images)
    method = TTAME(trainer.backbone, trainer.attention)
    evaluator = Evaluator(
        method,
        source,
        masking=trainer.masking,
        indices=indices,
        batch_size=trainer.batch_size,
    )

    draw = None
    if jax.process_index() == 0:
        spread = np.linspace(0, len(indices) - 1, min(PANEL_IMAGES, len(indices)))
        draw = panel(method, source, indices[spread.astype(int)])

    def validate(state: TrainState) -> Validation:
        attention = nnx.merge_state(state.params, state.batch_stats)
        whole = nnx.State({"backbone": trainer.backbone_state, "attention": attention})
        try:
            return Validation(evaluator.figures(whole), draw(whole) if draw else None)
        except Damaged:  # images
            raise
        except ValueError as error:  # finite parameters may give maps that are not
            raise Diverged(
                f"training diverged: in validation, {error}. Choose a lower --learning-rate and "
                "another --output"
            ) from error

    return validate


def panel(
    method: Method, source: Source, indices: np.ndarray
) -> Callable[[nnx.State], np.ndarray] | None:
    """Returns a function that draws a few images above their maps, from a state of the method.

    The maps are those of the classes that the backbone predicts. The picture is uint8
    ``[2 H, N W, 3]``. It is computed on one device of this process. Unreadable images are left
    out; None if no image is readable.
    """
    graph, preprocessing = nnx.graphdef(method), method.backbone.preprocessing
    images = readable_crops(source, preprocessing, indices)
    if not len(images):
        return None

    def draw(state: nnx.State) -> np.ndarray:
        explainer = Explainer(nnx.merge(graph, jax.device_get(state)))
        maps = np.asarray(explainer(to_float(images)).maps[:, 0])
        columns = [np.concatenate([image, overlay(image, m)]) for image, m in zip(images, maps)]
        return np.concatenate(columns, axis=1)

    return draw

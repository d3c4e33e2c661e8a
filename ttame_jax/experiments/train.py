"""`ttame train`: trains an attention mechanism and validates it by AD and IC."""

from flax import nnx

from ttame_jax.config import TrainConfig
from ttame_jax.data import load_source, select
from ttame_jax.errors import Damaged
from ttame_jax.methods import TTAME
from ttame_jax.metrics.evaluation import Evaluator
from ttame_jax.training.loop import Diverged, Trainer, Validate
from ttame_jax.training.step import TrainState


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
    evaluator = Evaluator(
        TTAME(trainer.backbone, trainer.attention),
        source,
        masking=trainer.masking,
        indices=select(source, config.validation_list, config.validation_images),
        batch_size=trainer.batch_size,
    )

    def validate(state: TrainState) -> dict[str, float]:
        attention = nnx.merge_state(state.params, state.batch_stats)
        whole = nnx.State({"backbone": trainer.backbone_state, "attention": attention})
        try:
            return evaluator.figures(whole)
        except Damaged:  # images
            raise
        except ValueError as error:  # finite parameters may give maps that are not
            raise Diverged(
                f"training diverged: in validation, {error}. Choose a lower --learning-rate and "
                "another --output"
            ) from error

    return validate

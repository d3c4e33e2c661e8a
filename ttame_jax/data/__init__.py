"""Images for training and evaluation: sources, transforms and batches."""

from ttame_jax.data.loader import Batches, evaluation_batches, train_batches
from ttame_jax.data.sources import Source, load_source, prepare, select, thin
from ttame_jax.data.transforms import UnreadableImage, preprocess

__all__ = [
    "Batches",
    "Source",
    "UnreadableImage",
    "evaluation_batches",
    "load_source",
    "prepare",
    "preprocess",
    "select",
    "thin",
    "train_batches",
]

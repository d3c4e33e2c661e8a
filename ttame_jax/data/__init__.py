"""Images for training and evaluation: sources, transforms and batches.

Training (`loader`) needs Grain and TFDS's data sets (`tfds_source`) need TFDS. Nothing else does.
"""

from ttame_jax.data.boxes import BoxedSource, read_boxes
from ttame_jax.data.evaluation import evaluation_batches, readable_crops
from ttame_jax.data.sources import Source, load_source, select, thin
from ttame_jax.data.transforms import UnreadableImage, preprocess

__all__ = [
    "BoxedSource",
    "Source",
    "UnreadableImage",
    "evaluation_batches",
    "load_source",
    "preprocess",
    "read_boxes",
    "readable_crops",
    "select",
    "thin",
]

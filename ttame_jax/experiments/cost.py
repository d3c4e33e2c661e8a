"""What methods with many forward passes cost. It is reported before they start."""

import time

import jax
import jax.numpy as jnp
from flax import nnx
from tqdm import tqdm

from ttame_jax.backbones import Backbone
from ttame_jax.methods import Method
from ttame_jax.methods.base import FORWARD_BATCH

MANY = 100
"""Forward passes of an image above which a method counts as slow."""

BATCH_PASSES = 4000
"""Forward passes of a device after which an evaluation shows its progress and saves its results."""


def is_slow(method: Method) -> bool:
    """Whether a method needs more than `MANY` forward passes for an image."""
    return method.forward_passes > MANY


def images_per_batch(method: Method, largest: int, devices: int) -> int:
    """The number of images to explain at a time, over all devices.

    It is no larger than `largest`, and smaller for a method with many forward passes: an interrupted
    evaluation loses at most `BATCH_PASSES` of them per device, or one image. This costs no speed,
    because such methods batch the forward passes of an image.
    """
    per_device = max(BATCH_PASSES // max(method.forward_passes, 1), 1)
    return min(largest, per_device * devices)


def estimate(method: Method, images: int) -> str:
    """A line with the forward passes of a method and the time they take on this machine.

    Args:
      method: the method.
      images: number of images to explain.
    """
    seconds = method.forward_passes * _seconds_per_pass(method.backbone)
    whole = f", {tqdm.format_interval(images * seconds)} for {images} images" if images > 1 else ""
    return (
        f"{method.title}: {method.forward_passes:,} forward passes for each image, about "
        f"{tqdm.format_interval(seconds)}{whole}"
    )


def _seconds_per_pass(backbone: Backbone) -> float:
    """Seconds that the forward pass of an image takes, in batches as the methods have them."""
    size = backbone.preprocessing.image_size
    images = jnp.zeros((FORWARD_BATCH, size, size, 3))
    graph, state = nnx.split(backbone)
    forward = jax.jit(lambda state, images: nnx.merge(graph, state)(images)[0])
    forward(state, images).block_until_ready()  # compiles
    start = time.perf_counter()
    forward(state, images).block_until_ready()
    return (time.perf_counter() - start) / FORWARD_BATCH

"""The largest batch that fits into the memory of the devices: ``--batch-size auto``."""

import math
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ttame_jax.config import REFERENCE_BATCH_SIZE
from ttame_jax.training.log import say

MAX_BATCH_SIZE = 1024  # over all devices; a larger batch leaves too few steps per epoch
DEVICE_SHARE = (
    0.9  # of an accelerator's memory; the rest is for prefetched images and fragmentation
)
HOST_SHARE = 0.5  # of the machine's memory, if its CPU is the device
PROBED = 32
"""Images per device in the larger of the first two steps that are compiled. The smaller has half of
them, which is what a TPU processes at a time (`Backbone.tpu_pixels`): below that, memory grows much
faster."""

GROWTH = 8
"""The next batch is at most this many times the largest that fits: estimates from small batches can be
far off, and compilers spend many minutes on a program that does not fit."""


def largest_batch(compile_step: Callable[[int], jax.stages.Compiled], images: int) -> int:
    """The largest power of two times the number of devices whose step fits into memory.

    Nothing is run: the memory of a step is read from the compiled program. All processes agree on
    the number.

    Args:
      compile_step: compiles the training step for a batch size, over all devices.
      images: number of training images. The batch is no larger than that, or than
        ``MAX_BATCH_SIZE``.

    Raises:
      ValueError: one image per device does not fit.
    """
    devices = jax.device_count()
    most = max(devices, min(images, MAX_BATCH_SIZE))
    sizes = [devices << k for k in range((most // devices).bit_length())]
    memory = usable_memory()
    if memory is None:
        size = max(size for size in sizes if size <= max(devices, REFERENCE_BATCH_SIZE))
        kind = jax.devices()[0].device_kind
        say(f"--batch-size auto: {size}, because {kind} does not report its memory")
        return size

    def share(size: int) -> float:
        """Fraction of the usable memory on the fullest device."""
        mine = np.float32(needed_memory(compile_step, size) / memory)
        return float(multihost_utils.process_allgather(mine).max())

    size, used = largest_fitting(share, devices, sizes)
    usable = f"the {memory / 2**30:.1f} GiB that it may use on each"
    if size is None:
        raise ValueError(
            f"one image per device does not fit: a step of {devices} needs {used:.0%} of "
            f"{usable}: try --precision bfloat16"
        )
    say(f"--batch-size auto: {size}. A step needs {used:.0%} of {usable} device")
    return size


def largest_fitting(
    share: Callable[[int], float], devices: int, sizes: list[int]
) -> tuple[int | None, float]:
    """The largest batch that needs at most all of the usable memory.

    A straight line through the two largest batches that are known to fit gives the next one to try,
    until none that is larger seems to fit.

    Args:
      share: the fraction of the usable memory that a batch needs. It is called for few batches.
      devices: number of devices.
      sizes: the batches to choose from, ascending.

    Returns:
      The batch and its share; None and the share of the smallest batch if none fits.
    """
    probed = [size for size in sizes if size <= devices * PROBED][-2:]
    shares = {size: share(size) for size in probed}
    while True:
        fitting = sorted(size for size in shares if shares[size] <= 1)
        best = fitting[-1] if fitting else 0
        too_large = min((size for size in shares if shares[size] > 1), default=math.inf)
        left = [size for size in sizes if best < size < too_large]
        if len(fitting) > 1:
            small = fitting[-2]
            slope = (shares[best] - shares[small]) / (best - small)
            most = min(GROWTH * best, best + (1 - shares[best]) / slope if slope > 0 else math.inf)
            left = [size for size in left if size <= most]
        if not left:
            return (best, shares[best]) if fitting else (None, shares[sizes[0]])
        shares[left[-1]] = share(left[-1])


def usable_memory() -> float | None:
    """Usable bytes on each device of this process; None if the devices do not report it."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return HOST_SHARE * physical / jax.local_device_count()
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return DEVICE_SHARE * limit if limit else None


def needed_memory(compile_step: Callable[[int], jax.stages.Compiled], size: int) -> float:
    """Bytes on a device while it runs the step; infinite if the compiler runs out of memory."""
    try:
        needs: Any = compile_step(size).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return math.inf
    # The new state takes the place of the donated one (the alias).
    outputs = needs.output_size_in_bytes - needs.alias_size_in_bytes
    return needs.argument_size_in_bytes + outputs + needs.temp_size_in_bytes

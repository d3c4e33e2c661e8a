"""The largest batch that fits into the devices' memory: ``--batch-size auto``."""

import functools
import math
import os
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from ttame_jax.training.config import REFERENCE_BATCH_SIZE
from ttame_jax.training.log import say

MAX_BATCH_SIZE = 1024  # over all devices; beyond it an epoch has too few steps
DEVICE_SHARE = 0.9  # of an accelerator's memory; images on their way and fragments have the rest
HOST_SHARE = 0.5  # of the machine's memory, where its processor is the device
PROBES = (4, 8)  # images a device in the two steps from which larger ones are estimated


def largest_batch(compile_step: Callable[[int], jax.stages.Compiled], images: int) -> int:
    """The largest power of two times the number of devices whose step fits into the memory.

    Nothing is run: what a step needs is read off the compiled program. Two small ones say, along a
    straight line, where to start; the first batch from there down whose own program fits is taken.
    All processes come to the same number.

    Args:
      compile_step: the training step for a batch, over all devices.
      images: in the training set; the batch holds no more of them, nor more than
        ``MAX_BATCH_SIZE``.

    Raises:
      ValueError: if one image a device does not fit.
    """
    devices = jax.device_count()
    most = max(devices, min(images, MAX_BATCH_SIZE))
    sizes = [devices << k for k in range((most // devices).bit_length())]
    memory = usable_memory()
    if memory is None:
        size = max(size for size in sizes if size <= max(devices, REFERENCE_BATCH_SIZE))
        kind = jax.devices()[0].device_kind
        say(f"--batch-size auto takes {size}: {kind} does not tell its memory; or give a number")
        return size

    @functools.cache
    def share(size: int) -> float:
        """Of the usable memory, on the fullest device."""
        mine = np.float32(_needed(compile_step, size) / memory)
        return float(multihost_utils.process_allgather(mine).max())

    small, larger = (devices * count for count in PROBES)
    slope = (share(larger) - share(small)) / (larger - small)
    for size in reversed(sizes):
        estimate = share(larger) + slope * (size - larger)
        if (size <= larger or estimate <= 1) and share(size) <= 1:
            say(
                f"--batch-size auto takes {size}: a step needs {share(size):.0%} of the "
                f"{memory / 2**30:.1f} GiB that it may use of each device"
            )
            return size
    raise ValueError(
        f"not even one image a device fits: a step of {devices} needs {share(devices):.0%} of the "
        f"{memory / 2**30:.1f} GiB that it may use of each: try --precision bfloat16"
    )


def usable_memory() -> float | None:
    """Bytes of each of this process's devices; None where they do not tell."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return HOST_SHARE * physical / jax.local_device_count()
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return DEVICE_SHARE * limit if limit else None


def _needed(compile_step: Callable[[int], jax.stages.Compiled], size: int) -> float:
    """Bytes of a device while it runs the step; infinite where the compiler gives up."""
    try:
        needs = compile_step(size).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return math.inf
    # The new state takes the place of the old one (the alias).
    outputs = needs.output_size_in_bytes - needs.alias_size_in_bytes
    return needs.argument_size_in_bytes + outputs + needs.temp_size_in_bytes

"""StableHLO: a program that JAX alone loads, for CPUs, CUDA GPUs and TPUs."""

import io
import json
import zipfile

import jax

from ttame_jax.explainer import Explainer

from .program import metadata, program

PLATFORMS = ("cpu", "cuda", "tpu")

PROGRAM, METADATA = "program.bin", "metadata.json"
"""Names of the files in the archive."""


def stablehlo(explainer: Explainer, likeliest: int = 1) -> bytes:
    """Exports an explainer as a zip archive with a program of `jax.export` and its metadata.

    Any method can be exported whose program does not depend on the number of images; gradients are
    part of the program.

    Args:
      explainer: with its weights, which become constants of the program.
      likeliest: see `program`, which also says what the inputs and outputs are.

    Returns:
      The archive: ``program.bin`` for `jax.export.deserialize`, and ``metadata.json``.

    Raises:
      ValueError: see `program`.
      Failure: the method's program depends on the number of images.
    """
    explain, shapes = program(explainer, likeliest)
    exported = jax.export.export(jax.jit(explain), platforms=PLATFORMS)(*shapes)
    maps = jax.tree.unflatten(exported.out_tree, exported.out_avals)["maps"]
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as files:  # weights hardly compress
        files.writestr(PROGRAM, bytes(exported.serialize()))
        files.writestr(METADATA, json.dumps(metadata(explainer, maps.shape[2:]), indent=1))
    return archive.getvalue()

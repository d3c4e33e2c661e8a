"""The TPU compiler's own estimate of a program's cost, as JSON. No TPU is needed.

    pip install 'ttame-jax[tpu-compile]'
    python benchmarks/tpu_compile.py --backbone vit_b16 --topology v5e:2x4 --batch-size 1024

Nothing is run and nothing is measured. `estimated_cycles` is the sum of the cycles that the compiler
attributes to each operation of the compiled program, as if they ran one after the other, without
collectives and waiting. `share_of_peak` divides the model's FLOPs by those that a chip could do in
these cycles.
"""

import importlib.util
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

# Before JAX loads the compiler: there is no TPU VM that could describe itself.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_ID", "0")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")

import common
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ours import PEAKS, layer_flops, memory
from tpu_program import Program
from train_step import model_flops

from ttame_jax import AttentionMechanism
from ttame_jax.losses import LossConfig
from ttame_jax.mesh import AXIS
from ttame_jax.methods import TTAME
from ttame_jax.preprocessing import to_float
from ttame_jax.training.batch_size import DEVICE_SHARE, largest_fitting, needed_memory
from ttame_jax.training.optimizer import OneCycle, one_cycle_sgd
from ttame_jax.training.step import initial_state, make_train_step
from ttame_jax.weights import abstract_backbone

CLOCKS = {"TPU v5 lite": 1.5e9, "TPU v5": 1.75e9, "TPU v5p": 1.75e9, "TPU v6 lite": 1.75e9}
"""Cycles a second, which follow from the peak and the number and size of the matrix units."""

MEMORY = {"TPU v5 lite": 16, "TPU v5": 95, "TPU v5p": 95, "TPU v6 lite": 32}
"""GiB of a chip."""


@dataclass(frozen=True)
class Options:
    """What is compiled, and for which chips."""

    backbone: str = "vit_b16"
    """vgg16, resnet50, vit_b16 or another classifier by name."""
    topology: str = "v5e:2x4"
    """Kind and arrangement of the chips: v5e:8x8, v5p:2x2x2, v6e:2x4 and so on."""
    batch_size: int | Literal["auto"] = 1024
    """Images per batch, over all chips; auto: the largest that fits into their memory, up to 4096
    per chip."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the computation."""
    image_size: int = 224
    """Height and width of the images."""
    program: Literal["train", "explain", "forward"] = "train"
    """A training step, T-TAME's maps of the predicted classes, or the classifier alone."""
    compare: bool = False
    """With `--program forward`, whether to compile Equimo's ViT-B/16, too."""


def run(options: Options) -> dict:
    if importlib.util.find_spec("libtpu") is None:
        raise SystemExit("the TPU compiler is missing: pip install 'ttame-jax[tpu-compile]'")
    if options.compare and (options.program, options.backbone) != ("forward", "vit_b16"):
        raise SystemExit("--compare needs --program forward --backbone vit_b16")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=options.topology).devices
    mesh = Mesh(np.array(devices), (AXIS,))
    size = largest_batch(options, mesh) if options.batch_size == "auto" else options.batch_size
    result = {
        "device": devices[0].device_kind,
        "device_count": mesh.size,
        "batch_size": size,
        "libtpu": version("libtpu"),
        **estimate(PROGRAMS[options.program](options, mesh, size), mesh, options.precision),
    }
    if options.compare:
        result["equimo"] = estimate(equimo(options, mesh, size), mesh, options.precision)
    return result


def largest_batch(options: Options, mesh: Mesh) -> int:
    """The largest batch whose program fits into the chips' memory (`--batch-size auto`)."""
    usable = DEVICE_SHARE * MEMORY[mesh.devices.flat[0].device_kind] * 2**30

    def share(size: int) -> float:
        def compile_program(size):
            lower, _ = PROGRAMS[options.program](options, mesh, size)
            return lower().compile()

        return needed_memory(compile_program, size) / usable

    size, used = largest_fitting(share, mesh.size, [mesh.size << k for k in range(13)])
    if size is None:
        raise SystemExit(f"one image per chip needs {used:.0%} of its usable memory")
    return size


Lowering = tuple[Callable[[], jax.stages.Lowered], float]
"""Traces and lowers a program; its FLOPs per chip, by hand."""


def estimate(program: Lowering, mesh: Mesh, precision: str) -> dict[str, Any]:
    """Compiles a program and reads what the compiler says about it."""
    lower, flops = program
    times = [time.perf_counter()]
    lowered = lower()
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())
    text = Program(compiled.as_text() or "")
    cycles = sum(text.cycles.values())
    kind = mesh.devices.flat[0].device_kind
    seconds = cycles / CLOCKS[kind]
    peak = PEAKS[kind].get(precision)
    return {
        "estimated_cycles": cycles,
        "cycles_by_kind": text.cycles,
        "operations_without_estimate": text.unknown,
        "estimated_seconds": seconds,
        "flops_per_chip": flops,
        "share_of_peak": flops / seconds / peak if peak else None,
        "memory_bytes_per_chip": memory(compiled)["program_memory_bytes"],
        "collectives": text.collectives,
        "seconds_to_trace": times[1] - times[0],
        "seconds_to_compile": times[2] - times[1],
    }


def models(options: Options):
    """The classifier and the attention mechanism. They have shapes, but no values."""
    backbone = abstract_backbone(
        options.backbone, image_size=options.image_size, dtype=options.precision
    )
    channels = [count for _, _, count in backbone.feature_shapes()]
    attention = nnx.eval_shape(
        lambda: AttentionMechanism(
            channels,
            backbone.num_classes,
            dtype=jnp.dtype(options.precision),
            rngs=nnx.Rngs(0),
        )
    )
    return backbone, attention


def placed(tree, mesh: Mesh, *axes: str):
    """Shapes of arrays that are replicated over a mesh, or sharded by their first axis."""
    sharding = NamedSharding(mesh, P(*axes))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def batch(options: Options, mesh: Mesh, size: int) -> jax.ShapeDtypeStruct:
    shape = (size, options.image_size, options.image_size, 3)
    return placed(jax.ShapeDtypeStruct(shape, jnp.uint8), mesh, AXIS)


def training(options: Options, mesh: Mesh, size: int) -> Lowering:
    backbone, attention = models(options)
    optimizer = one_cycle_sgd(OneCycle(1e-3, 10**6))
    graph, parameters = nnx.split(attention)
    state = jax.eval_shape(
        lambda parameters: initial_state(nnx.merge(graph, parameters), optimizer), parameters
    )
    images = size // mesh.size

    def lower():
        step = make_train_step(backbone, attention, optimizer, mesh, backbone.masking, LossConfig())
        arguments = placed((state, nnx.state(backbone)), mesh)
        return step.lower(*arguments, batch(options, mesh, size))

    return lower, images * model_flops(backbone, attention, options.image_size, images)


def explaining(options: Options, mesh: Mesh, size: int) -> Lowering:
    method = TTAME(*models(options))
    graph, state = nnx.split(method)
    return over_batch(
        lambda state, images: nnx.merge(graph, state).explain(images), state, options, mesh, size
    )


def classifying(options: Options, mesh: Mesh, size: int) -> Lowering:
    graph, state = nnx.split(models(options)[0])

    def forward(state, images):
        backbone = nnx.merge(graph, state)
        return backbone(backbone.preprocessing.standardise(images))[0]

    return over_batch(forward, state, options, mesh, size)


def equimo(options: Options, mesh: Mesh, size: int) -> Lowering:
    """Equimo's ViT-B/16."""
    import equinox
    from equimo.models.vit import vit_base_patch16_224

    key = jax.random.key(0)
    model = equinox.filter_eval_shape(lambda: vit_base_patch16_224(key=key))
    arrays, static = equinox.partition(model, lambda leaf: hasattr(leaf, "shape"))
    arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, options.precision), arrays)

    def forward(arrays, images):
        model = equinox.combine(arrays, static)
        images = images.astype(options.precision).transpose(0, 3, 1, 2)
        return jax.vmap(lambda image: model(image, key, inference=True))(images)

    return over_batch(forward, arrays, options, mesh, size)


def over_batch(function: Callable, state, options: Options, mesh: Mesh, size: int) -> Lowering:
    """A function of parameters and images [B, H, W, 3] in [0, 1], each chip with its images."""

    def local(state, images):
        return function(state, to_float(images))

    def lower():
        step = jax.shard_map(local, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P(AXIS))
        return jax.jit(step).lower(placed(state, mesh), batch(options, mesh, size))

    shape = (size // mesh.size, options.image_size, options.image_size, 3)
    return lower, layer_flops(local, state, jax.ShapeDtypeStruct(shape, jnp.uint8))


PROGRAMS = {"train": training, "explain": explaining, "forward": classifying}


if __name__ == "__main__":
    common.main(run, tyro.cli(Options, description=__doc__))

"""Speed and cost of a training step, as JSON.

    python benchmarks/train_step.py --backbone vit_b16 --batch-size 8 --compare

Images are already on the device (`input_pipeline.py` measures the input). `--compare` interleaves
`torch_reference.py` and adds `ratio`: our images per second divided by PyTorch's. `--recipe` interleaves
a step of another loss and adds `recipe_ratio`: its seconds divided by those of the paper's.
"""

import dataclasses
import statistics
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import tyro
from common import Setting, main, turns
from flax import nnx
from ours import all_at_once, build, device, memory, module_flops, noise, peak_flops

from ttame_jax.losses import LossConfig, RecipeName
from ttame_jax.mesh import data_mesh, replicate, shard_batch
from ttame_jax.training.optimizer import OneCycle, one_cycle_sgd
from ttame_jax.training.step import initial_state, make_train_step


@dataclass(frozen=True)
class Options(Setting):
    compare: bool = False
    """Whether to run the PyTorch reference beside it."""
    compile: bool = False
    """Whether that runs under torch.compile."""
    recipe: RecipeName | None = None
    """A recipe of the loss to run beside the paper's, such as relevance."""


def run(options: Options) -> dict:
    backbone, attention = build(options)
    per_device = options.batch_size // jax.device_count()
    flops = model_flops(backbone, attention, options.image_size, per_device)
    optimizer = one_cycle_sgd(OneCycle(1e-3, 10**6))
    mesh = data_mesh()
    backbone_state = replicate(nnx.state(backbone), mesh)
    batch = shard_batch(jax.device_get(noise(options)), mesh)

    def new_state():  # copied, because a step donates its state
        return jax.tree.map(jnp.copy, replicate(initial_state(attention, optimizer), mesh))

    def compile_step(recipe: RecipeName = "paper"):
        optimizer = one_cycle_sgd(OneCycle(1e-3, 10**6))  # a new one: the step is traced anew
        step = make_train_step(
            backbone, attention, optimizer, mesh, backbone.masking, LossConfig(recipe=recipe)
        )
        return step.lower(new_state(), backbone_state, batch).compile()

    def repeated(compiled):
        state = new_state()

        def run(count: int):
            nonlocal state
            for _ in range(count):
                state, _ = compiled(state, backbone_state, batch)
            jax.block_until_ready(state)

        return run

    compiled = compile_step()
    with all_at_once():
        counted = compiled_flops(compile_step())

    sides = {"ours": repeated(compiled)}
    if options.recipe:
        sides["recipe"] = repeated(compile_step(options.recipe))
    if options.compare:
        import torch_reference

        fields = {f.name: getattr(options, f.name) for f in dataclasses.fields(Setting)}
        theirs = torch_reference.Options(**fields, compile=options.compile)
        sides["torch"] = torch_reference.training(theirs)
    times = turns(sides, options.rounds)
    rates = {
        name: options.batch_size / statistics.median(seconds) for name, seconds in times.items()
    }

    peak = peak_flops(options.precision)
    result = {
        **device(),
        "images_per_second": rates["ours"],
        "seconds_per_step": options.batch_size / rates["ours"],
        "gflops_per_image": flops / 1e9,
        "gflops_per_image_compiled": counted / options.batch_size / 1e9,
        "tflops_per_second": rates["ours"] * flops / 1e12,
        "share_of_peak": rates["ours"] * flops / peak if peak else None,
        **memory(compiled),
    }
    if options.recipe:
        result["recipe_ratio"] = rates["ours"] / rates["recipe"]
        result["recipe_ratios"] = [
            recipe / ours for ours, recipe in zip(times["ours"], times["recipe"])
        ]
    if options.compare:
        result["torch_images_per_second"] = rates["torch"]
        result["ratio"] = rates["ours"] / rates["torch"]
        result["ratios"] = [theirs / ours for ours, theirs in zip(times["ours"], times["torch"])]
    return result


def model_flops(backbone, attention, image_size: int, per_device: int) -> int:
    """FLOPs that a step needs per image, by hand.

    The classifier: a pass over the image, one over the masked image, and the gradient of that one
    with respect to its input, which costs as much as the pass (its weights have no gradient).
    The attention mechanism, for the classes of a device's images: a pass, and the gradient with
    respect to its weights, which costs as much (its inputs are frozen and need none, but for the
    fusion's, whose small cost is left out).
    """
    shape = (1, image_size, image_size, 3)
    image = jax.ShapeDtypeStruct(shape, jnp.float32)
    features = [
        jax.ShapeDtypeStruct((1, *shape), jnp.float32) for shape in backbone.feature_shapes()
    ]
    classes = jax.ShapeDtypeStruct((per_device,), jnp.int32)
    return 3 * module_flops(backbone, image) + 2 * module_flops(attention, features, classes)


def compiled_flops(compiled: jax.stages.Compiled) -> float:
    """The compiler's count of what it made, in all devices."""
    return (compiled.cost_analysis() or {}).get("flops", float("nan")) * jax.device_count()


if __name__ == "__main__":
    main(run, tyro.cli(Options, description=__doc__))

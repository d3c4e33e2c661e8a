"""Speed and cost of a training step, as JSON.

    python benchmarks/train_step.py --backbone vit_b16 --batch-size 8 --compare

Images are already on the device (`input_pipeline.py` measures the input). `--compare` interleaves
`torch_reference.py` and adds `ratio`: our images per second divided by PyTorch's. `--recipe` interleaves
a step of another loss and adds `recipe_ratio`: its seconds divided by those of the paper's.
"""

import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import tyro
from common import Setting, main, turns
from flax import nnx
from ours import all_at_once, build, device, memory, module_flops, noise, peak_flops

from ttame_jax.attention import AttentionMechanism
from ttame_jax.backbones import Backbone
from ttame_jax.losses import LossConfig, RecipeName
from ttame_jax.mesh import data_mesh, replicate, shard_batch
from ttame_jax.training.optimizer import OneCycle, one_cycle_sgd
from ttame_jax.training.step import TrainState, initial_state, make_train_step

RATES = OneCycle(1e-3, 10**6)


@dataclass(frozen=True)
class Options(Setting):
    compare: bool = False
    """Whether to run the PyTorch reference beside it."""
    compile: bool = False
    """Whether that runs under torch.compile."""
    recipe: RecipeName | None = None
    """A recipe of the loss to run beside the paper's, such as relevance."""


class Steps:
    """Training steps of a mechanism on one batch."""

    def __init__(self, backbone: Backbone, attention: AttentionMechanism, images: jax.Array):
        self.backbone, self.attention, self.mesh = backbone, attention, data_mesh()
        self.backbone_state = replicate(nnx.state(backbone), self.mesh)
        self.batch = shard_batch(jax.device_get(images), self.mesh)

    def compile(self, recipe: RecipeName) -> jax.stages.Compiled:
        """A step of a recipe. It is traced anew because its optimizer is a new one."""
        step = make_train_step(
            self.backbone,
            self.attention,
            one_cycle_sgd(RATES),
            self.mesh,
            self.backbone.masking,
            LossConfig(recipe=recipe),
        )
        return step.lower(self._state(), self.backbone_state, self.batch).compile()

    def repeat(self, compiled: jax.stages.Compiled) -> Callable[[int], None]:
        """A function that takes a number of steps, with a state of its own."""
        state = self._state()

        def steps(count: int) -> None:
            nonlocal state
            for _ in range(count):
                state, _ = compiled(state, self.backbone_state, self.batch)
            jax.block_until_ready(state)

        return steps

    def _state(self) -> TrainState:  # a copy, because a step donates its state
        state = initial_state(self.attention, one_cycle_sgd(RATES))
        return jax.tree.map(jnp.copy, replicate(state, self.mesh))


def run(options: Options) -> dict:
    backbone, attention = build(options)
    per_device = options.batch_size // jax.device_count()
    flops = model_flops(backbone, attention, options.image_size, per_device)
    steps = Steps(backbone, attention, noise(options))
    compiled = steps.compile("paper")
    with all_at_once():
        counted = compiled_flops(steps.compile("paper"))

    sides = {"ours": steps.repeat(compiled)}
    if options.recipe:
        sides["recipe"] = steps.repeat(steps.compile(options.recipe))
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
    for side, prefix in (("recipe", "recipe_"), ("torch", "")):
        if side in sides:
            result[f"{prefix}ratio"] = rates["ours"] / rates[side]
            result[f"{prefix}ratios"] = [
                other / ours for ours, other in zip(times["ours"], times[side])
            ]
    if options.compare:
        result["torch_images_per_second"] = rates["torch"]
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

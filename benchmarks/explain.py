"""Latency and throughput of explaining, and its overhead over classification, as JSON.

    python benchmarks/explain.py --backbone resnet50 --batch-size 8

`overhead` is the time of classifying and explaining divided by that of classifying alone, for the
predicted class and for all classes. Classifying is timed with and without feature maps, and the
faster one counts: a compiler may do worse with fewer outputs.
"""

import dataclasses

import jax
import jax.numpy as jnp
import tyro
from common import Setting, main, median_seconds
from flax import nnx
from ours import build, device, layer_flops, noise

from ttame_jax.methods import TTAME
from ttame_jax.preprocessing import to_float


def run(setting: Setting) -> dict:
    result = {**timed(setting), **device()}
    single = timed(dataclasses.replace(setting, batch_size=1))
    result["latency_of_one_image"] = single["seconds"]
    result["overhead_of_one_image"] = single["overhead"]
    return result


def timed(setting: Setting) -> dict:
    """Seconds per batch of each kind of pass, images per second, and their ratios."""
    backbone, attention = build(setting)
    graphs, states = zip(*map(nnx.split, (backbone, attention)))
    images = to_float(noise(setting))

    def classify(states, images):
        return nnx.merge(graphs[0], states[0])(backbone.preprocessing.standardise(images))

    def explain_classes(states, images, classes):
        return TTAME(*map(nnx.merge, graphs, states)).explain(images, classes)

    every = jnp.arange(backbone.num_classes)
    passes = {
        "logits": (lambda *arguments: classify(*arguments)[0], states, images),
        "logits_and_features": (classify, states, images),
        "one_class": (explain_classes, states, images, None),
        "all_classes": (explain_classes, states, images, every),
    }
    seconds = median_seconds(
        {name: repeated(*arguments) for name, arguments in passes.items()}, setting.rounds
    )
    bare = min(seconds["logits"], seconds["logits_and_features"])
    explained = ("one_class", "all_classes")
    return {
        "seconds": seconds,
        "images_per_second": {name: setting.batch_size / t for name, t in seconds.items()},
        "overhead": {name: seconds[name] / bare for name in explained},
        "flops_overhead": {
            name: layer_flops(*passes[name]) / layer_flops(*passes["logits"]) for name in explained
        },
    }


def repeated(function, *arguments):
    """The compiled function as a side of `median_seconds`."""
    compiled = jax.jit(function).lower(*arguments).compile()

    def side(count: int):
        for _ in range(count):
            jax.block_until_ready(compiled(*arguments))

    return side


if __name__ == "__main__":
    main(run, tyro.cli(Setting, description=__doc__))

"""Seconds of an exported ONNX model in ONNX Runtime and of the explainer in JAX, as JSON.

    python benchmarks/export.py --backbone squeezenet1_1 --batch-size 1

Both explain one class of each image. The graph also explains the likeliest class. `ratio` is
ONNX Runtime's time divided by JAX's.
"""

import jax
import numpy as np
import onnxruntime
import tyro
from common import Setting, main, median_seconds
from ours import build, device, noise

from ttame_jax import TTAME, Explainer
from ttame_jax.export import onnx_model
from ttame_jax.preprocessing import to_float


def run(setting: Setting) -> dict:
    explainer = Explainer(TTAME(*build(setting)))
    images = to_float(np.asarray(noise(setting)))
    classes = np.zeros((len(images), 1), np.int32)
    session = onnxruntime.InferenceSession(onnx_model(explainer))

    def in_jax(count):
        for _ in range(count):
            jax.block_until_ready(explainer(images, classes))

    def in_onnx_runtime(count):
        for _ in range(count):
            session.run(None, {"images": images, "classes": classes})

    seconds = median_seconds({"jax": in_jax, "onnx": in_onnx_runtime}, setting.rounds)
    return {"seconds": seconds, "ratio": seconds["onnx"] / seconds["jax"], **device()}


if __name__ == "__main__":
    main(run, tyro.cli(Setting, description=__doc__))

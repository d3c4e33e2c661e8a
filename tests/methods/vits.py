"""Small ViTs with weights far from their start, in float64."""

import functools

import jax
from flax import nnx

from ttame_jax.backbones.vit import Architecture, ViT
from ttame_jax.preprocessing import Preprocessing

SIZES: dict = {"patch_size": 8, "width": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
SIZES["preprocessing"] = Preprocessing(image_size=32, resize_size=32)
PLAIN = Architecture(**SIZES)
REFINED = Architecture(
    **SIZES,
    activation="quick_gelu",
    qkv_bias=False,
    registers=3,
    embed_prefix=False,
    pre_norm=True,
    layer_scale=True,
)
AVERAGING = Architecture(**SIZES, class_token=False, pool="average")


def randomised(backbone, seed=0):
    """Weights far from their start: biases and norms that are not 0 and 1, larger kernels."""
    keys = iter(jax.random.split(jax.random.key(seed), 1000))
    for _, value in nnx.to_flat_state(nnx.state(backbone, nnx.Param)):
        value[...] += 0.1 * jax.random.normal(next(keys), value.shape, value.dtype)
    return backbone


def one_image():
    return jax.random.uniform(jax.random.key(1), (1, 32, 32, 3), "float64")


@functools.cache
def build(architecture):
    return randomised(ViT("tiny", architecture, dtype="float64", rngs=nnx.Rngs(0)))

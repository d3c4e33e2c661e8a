"""On a machine without an accelerator, programs are lowered for any platform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from ttame_jax import TTAME, AttentionMechanism, compilers
from ttame_jax.losses import LossConfig
from ttame_jax.training.optimizer import OneCycle, one_cycle_sgd
from ttame_jax.training.step import initial_state, make_train_step
from ttame_jax.weights import load_backbone

PLATFORMS = ("cpu", "cuda", "tpu")


@pytest.fixture(params=["digits_cnn", "digits_vit"])
def method(request, monkeypatch):
    """T-TAME whose images pass through the backbone two at a time on a CPU."""
    monkeypatch.setattr(compilers, "CPU_PIXELS", 2 * 64 * 64)
    backbone = load_backbone(request.param, dtype="bfloat16")
    channels = [shape[-1] for shape in backbone.feature_shapes()]
    attention = AttentionMechanism(channels, backbone.num_classes, rngs=nnx.Rngs(0))
    return TTAME(backbone, attention)


def loops(function, *inputs) -> dict[str, bool]:
    """Whether the program for each platform has a loop."""
    return {
        platform: "stablehlo.while"
        in jax.export.export(function, platforms=[platform])(*inputs).mlir_module()
        for platform in PLATFORMS
    }


def test_only_a_cpus_explainer_has_loops(method):
    graph, state = nnx.split(method)
    explain = jax.jit(lambda state, images: nnx.merge(graph, state).explain(images).maps)
    images = jnp.zeros((4, 64, 64, 3))
    assert loops(explain, state, images) == {"cpu": True, "cuda": False, "tpu": False}


def test_one_exported_explainer_runs_on_every_platform(method):
    graph, state = nnx.split(method)
    explain = jax.jit(lambda state, images: nnx.merge(graph, state).explain(images).maps)
    images = jax.random.uniform(jax.random.key(0), (4, 64, 64, 3))
    exported = jax.export.export(explain, platforms=PLATFORMS)(state, images)
    assert exported.platforms == PLATFORMS
    np.testing.assert_allclose(exported.call(state, images), explain(state, images), atol=1e-5)


def test_only_a_cpus_training_step_has_loops(method):
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    optimizer = one_cycle_sgd(OneCycle(0.01, 10))
    step = make_train_step(
        method.backbone, method.attention, optimizer, mesh, "pixel", LossConfig()
    )
    inputs = (
        initial_state(method.attention, optimizer),
        nnx.state(method.backbone),
        jnp.zeros((4, 64, 64, 3), jnp.uint8),
    )
    assert loops(step, *inputs) == {"cpu": True, "cuda": False, "tpu": False}

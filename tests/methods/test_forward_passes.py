import importlib

import jax
import jax.numpy as jnp
import pytest
from counting import count_passes
from flax import nnx

from ttame_jax.attention import AttentionMechanism
from ttame_jax.methods import compute_maps, load_method
from ttame_jax.methods.vit_rules import classify
from ttame_jax.weights import load_backbone

IMAGES = jax.random.uniform(jax.random.key(0), (2, 64, 64, 3))
CLASSES = jnp.array([[1, 2], [3, 4]])


@pytest.mark.parametrize("backbone", ["digits_cnn", "digits_vit"])
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("gradcam", {}),
        ("gradcam++", {}),
        ("layercam", {}),
        ("integrated_gradients", {"steps": 3}),
        ("scorecam", {}),
        ("ablationcam", {}),
        ("rise", {"masks": 21}),
        ("ttame", {}),
        ("lcam", {}),
        ("gaussian", {}),
        ("random", {}),
    ],
)
def test_a_method_makes_as_many_forward_passes_as_it_says(name, config, backbone):
    backbone = load_backbone(backbone)
    channels = [c for _, _, c in backbone.feature_shapes()]
    variant = "lcam" if name == "lcam" else "ttame"
    attention = AttentionMechanism(channels, 10, variant=variant, rngs=nnx.Rngs(0))
    method = load_method(name, backbone, attention, **config)
    assert count_passes(method, IMAGES, CLASSES) == method.forward_passes


@pytest.mark.parametrize("name", ["attnlrp", "libragrad"])
def test_a_method_with_its_own_forward_pass_runs_it_once_for_each_image(name, monkeypatch):
    module, passes = importlib.import_module(f"ttame_jax.methods.{name}"), []

    def counted(backbone, tokens, *options):
        jax.debug.callback(passes.append, tokens.sum())
        return classify(backbone, tokens, *options)

    monkeypatch.setattr(module, "classify", counted)
    method = load_method(name, load_backbone("digits_vit"))
    jax.block_until_ready(compute_maps(method, IMAGES, CLASSES))
    jax.effects_barrier()
    assert len(passes) / len(IMAGES) == method.forward_passes

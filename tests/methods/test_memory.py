import jax
import jax.numpy as jnp
import pytest

from ttame_jax.methods import RISE, AblationCAM, ScoreCAM, base
from ttame_jax.methods.base import compiled_maps
from ttame_jax.weights import load_backbone


def peak(method, images=2, size=64):
    """Bytes that the compiled method needs beside its arguments and results."""
    shapes = jax.ShapeDtypeStruct((images, size, size, 3), jnp.float32)
    lowered = compiled_maps.lower(method, shapes, jax.ShapeDtypeStruct((images, 1), jnp.int32))
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("backbone", ["digits_cnn", "digits_vit"])
def test_memory_of_rise_does_not_grow_with_its_masks(backbone):
    backbone = load_backbone(backbone)
    assert peak(RISE(backbone, masks=800)) < 1.05 * peak(RISE(backbone, masks=80))


@pytest.mark.parametrize("method", [pytest.param(ScoreCAM, marks=pytest.mark.slow), AblationCAM])
def test_memory_of_perturbed_channels_is_that_of_a_chunk(method, monkeypatch):
    def peak_with(chunk):  # of the 64 channels of two images
        monkeypatch.setattr(base, "FORWARD_BATCH", chunk)
        jax.clear_caches()
        return peak(method(load_backbone("digits_vit")))

    assert 4 * peak_with(4) < peak_with(64)

import dataclasses
from contextlib import closing, nullcontext

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from ttame_jax.data import load_source
from ttame_jax.data.loader import train_batches
from ttame_jax.experiments.train import train
from ttame_jax.mesh import AXIS, replicate
from ttame_jax.preprocessing import to_float
from ttame_jax.runs import build_attention, build_backbone, load_attention, load_run
from ttame_jax.training import loop
from ttame_jax.training.feature_scale import measure_feature_scale


@pytest.fixture
def config(config):
    return dataclasses.replace(
        config,
        epochs=2,
        batch_size=16,
        learning_rate=0.01,
        validation_images=0,
        scale_features=True,
    )


def batches(config):
    preprocessing = build_backbone(config).preprocessing
    return closing(
        train_batches(
            load_source(config.dataset, "train"), preprocessing, 16, seed=config.seed, workers=0
        )
    )


def measured(config, backbone, devices):
    mesh = Mesh(np.array(jax.devices()[:devices]), (AXIS,))
    with batches(config) as images:
        return measure_feature_scale(
            backbone, replicate(nnx.state(backbone), mesh), mesh, images, 16
        )


def test_the_scale_is_the_root_mean_square_over_64_training_images(config):
    backbone = build_backbone(config)
    with batches(config) as first:
        images = np.concatenate([next(first)["image"] for _ in range(4)])
    _, features = backbone(backbone.preprocessing.standardise(to_float(images)))
    expected = [np.sqrt(np.square(np.asarray(x, np.float64)).mean()) for x in features]
    np.testing.assert_allclose(measured(config, backbone, 1), expected, rtol=1e-5)
    np.testing.assert_allclose(measured(config, backbone, 8), expected, rtol=1e-5)


def test_a_map_that_is_0_everywhere_is_refused(config):
    backbone = build_backbone(config)
    nnx.update(backbone, jax.tree.map(lambda x: x * 0, nnx.state(backbone)))
    with pytest.raises(ValueError, match="those of vit have .* of 0, 0, 0"):
        measured(config, backbone, 1)


@pytest.mark.parametrize("variant", ["ttame", "one_layer"])
def test_a_run_measures_once_and_its_weights_take_the_scale_over(config, variant, capfd):
    config = dataclasses.replace(config, variant=variant, epochs=1, validation_images=8)
    first = {"ttame": 0, "one_layer": 2}[variant]
    expected = measured(config, build_backbone(config), 8)[first:]
    train(config)
    assert "root mean squares of the feature maps: " in capfd.readouterr().err
    attention = build_attention(config, build_backbone(config))
    load_attention(config.output, attention)
    np.testing.assert_allclose(attention.feature_scale[...], expected, rtol=1e-6)

    run = load_run(config.output)
    assert run.attention.feature_scale is None
    images = np.random.default_rng(0).uniform(size=(4, 32, 32, 3)).astype(np.float32)
    _, features = run.backbone(run.backbone.preprocessing.standardise(images))
    np.testing.assert_allclose(run.attention(features), attention(features), atol=1e-5)


def test_a_resumed_run_keeps_its_scale(config, monkeypatch):
    whole = dataclasses.replace(config, output=config.output.with_name("whole"))
    train(whole)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "preemption", lambda: nullcontext(lambda step: step == 2))
        assert not train(config)
        with pytest.raises(ValueError, match="--scale-features was True"):
            train(dataclasses.replace(config, scale_features=False))
        patch.setattr(loop, "measure_feature_scale", None)  # not called again
        patch.setattr(loop, "preemption", lambda: nullcontext(lambda step: False))
        assert train(config)
    runs = (load_run(c.output).attention for c in (config, whole))
    for one, other in zip(*(jax.tree.leaves(nnx.state(attention)) for attention in runs)):
        np.testing.assert_array_equal(one, other)

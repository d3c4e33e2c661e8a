import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from tiny import TINY

from ttame_jax import AttentionMechanism, load_backbone
from ttame_jax.data import evaluation_batches, load_source
from ttame_jax.masking import upsample
from ttame_jax.methods import TTAME, compute_maps
from ttame_jax.metrics import evaluation
from ttame_jax.metrics.evaluation import Evaluator, intervals, summarise
from ttame_jax.preprocessing import to_float

METRICS = ("ad", "ic", "road", "road_reference", "insertion", "deletion")


@pytest.fixture(scope="module")
def method():
    return TTAME(load_backbone("vit", **TINY), AttentionMechanism([32] * 3, 5, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def source(pictures):
    return load_source(f"folder:{pictures}", "validation")


@pytest.fixture(scope="module")
def rows(method, source):
    return Evaluator(method, source, metrics=METRICS, batch_size=8)()


def test_every_image_has_one_row(rows, source):
    """20 images in batches of 8: the last batch is padded, and padding has no row."""
    np.testing.assert_array_equal(rows["index"], np.arange(len(source)))
    assert rows["masked"].shape == (20, 3)
    assert rows["road_morf"].shape == rows["road_lerf"].shape == (20, 9)
    assert rows["road_reference_morf"].shape == (20, 7)
    assert all(np.isfinite(values).all() for values in rows.values())


@pytest.mark.slow
def test_neither_devices_nor_batches_change_the_result(rows, method, source, monkeypatch):
    def one_device():
        return Mesh(np.array(jax.devices()[:1]), ("data",))

    monkeypatch.setattr(evaluation, "data_mesh", one_device)
    alone = Evaluator(method, source, metrics=METRICS, batch_size=5)()
    for name, values in rows.items():
        np.testing.assert_allclose(alone[name], values, atol=1e-4)


def test_chosen_images_have_the_rows_that_they_have_among_all(rows, method, source):
    chosen = Evaluator(method, source, metrics=("ad",), indices=[17, 3], batch_size=8)()
    np.testing.assert_array_equal(chosen["index"], [17, 3])
    np.testing.assert_allclose(chosen["masked"], rows["masked"][[17, 3]], atol=1e-5)


def test_other_arrays_can_stand_in_for_the_methods_own(method, source):
    evaluator = Evaluator(method, source, metrics=("ad",), indices=[0, 1], batch_size=8)
    other = AttentionMechanism([32] * 3, 5, rngs=nnx.Rngs(9))
    state = nnx.State({"backbone": nnx.state(method.backbone), "attention": nnx.state(other)})
    expected = Evaluator(
        TTAME(method.backbone, other), source, metrics=("ad",), indices=[0, 1], batch_size=8
    )()
    np.testing.assert_allclose(evaluator(state)["masked"], expected["masked"], atol=1e-6)
    assert np.abs(evaluator()["masked"] - expected["masked"]).max() > 1e-4


def test_summary_has_the_promised_keys_and_intervals_around_its_means(rows):
    summary = summarise(rows, METRICS)
    assert list(summary["AD"]) == list(summary["IC"]) == ["100", "50", "15"]
    tens = [str(v) for v in range(10, 100, 10)]
    assert list(summary["ROAD"]["MoRF"]) == list(summary["ROAD"]["LeRF"]) == ["mean", *tens]
    assert "60" not in summary["ROAD_REFERENCE"]["MoRF"]
    np.testing.assert_allclose(
        summary["ROAD"]["MoRF"]["mean"], 100 * rows["road_morf"].mean(), rtol=1e-5
    )
    low_high = intervals(rows, METRICS, resamples=200)
    for mean, (low, high) in zip(
        jax.tree.leaves(summary),
        jax.tree.leaves(low_high, is_leaf=lambda x: isinstance(x, list)),
        strict=True,
    ):
        assert low <= mean <= high


def test_figures_are_the_summary_under_flat_names(method, source, rows):
    evaluator = Evaluator(method, source, metrics=("ic", "ad", "deletion"), batch_size=8)
    figures = evaluator.figures()
    percentages = ("100", "50", "15")
    names = [f"{key}_{percent}" for key in ("AD", "IC") for percent in percentages]
    assert list(figures) == [*names, "deletion_mean"]
    assert figures["AD_15"] == pytest.approx(summarise(rows, METRICS)["AD"]["15"], abs=1e-3)
    other = AttentionMechanism([32] * 3, 5, rngs=nnx.Rngs(9))
    state = nnx.State({"backbone": nnx.state(method.backbone), "attention": nnx.state(other)})
    assert evaluator.figures(state) != figures


def test_metrics_that_need_boxes_are_refused_without(method, source):
    for name in ("pointing", "energy", "maxboxacc"):
        message = f"{source} has no boxes: .* remove the metric '{name}'"
        with pytest.raises(ValueError, match=message):
            Evaluator(method, source, metrics=("ad", name))


def test_pointing_and_energy_read_the_boxes_of_their_own_images():
    digits = load_source("digits", "test[:12]")
    backbone = load_backbone("digits_vit")
    method = TTAME(backbone, AttentionMechanism([64] * 3, 10, rngs=nnx.Rngs(0)))
    rows = Evaluator(method, digits, metrics=("pointing", "energy"), batch_size=8)()
    (batch,) = evaluation_batches(digits, backbone.preprocessing, 12)
    maps = compute_maps(method, to_float(batch["image"]), rows["class"][:, None])[:, 0]
    maps = np.asarray(upsample(maps, (64, 64)))
    for i in range(12):
        (box,) = digits[i]["boxes"]
        top, left, bottom, right = (64 * box).astype(int)  # edges of pixels
        y, x = divmod(maps[i].argmax(), 64)
        assert rows["pointing"][i] == (top <= y < bottom and left <= x < right)
        energy = maps[i, top:bottom, left:right].sum() / maps[i].sum()
        assert rows["energy"][i] == pytest.approx(energy, abs=1e-5)
    assert 0 < rows["pointing"].sum() < 12
    summary = summarise(rows, ("pointing", "energy"))
    assert summary["pointing"]["mean"] == pytest.approx(100 * rows["pointing"].mean())
    assert summary["energy"]["mean"] == pytest.approx(100 * rows["energy"].mean())


def test_a_batch_is_no_larger_than_all_images_need(method, source):
    assert Evaluator(method, source, batch_size=8000).batch_size == 24  # of 20 images
    assert Evaluator(method, source, indices=range(3), batch_size=8000).batch_size == 8


def test_maps_that_are_not_finite_are_refused(method, source):
    class Overflowing(TTAME, name=None):
        def __call__(self, images, classes):
            maps = super().__call__(images, classes)
            return jnp.where(jnp.arange(len(images))[:, None, None, None] == 0, jnp.nan, maps)

    overflowing = Overflowing(method.backbone, method.attention)
    with pytest.raises(ValueError, match="the map of 000.png is not finite"):
        Evaluator(overflowing, source, metrics=("deletion",), batch_size=8)()

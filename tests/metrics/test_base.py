import jax.numpy as jnp
import numpy as np
import pytest

from ttame_jax.metrics import Metric, Sample, base, list_metrics, load_metric, load_metrics
from ttame_jax.preprocessing import Preprocessing

pytestmark = pytest.mark.quick

NAMES = ["ad", "ic", "road", "road_reference", "insertion", "deletion", "pointing", "energy"]
NAMES.append("maxboxacc")


def sample(predict=None):
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.random((2, 6, 6, 3)), jnp.float32)
    return Sample(
        predict=predict or (lambda x: jnp.stack([x.mean((1, 2, 3))] * 2, axis=1)),
        images=images,
        maps=jnp.asarray(rng.integers(0, 3, (2, 6, 6)) / 2, jnp.float32),  # many ties
        classes=jnp.array([0, 1]),
        confidence=jnp.array([0.5, 0.5]),
        preprocessing=Preprocessing(image_size=6, resize_size=6),
        masking="pixel",
        index=jnp.arange(2),
        key=None,
        inside=jnp.ones((2, 6, 6), bool),
    )


def test_metrics_have_a_fixed_order():
    assert list_metrics() == NAMES
    assert [metric.name for metric in load_metrics(["road", "ic", "ad", "ic"])] == NAMES[:3]


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="unknown metric 'roc'; available metrics: ad, ic, road,"):
        load_metrics(["ad", "roc"])


def test_only_metrics_of_localisation_need_objects():
    needing = {metric.name: metric.needs for metric in load_metrics(NAMES) if metric.needs}
    assert needing == {"pointing": "inside", "energy": "inside", "maxboxacc": "boxes"}


def test_naming_a_subclass_registers_it(monkeypatch):
    monkeypatch.setattr(base, "_METRICS", dict(base._METRICS))

    class Half(Metric, name="half"):
        table, label, lower_is_better = "halves", "Half", False

        def measure(self, sample):
            return {self.name: jnp.full(len(sample.maps), 0.5)}

    assert list_metrics() == [*NAMES, "half"]
    half = load_metric("half")
    assert half.summarise({"half": np.array([0.25, 0.5])}) == {"mean": 37.5}
    (row,) = half.table_rows()
    assert row.title == "Half↑" and row.value({"half": {"mean": 12.5}}) == 12.5


def test_pixels_are_ranked_once_for_all_metrics(monkeypatch):
    ranked = []
    rank = base.relevance_rank
    monkeypatch.setattr(base, "relevance_rank", lambda maps: ranked.append(maps) or rank(maps))
    shared = sample()
    for name in ("ad", "ic", "insertion", "deletion"):
        load_metric(name).measure(shared)
    assert len(ranked) == 1
    reverse, _ = shared.reverse_ranks, shared.reverse_ranks
    assert len(ranked) == 2
    # Ties rank by pixel index in both orders, so that one is not the reverse of the other.
    np.testing.assert_array_equal(reverse, rank(-shared.maps))
    assert (reverse != 35 - shared.ranks).any()


def test_ad_and_ic_share_their_masked_confidences():
    calls = []

    def predict(images):
        calls.append(len(images))
        return jnp.ones((len(images), 2)) / 2

    shared = sample(predict)
    columns = [load_metric(name).measure(shared)["masked"] for name in ("ic", "ad")]
    assert columns[0] is columns[1] and len(calls) == 3

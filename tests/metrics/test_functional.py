import jax
import numpy as np
import pytest
from tiny import TINY

from ttame_jax import load_backbone
from ttame_jax.data import load_source, preprocess
from ttame_jax.masking import upsample
from ttame_jax.methods import GradCAM, compute_maps
from ttame_jax.metrics import Evaluator, functional, summarise
from ttame_jax.preprocessing import to_float

METRICS = ("ad", "ic", "road", "insertion", "deletion")


@pytest.fixture(scope="module")
def method():
    return GradCAM(load_backbone("vit", **TINY))


@pytest.fixture(scope="module")
def predict(method):
    backbone = method.backbone
    return lambda images: jax.nn.softmax(backbone(backbone.preprocessing.standardise(images))[0])


@pytest.fixture(scope="module")
def explained(method, pictures):
    """Images and their maps."""
    paths = sorted((pictures / "validation").iterdir())
    images = to_float(np.stack([preprocess(p, method.backbone.preprocessing) for p in paths]))
    logits, _ = method.backbone(method.backbone.preprocessing.standardise(images))
    return images, compute_maps(method, images, logits.argmax(-1)[:, None])[:, 0]


@pytest.fixture(scope="module")
def expected(method, pictures):
    source = load_source(f"folder:{pictures}", "validation")
    rows = Evaluator(method, source, masking="pixel", metrics=METRICS, batch_size=8)()
    return summarise(rows, METRICS)


def assert_equal(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.02), ours, theirs)


def test_figures_equal_those_of_an_evaluation(predict, explained, expected):
    assert_equal(functional.measure(predict, *explained, METRICS, batch_size=8), expected)


def test_each_metric_is_a_function(predict, explained, expected, monkeypatch):
    assert_equal(functional.average_drop(predict, *explained), expected["AD"])
    monkeypatch.setattr(functional, "measure", lambda *_: expected)  # compiled once above
    assert_equal(functional.increase_in_confidence(predict, *explained), expected["IC"])
    assert_equal(functional.road(predict, *explained), expected["ROAD"])
    assert_equal(functional.insertion(predict, *explained), expected["insertion"]["mean"])
    assert_equal(functional.deletion(predict, *explained), expected["deletion"]["mean"])


def test_classifiers_of_other_frameworks_are_measured(predict, explained, expected):
    compiled = jax.jit(predict)

    def foreign(images):
        assert isinstance(images, np.ndarray)  # as PyTorch's from_numpy needs
        return np.asarray(compiled(images))

    assert_equal(functional.deletion(foreign, *explained), expected["deletion"]["mean"])


def test_given_classes_are_measured(predict, explained):
    images, maps = explained
    likeliest = np.asarray(predict(images)).argmax(-1)
    own = functional.average_drop(predict, images, maps)
    assert functional.average_drop(predict, images, maps, classes=likeliest) == own
    other = functional.average_drop(predict, images, maps, classes=(likeliest + 1) % 5)
    assert other != own


def test_localisation_needs_no_classifier():
    maps = np.zeros((2, 2, 2), np.float32)
    maps[0, 0, 0] = maps[1, 1, 1] = 1
    inside = np.zeros((2, 8, 8), bool)
    inside[:, :4, :4] = True
    assert functional.pointing(maps, inside) == 50
    upsampled = np.asarray(upsample(maps, (8, 8)))
    shares = [(m * i).sum() / m.sum() for m, i in zip(upsampled, inside)]
    assert functional.energy(maps, inside) == pytest.approx(100 * np.mean(shares), abs=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((2, 8, 8))}, r"images must be \[N, H, W, 3\]"),
        ({"images": np.full((2, 8, 8, 3), 7.0)}, r"images must be floats in \[0, 1\]"),
        ({"maps": np.zeros((1, 2, 2))}, "one per image"),
        ({"maps": np.full((2, 2, 2), np.nan)}, r"maps must be floats in \[0, 1\]"),
        ({"classes": [0, 2]}, "classes must lie in 0 to 1"),
        ({"classes": [0]}, r"integers \[N\] with N = 2"),
        ({"inside": np.ones((2, 4, 4), bool)}, r"inside must be bool \[2, 8, 8\]"),
        ({"metrics": ("nope",)}, "unknown metric 'nope'"),
        ({"metrics": ("pointing",)}, "'pointing' needs inside"),
        ({"metrics": ("maxboxacc",)}, "'maxboxacc' needs boxes"),
        ({"boxes": np.ones((2, 4))}, r"boxes must be \[N, M, 4\] with N = 2"),
        ({"boxes": np.full((2, 1, 4), [2, 2, 6, 6])}, "as fractions of the image"),
        ({"predict": lambda images: 9 * np.ones((len(images), 3))}, "apply a softmax"),
        ({"predict": lambda images: np.ones(len(images))}, "must return probabilities"),
    ],
)
def test_what_cannot_be_measured_is_refused(change, message):
    arguments = {
        "predict": lambda images: np.full((len(images), 2), 0.5),
        "images": np.zeros((2, 8, 8, 3)),
        "maps": np.zeros((2, 2, 2)),
    }
    with pytest.raises(ValueError, match=message):
        functional.measure(**(arguments | change))

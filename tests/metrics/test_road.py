import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from real_images import read_images

from ttame_jax import load_backbone
from ttame_jax.convert.pytorch.torch_import import import_torchvision
from ttame_jax.metrics.confidence import confidence
from ttame_jax.metrics.road import PROTOCOLS, Protocol, road, unchanged
from ttame_jax.metrics.selection import relevance_rank

KEY = jax.random.key(0)


@functools.partial(jax.jit, static_argnames=("predict", "protocol"))
def measure(predict, images, maps, classes, indices, key, protocol=PROTOCOLS["paper"]):
    orders = relevance_rank(maps), relevance_rank(-maps)
    return road(predict, images, *orders, classes, indices, key, protocol)


def example(batch=3, size=20, seed=0):
    """Images, maps and classes of a classifier with three classes."""
    rng = np.random.default_rng(seed)
    images = rng.normal(0, 1, (batch, size, size, 3)).astype(np.float32)
    maps = rng.random((batch, size, size), np.float32)
    return images, maps, rng.integers(0, 3, batch)


def brightest_channel(images):
    """Probabilities of three classes: which colour channel is brightest in the upper half."""
    return jax.nn.softmax(20 * images[:, :10].mean((1, 2)))


def test_scores_by_hand():
    probabilities = jnp.array([[0.7, 0.2, 0.1], [0.1, 0.4, 0.5]])
    classes = jnp.array([1, 2])
    np.testing.assert_allclose(confidence(probabilities, classes), [0.2, 0.5])
    np.testing.assert_array_equal(unchanged(probabilities, classes), [0, 1])


def test_each_order_removes_its_end_of_the_map():
    images, maps, classes = example()
    n = maps[0].size

    def changed(imputed):
        return (imputed != images).any(-1).reshape(-1, n)

    protocol = Protocol((10, 33), lambda pixels, classes: pixels)
    scores = measure(changed, images, maps, classes, np.arange(3), KEY, protocol)
    places = np.argsort(np.argsort(-maps.reshape(-1, n)))
    for column, count in enumerate((40, 132)):
        np.testing.assert_array_equal(scores.morf[:, column], places < count)
        np.testing.assert_array_equal(scores.lerf[:, column], places >= n - count)


def test_informative_map_separates_the_orders_and_a_constant_one_does_not():
    images = example()[0]
    images[:, :10, :, 1] += 1
    maps = np.zeros(images.shape[:3], np.float32)
    maps[:, :10] = np.linspace(1, 2, 10)[:, None]
    classes, indices = np.ones(3, int), np.arange(3)
    scores = measure(brightest_channel, images, maps, classes, indices, KEY)
    assert scores.morf.shape == scores.lerf.shape == (3, 9)
    assert np.all(scores.lerf[:, :5] > 0.999)  # the lower half plays no part
    assert np.all(scores.morf.mean(1) < scores.lerf.mean(1))
    constant = measure(brightest_channel, images, np.ones_like(maps), classes, indices, KEY)
    np.testing.assert_array_equal(constant.morf, constant.lerf)


def test_scores_do_not_depend_on_the_batch_but_on_index_and_key():
    images, maps, classes = example()
    protocol = Protocol((50, 90), confidence)

    def run(rows, indices, key=KEY):
        rows = np.asarray(rows)
        scores = measure(
            brightest_channel, images[rows], maps[rows], classes[rows], indices, key, protocol
        )
        return np.stack(scores)

    together = run([0, 1, 2], np.array([7, 8, 9]))
    np.testing.assert_allclose(run([2, 0], np.array([9, 7])), together[:, [2, 0]], atol=1e-6)
    assert np.abs(run([0, 1, 2], np.array([17, 8, 9])) - together)[:, 0].max() > 1e-5
    assert np.abs(run([0, 1, 2], np.array([7, 8, 9]), jax.random.key(1)) - together).max() > 1e-5


def test_reference_protocol_is_the_share_of_unchanged_predictions():
    images, maps, _ = example()
    classes = np.asarray(brightest_channel(images).argmax(1))
    protocol = PROTOCOLS["reference"]
    scores = measure(brightest_channel, images, maps, classes, np.arange(3), KEY, protocol)
    assert protocol.percentages == (10, 20, 30, 40, 50, 70, 90)
    assert scores.morf.shape == (3, 7)
    assert set(np.unique(scores.morf)) <= {0, 1}
    seen = measure(brightest_channel, images, maps, classes, np.arange(3), KEY)
    assert np.all((np.asarray(seen.morf)[:, [0, 4]] > 0.5) <= np.asarray(scores.morf)[:, [0, 4]])


def test_maps_of_another_size_are_refused():
    images, maps, classes = example()
    with pytest.raises(ValueError, match="resize"):
        measure(brightest_channel, images, maps[:, ::2, ::2], classes, np.arange(3), KEY)


def package_scores(shared, images, maps, classes, percentages):
    """MoRF and LeRF confidence [B, P] of pytorch-grad-cam's classes, on torchvision's model."""
    torch = pytest.importorskip("torch")
    torchvision = import_torchvision()
    road = pytest.importorskip("pytorch_grad_cam.metrics.road")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget
    from safetensors.torch import load_file

    torch.manual_seed(0)
    model = torchvision.models.squeezenet1_0()
    model.load_state_dict(load_file(shared / "weights/squeezenet1_0.safetensors"))
    inputs = torch.from_numpy(np.array(images.transpose(0, 3, 1, 2)))
    targets = [ClassifierOutputSoftmaxTarget(int(c)) for c in classes]
    return [
        np.stack(
            [
                order(100 - p)(inputs, maps, targets, model.eval(), return_diff=False)
                for p in percentages
            ],
            axis=1,
        )
        for order in (road.ROADMostRelevantFirst, road.ROADLeastRelevantFirst)
    ]


@pytest.mark.slow
def test_equals_the_package_on_real_images_within_half_a_point(shared):
    backbone = load_backbone("squeezenet1_0", weights=shared / "weights/squeezenet1_0.safetensors")
    graph, state = nnx.split(backbone)
    images = read_images(shared, backbone.preprocessing, 4)
    protocol = Protocol((10, 50, 90), confidence)

    @jax.jit
    def explain_and_measure(state, images):
        backbone = nnx.merge(graph, state)
        logits, features = backbone(images)
        classes = logits.argmax(1)
        maps = jnp.abs(features[-1]).mean(-1)
        maps = jax.image.resize(maps, images.shape[:3], "bilinear")

        def predict(imputed):
            return jax.nn.softmax(backbone(imputed)[0])

        indices = jnp.arange(len(images))
        orders = relevance_rank(maps), relevance_rank(-maps)
        return road(predict, images, *orders, classes, indices, KEY, protocol), maps, classes

    got, maps, classes = explain_and_measure(state, images)
    maps = np.array(maps)
    expected = package_scores(shared, images, maps, classes, protocol.percentages)
    for ours, theirs in zip(got, expected):
        assert abs(100 * np.mean(ours) - 100 * np.mean(theirs)) < 0.5

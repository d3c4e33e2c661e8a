import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from tiny import TINY

from ttame_jax import compilers
from ttame_jax.attention import AttentionMechanism
from ttame_jax.losses import RECIPES, LossConfig, cross_entropy, total_loss
from ttame_jax.masking import mask_images, upsample
from ttame_jax.mesh import replicate, shard_batch
from ttame_jax.methods import LibraGrad
from ttame_jax.training.optimizer import OneCycle, one_cycle_sgd
from ttame_jax.training.step import initial_state, make_train_step
from ttame_jax.weights import load_backbone

IMAGES = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)


def setup(
    devices=1,
    dtype="float32",
    masking=None,
    recipe="paper",
    peak=0.05,
    synchronise=False,
    **weights,
):
    backbone = load_backbone("vit", dtype=jnp.dtype(dtype), **TINY)
    attention = AttentionMechanism(
        [32] * 3,
        5,
        dtype=jnp.dtype(dtype),
        sigmoid_maps=RECIPES[recipe].scaled,
        rngs=nnx.Rngs(1),
    )
    optimizer = one_cycle_sgd(OneCycle(peak, 30))
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    masking = masking or backbone.masking
    step = make_train_step(
        backbone,
        attention,
        optimizer,
        mesh,
        masking,
        LossConfig(recipe, **weights),
        synchronise=synchronise,
    )
    state = replicate(initial_state(attention, optimizer), mesh)
    backbone_state = replicate(nnx.state(backbone), mesh)

    def run(state, images):
        return step(state, backbone_state, shard_batch(images, mesh))

    run.compiled = lambda: step.lower(state, backbone_state, IMAGES).compile().as_text()
    return backbone, attention, state, run


def literal_loss(backbone, attention, images, masking, recipe, complement_weight):
    """The step in the order of the paper: all class maps, then those of the model truths."""
    preprocessing = backbone.preprocessing
    images = images / 255.0
    logits, features = backbone(preprocessing.standardise(images))
    classes = logits.argmax(-1)
    maps = jax.nn.sigmoid(attention(features, train=True))[:, classes]
    if recipe in ("scaled", "complement", "relevance"):
        low, high = maps.min((2, 3), keepdims=True), maps.max((2, 3), keepdims=True)
        maps = (maps - low) / (high - low)
    masks = upsample(maps[jnp.arange(len(images)), jnp.arange(len(images))], (32, 32))
    masked_logits, _ = backbone(mask_images(images, masks, preprocessing, masking))
    loss, terms = total_loss(maps, cross_entropy(masked_logits, classes), LossConfig(recipe))
    if complement_weight:
        left_out, _ = backbone(mask_images(images, 1 - masks, preprocessing, masking))
        kept = jax.nn.softmax(left_out)[jnp.arange(len(images)), classes]
        terms["complement"] = -jnp.log(1 - kept).mean()
        loss += complement_weight * terms["complement"]
    if recipe == "relevance":
        own = maps[jnp.arange(len(images)), jnp.arange(len(images))]
        inputs, biases = LibraGrad(backbone).attributions(images, classes[:, None])
        relevance = (inputs.sum(2) + biases)[:, 0, 1:]  # without the class token
        pairs = zip(own.reshape(len(images), -1), relevance)
        terms["relevance"] = 1 - jnp.mean(jnp.stack([jnp.corrcoef(a, b)[0, 1] for a, b in pairs]))
        loss += 2 * terms["relevance"]
    return loss, terms


@pytest.mark.parametrize(
    ("masking", "recipe", "group", "complement"),
    [
        ("pixel", "paper", 8, None),
        pytest.param("pixel", "reference", 2, None, marks=pytest.mark.slow),
        pytest.param("standardised", "paper", 2, 0.7, marks=pytest.mark.slow),
        ("standardised", "reference", 8, None),
        ("pixel", "scaled", 8, 0),
        ("standardised", "complement", 2, None),
        ("standardised", "relevance", 2, 0.7),
    ],
)
def test_a_step_follows_the_gradient_of_the_literal_loss(
    masking, recipe, group, complement, monkeypatch
):
    monkeypatch.setattr(compilers, "CPU_PIXELS", group * 32 * 32)
    weights = {"complement_weight": complement}
    backbone, attention, state, run = setup(masking=masking, recipe=recipe, **weights)
    complement = 0.5 if recipe == "complement" else complement
    graph, params, stats = nnx.split(attention, nnx.Param, nnx.BatchStat)

    def loss_fn(params):
        mechanism = nnx.merge(graph, params, stats, copy=True)
        images = IMAGES.astype(np.float32)
        return literal_loss(backbone, mechanism, images, masking, recipe, complement)

    (loss, terms), gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)
    optimizer = one_cycle_sgd(OneCycle(0.05, 30))
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    expected = jax.tree.map(np.asarray, jax.tree.map(jnp.add, params, updates))
    state, metrics = run(state, IMAGES)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert {"loss", *terms} == set(metrics)
    for name, value in terms.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_each_device_takes_its_part_alone_and_results_are_averaged():
    """Two devices on eight images: the mean of two single-device steps on four images each."""
    _, _, state, run = setup(devices=2)
    both, metrics = run(state, IMAGES)
    halves = []
    for part in (IMAGES[:4], IMAGES[4:]):
        _, _, state, run = setup(devices=1)
        halves.append(run(state, part))
    for name, value in metrics.items():
        np.testing.assert_allclose(value, np.mean([m[name] for _, m in halves]), rtol=1e-5)
    for field in ("params", "batch_stats"):
        leaves = [jax.tree.leaves(getattr(s, field)) for s in (both, halves[0][0], halves[1][0])]
        for together, first, second in zip(*leaves):
            np.testing.assert_allclose(together, (first + second) / 2, atol=1e-6)


@pytest.mark.parametrize("recipe", ["paper", pytest.param("reference", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_synchronised_the_number_of_devices_changes_nothing(recipe):
    """Not even with one image a device, whose own Psi would be a single map."""
    results = []
    for devices, synchronise in ((1, False), (4, True), (8, True)):
        _, _, state, run = setup(devices, recipe=recipe, synchronise=synchronise)
        for _ in range(10):
            state, metrics = run(state, IMAGES)
        results.append(jax.tree.leaves((state, metrics)))
    for one, four, eight in zip(*results, strict=True):
        np.testing.assert_allclose(four, one, atol=1e-5)
        np.testing.assert_allclose(eight, one, atol=1e-5)


def all_reduced(text):
    """The shapes that each all-reduce of a compiled program takes across devices."""
    found = [line for line in text.splitlines() if re.search(r" all-reduce(-start)?\(", line)]
    assert "reduce-scatter(" not in text
    return [re.findall(r"f32\[([\d,]*)\]", line.partition(" all-reduce")[0]) for line in found]


def test_gradients_cross_devices_once_a_step():
    """In one all-reduce with the statistics and the four terms of the loss; nothing else does."""
    _, _, state, run = setup(devices=8)
    crossing = jax.tree.leaves((state.params, state.batch_stats)) + 4 * [jnp.zeros(())]
    (shapes,) = all_reduced(run.compiled())
    assert sorted(shapes) == sorted(",".join(map(str, x.shape)) for x in crossing)


def test_synchronised_only_small_statistics_cross_besides():
    _, _, state, run = setup(devices=8, synchronise=True)
    shapes = [shape for shapes in all_reduced(run.compiled()) for shape in shapes]
    kernels = [x.shape for x in jax.tree.leaves(state.params) if x.ndim == 2]
    assert sorted(x for x in shapes if x.count(",") == 1) == sorted(f"{a},{b}" for a, b in kernels)
    others = sum(int(np.prod([int(n) for n in x.split(",") if n])) for x in shapes) - sum(
        a * b for a, b in kernels
    )
    assert others < 40 * 32  # a few values a channel of the three BatchNorms


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_the_loss_falls_and_parameters_stay_float32(dtype):
    _, _, state, run = setup(devices=8, dtype=dtype)
    state, first = run(state, IMAGES)
    first = float(first["loss"])
    for _ in range(25):
        state, metrics = run(state, IMAGES)
    assert float(metrics["loss"]) < 0.9 * first
    assert int(state.step) == 26
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((state.params, state.batch_stats)))


def test_the_state_is_donated():
    _, _, state, run = setup()
    before = jax.tree.leaves(state.params)
    run(state, IMAGES)
    assert all(x.is_deleted() for x in before)


def test_backbone_parameters_are_arguments_not_constants():
    backbone, attention, state, _ = setup()
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    optimizer = one_cycle_sgd(OneCycle(0.05, 30))
    step = make_train_step(backbone, attention, optimizer, mesh, "pixel", LossConfig())
    text = step.lower(state, nnx.state(backbone), IMAGES).as_text()
    largest = max((len(line) for line in text.splitlines() if "constant" in line), default=0)
    assert largest < 10_000

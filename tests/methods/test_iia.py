import jax
import jax.numpy as jnp
import numpy as np
import pytest
from counting import count_passes
from flax import nnx
from jax.sharding import PartitionSpec as P
from tiny import TINY

from ttame_jax.backbones.vit import Architecture, ViT
from ttame_jax.masking import min_max_scale
from ttame_jax.mesh import AXIS, data_mesh
from ttame_jax.methods import compute_maps
from ttame_jax.methods.base import compiled_maps
from ttame_jax.methods.iia import IIA, integrate
from ttame_jax.methods.vit_blocks import run_block
from ttame_jax.weights import load_backbone

CLASSES = jnp.tile(jnp.array([[0, 3, 4]]), (16, 1))


@pytest.fixture(scope="module")
def cnn():
    return load_backbone("digits_cnn")


@pytest.fixture(scope="module")
def vit():
    return load_backbone("vit", **TINY)


@pytest.fixture(scope="module")
def images():
    return jax.random.uniform(jax.random.key(1), (16, 64, 64, 3))


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def test_an_integral_is_the_mean_over_its_points():
    # (0 + 1/16 + 1/4 + 9/16 + 1) / 5
    squares = integrate(lambda a: jnp.stack([a**2, 1 + a]), jnp.linspace(0, 1, 5))
    np.testing.assert_allclose(squares, [0.375, 1.5])


def test_a_linear_head_has_a_closed_form(cnn, images):
    """Its gradient is one weight w a channel, wherever the integral is: the inner one is
    ``(u - r) (r + u) / 2 w``."""
    before, _ = cnn.split()
    standardised, paper, reference = cnn.preprocessing.standardise(images), 0, 0
    for a in np.linspace(0, 1, 5):
        (u,) = before(a * standardised)
        r = u.min(axis=(1, 2), keepdims=True)
        paper += ((u - r) * (u + r) / 2) @ cnn.class_weights
        reference += u @ cnn.class_weights
    for recipe, expected in (("paper", paper), ("reference", reference)):
        maps = compute_maps(IIA(cnn, recipe=recipe, steps=4), images, CLASSES)
        expected = min_max_scale(jnp.moveaxis(expected, -1, 1)[:, jnp.array([0, 3, 4])])
        np.testing.assert_allclose(maps, expected, atol=1e-4)


def test_of_a_vit_every_step_runs_the_whole_network(vit, images):
    """The double integral written out: image and last attention map grow from nothing, the map
    is a constant, and positive products of map and gradient add up."""
    images = images[:, :32, :32]
    (*standardised,) = vit.preprocessing.standardise(images[:2])
    products_of_step = jax.jit(lambda *step: products_of(vit, *step))
    expected = []
    for image, target in zip(standardised, (3, 0)):
        sums = jnp.zeros((3, 17, 17))
        for a in np.linspace(0, 1, 4):
            for b in np.linspace(0, 1, 4):
                products = jax.nn.relu(products_of_step(a * image, b, target))
                sums += products.mean(axis=1) / 16
        row = np.eye(17)[0]
        for total in sums[::-1]:
            matrix = total + np.eye(17)
            row = row @ (matrix / matrix.sum(axis=1, keepdims=True))
        expected.append(row[1:].reshape(1, 4, 4))
    maps = compute_maps(IIA(vit, steps=3), images[:2], jnp.array([[3], [0]]))
    np.testing.assert_allclose(maps, min_max_scale(jnp.stack(expected)), atol=1e-4)


def products_of(vit, image, b, target):
    """Attention maps times gradients of one image, [blocks, heads, N, N]."""
    (tokens,) = vit.embed(image[None])

    def run(shifts, constant=None):
        x, maps = tokens, []
        for i, block in enumerate(vit.blocks):

            def change(weights, i=i):
                last = constant is not None and i == len(vit.blocks) - 1
                return (constant if last else weights) + shifts[i]

            x, trace = run_block(block, x, change)
            maps.append(trace.weights)
        return vit.head(vit.pooled(x[None]))[0, target], jnp.stack(maps)

    shifts = jnp.zeros((3, 2, 17, 17))
    constant = b * run(shifts)[1][-1]
    gradients, maps = jax.grad(run, has_aux=True)(shifts, constant)
    return gradients * maps


@pytest.mark.parametrize("recipe", ["paper", "reference"])
@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_neither_other_images_nor_other_classes_change_a_map(name, recipe, images, request):
    backbone = request.getfixturevalue(name)
    size = backbone.preprocessing.image_size
    images = images[:, :size, :size]
    method = IIA(backbone, recipe=recipe, steps=2)
    together = compute_maps(method, images, CLASSES)
    assert together.shape == (16, 3, *backbone.feature_shapes()[-1][:2])
    assert together.dtype == jnp.float32
    np.testing.assert_allclose(together.min(axis=(2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(together.max(axis=(2, 3)), 1, rtol=1e-6)
    assert np.abs(together[:, 0] - together[:, 1]).max() > 0.01
    alone = compute_maps(method, images[2:3], CLASSES[2:3, 1:2])
    np.testing.assert_allclose(together[2, 1], alone[0, 0], atol=1e-4)


def test_devices_share_the_images(vit, images):
    method, images = IIA(vit, steps=2), images[:, :32, :32]
    graph, state = nnx.split(method)
    step = jax.shard_map(
        lambda state, *batch: nnx.merge(graph, state)(*batch),
        mesh=data_mesh(),
        in_specs=(P(), P(AXIS), P(AXIS)),
        out_specs=P(AXIS),
        check_vma=False,
    )
    maps = jax.jit(step)(state, images, CLASSES)
    np.testing.assert_allclose(maps, compute_maps(method, images, CLASSES), atol=1e-4)


@pytest.mark.parametrize("name", ["cnn", "vit"])
@pytest.mark.slow
def test_memory_does_not_grow_with_the_steps(name, images, request):
    backbone = request.getfixturevalue(name)
    size = backbone.preprocessing.image_size

    def peak(steps):
        lowered = compiled_maps.lower(IIA(backbone, steps=steps), images[:, :size, :size], CLASSES)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert peak(40) < 1.01 * peak(4)


def test_a_layer_is_chosen_by_name(cnn, images):
    maps = compute_maps(IIA(cnn, layer="layers.2.0", steps=1), images, CLASSES)
    assert maps.shape == (16, 3, 4, 4)
    np.testing.assert_array_equal(
        compute_maps(IIA(cnn, layer=cnn.target_layer, steps=1), images, CLASSES),
        compute_maps(IIA(cnn, steps=1), images, CLASSES),
    )


def test_a_flat_image_gives_a_map_without_nan(cnn):
    flat = jnp.broadcast_to(jnp.array(cnn.preprocessing.mean), (1, 64, 64, 3))
    assert np.isfinite(compute_maps(IIA(cnn, steps=1), flat, CLASSES[:1])).all()


@pytest.mark.parametrize("name", ["digits_cnn", "vit"])
@pytest.mark.slow
def test_a_backbone_in_bfloat16_is_explained(name, images):
    backbone = load_backbone("vit", **TINY, dtype="bfloat16")
    if name != "vit":
        backbone = load_backbone(name, image_size=32, dtype="bfloat16")
    maps = compute_maps(IIA(backbone, steps=1), images[:, :32, :32], CLASSES)
    assert maps.dtype == jnp.float32
    assert np.isfinite(maps).all()


def test_a_vit_of_one_block_is_explained(images):
    backbone = load_backbone("vit", **{**TINY, "depth": 1})
    maps = compute_maps(IIA(backbone, steps=1), images[:, :32, :32], CLASSES)
    assert np.isfinite(maps).all()


@pytest.mark.parametrize(
    ("name", "recipe", "passes"),
    [
        ("cnn", "paper", 121),
        ("cnn", "reference", 11),
        ("vit", "paper", 121),
        ("vit", "reference", 36),
    ],
)
def test_forward_passes_are_what_is_run(name, recipe, passes, images, request):
    backbone = request.getfixturevalue(name)
    size = backbone.preprocessing.image_size
    method = IIA(backbone, recipe=recipe)
    assert method.forward_passes == passes
    assert count_passes(method, images[:2, :size, :size], CLASSES[:2]) == passes


def test_what_does_not_apply_is_refused(cnn, vit):
    average = Architecture(patch_size=8, width=32, depth=3, num_heads=2, pool="average")
    backbone = ViT("averaging", average, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="iia follows the class token, but averaging"):
        IIA(backbone)
    with pytest.raises(ValueError, match="iia reads a ViT's attention maps, not layer 'blocks.1'"):
        IIA(vit, layer="blocks.1")
    with pytest.raises(ValueError, match="digits_cnn has no layer 'blocks.1'"):
        IIA(cnn, layer="blocks.1")
    with pytest.raises(ValueError, match="recipes of iia are 'paper' and 'reference'"):
        IIA(cnn, recipe="code")
    with pytest.raises(ValueError, match="1 step or more, not 0"):
        IIA(cnn, steps=0)

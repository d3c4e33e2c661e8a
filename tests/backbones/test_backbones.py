"""What every backbone promises, whatever its weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from running import run

from ttame_jax import compilers
from ttame_jax.backbones.layers import adaptive_average_pool
from ttame_jax.preprocessing import Preprocessing
from ttame_jax.weights import abstract_backbone, load_backbone
from ttame_jax.weights.transfer import parameters

TINY_VIT = {"image_size": 32, "patch_size": 8, "width": 24, "depth": 4, "num_heads": 3}
# One small member of each family that initialises in no time.
SMALL = [
    ("squeezenet1_1", {"image_size": 64}),
    ("digits_cnn", {}),
    ("vit", TINY_VIT),
]


def images(size, seed=0):
    return jax.random.normal(jax.random.key(seed), (2, size, size, 3))


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("vgg16", {}, ((28, 28, 256), (14, 14, 512), (7, 7, 512))),
        ("vgg16", {"features": "conv"}, ((56, 56, 256), (28, 28, 512), (14, 14, 512))),
        ("resnet50", {}, ((28, 28, 512), (14, 14, 1024), (7, 7, 2048))),
        ("vit_b16", {}, ((14, 14, 768),) * 3),
        ("squeezenet1_0", {}, ((27, 27, 256), (13, 13, 512), (13, 13, 512))),
    ],
)
def test_feature_shapes_are_those_of_the_paper(name, config, expected):
    assert abstract_backbone(name, **config).feature_shapes() == expected


@pytest.mark.parametrize(("name", "config"), SMALL)
def test_features_have_the_promised_shapes_and_types(name, config):
    backbone = load_backbone(name, num_classes=7, dtype="bfloat16", **config)
    size = backbone.preprocessing.image_size
    logits, features = run(backbone, images(size))
    assert logits.shape == (2, 7) and logits.dtype == jnp.float32
    assert tuple(feature.shape[1:] for feature in features) == backbone.feature_shapes()
    assert {feature.dtype for feature in features} == {jnp.dtype("bfloat16")}
    params = jax.tree.leaves(nnx.state(backbone, nnx.Param))
    assert {value.dtype for value in params} == {jnp.dtype("float32")}


@pytest.mark.parametrize(("name", "config"), SMALL)
def test_bfloat16_computes_the_same_function(name, config):
    half, full = (load_backbone(name, dtype=dtype, **config) for dtype in ("bfloat16", None))
    x = images(half.preprocessing.image_size)
    for low, high in zip(jax.tree.leaves(run(half, x)), jax.tree.leaves(run(full, x))):
        assert jnp.abs(low - high).max() < 0.03 * jnp.abs(high).max()


@pytest.mark.parametrize(("name", "config"), SMALL)
def test_initialisation_follows_the_seed(name, config):
    first, again, other = (load_backbone(name, seed=seed, **config) for seed in (3, 3, 4))
    x = images(first.preprocessing.image_size)
    np.testing.assert_array_equal(run(first, x)[0], run(again, x)[0])
    assert not np.array_equal(run(first, x)[0], run(other, x)[0])


def test_training_mode_changes_nothing():
    backbone = load_backbone("digits_cnn")
    before = parameters(backbone)
    logits, _ = run(backbone, images(64))
    backbone.train()
    np.testing.assert_array_equal(run(backbone, images(64))[0], logits)
    for path, value in parameters(backbone).items():
        np.testing.assert_array_equal(value, before[path])


def test_input_gradient_reaches_every_pixel():
    backbone = load_backbone("digits_vit")
    gradient = nnx.jit(jax.grad(lambda x: backbone(x)[0][:, 0].sum()))(images(64))
    assert jnp.isfinite(gradient).all() and (gradient != 0).all()


def test_masking_kind_is_the_familys():
    for name in ("vgg11", "resnet18", "squeezenet1_0", "digits_cnn"):
        assert abstract_backbone(name).masking == "pixel"
    for name in ("vit_ti16", "digits_vit"):
        assert abstract_backbone(name).masking == "standardised"


@pytest.mark.parametrize(
    ("name", "config", "shape", "message"),
    [
        ("digits_cnn", {}, (1, 3, 64, 64), r"digits_cnn takes images \[B, H, W, 3\]"),
        ("digits_cnn", {}, (64, 64, 3), r"takes images \[B, H, W, 3\], got \[64, 64, 3\]"),
        ("vgg11", {}, (1, 31, 64, 3), "vgg11 takes images of at least 32x32 pixels, got 31x64"),
        ("squeezenet1_0", {}, (1, 21, 20, 3), "at least 21x21"),
        ("squeezenet1_1", {}, (1, 16, 17, 3), "at least 17x17"),
        ("vit", TINY_VIT, (1, 48, 32, 3), "vit was built for 32x32 pixels, got 48x32"),
    ],
)
def test_unusable_images_are_refused_in_one_line(name, config, shape, message):
    with pytest.raises(ValueError, match=message) as error:
        abstract_backbone(name, **config)(jnp.zeros(shape))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        (
            "vgg17",
            {},
            "unknown backbone 'vgg17'; there are vgg1.*timm:MODEL, hf:OWNER.* and FILE.py",
        ),
        ("resnet18", {"features": "norm"}, "resnet18 has no option features; it has class_names, "),
        ("vgg11", {"features": "block"}, "features of vgg11 are 'pool' or 'conv', not 'block'"),
        ("vit", {"features": "pool"}, "features of vit are 'block' or 'norm', not 'pool'"),
        (
            "vit_b16",
            {"depth": 3},
            "vit_b16 has a fixed depth; the backbone 'vit' lets you choose it",
        ),
        ("vit", {"image_size": 225}, "image_size that patch_size divides"),
        ("vit", {"num_heads": 5}, "width that num_heads divides, got 224 / 16 and 384 / 5"),
    ],
)
def test_bad_options_are_refused_in_one_line(name, config, message):
    with pytest.raises(ValueError, match=message) as error:
        load_backbone(name, **config)
    assert "\n" not in str(error.value)


def test_an_option_of_none_is_the_default():
    backbone = load_backbone("digits_vit", num_classes=None, features=None, image_size=None)
    assert backbone.num_classes == 10 and backbone.preprocessing.image_size == 64


def test_the_smallest_squeezenet_input_is_pytorchs():
    torch = pytest.importorskip("torch")
    from references import create

    for name in ("squeezenet1_0", "squeezenet1_1"):
        smallest = abstract_backbone(name).min_size
        model = create(name, "torchvision")
        model(torch.zeros(1, 3, smallest, smallest))
        with pytest.raises(RuntimeError):
            model(torch.zeros(1, 3, smallest - 1, smallest - 1))


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 7), (8, 9), (14, 15), (20, 6)])
def test_adaptive_average_pool_equals_pytorchs(shape):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=(2, *shape, 4)).astype(np.float32)
    theirs = torch.nn.AdaptiveAvgPool2d(7)(torch.from_numpy(x).permute(0, 3, 1, 2))
    ours = adaptive_average_pool(jnp.asarray(x), 7)
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1).numpy(), atol=1e-6)


def test_standardise_subtracts_the_mean_and_divides_by_the_deviation():
    preprocessing = Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    image = jnp.asarray([[[0.6, 0.7, 0.8]]])
    np.testing.assert_allclose(preprocessing.standardise(image), [[[1.0, 2.0, 0.25]]], rtol=1e-6)
    assert preprocessing.standardise(image.astype("bfloat16")).dtype == jnp.bfloat16


def test_another_image_size_keeps_the_share_that_is_cropped():
    preprocessing = abstract_backbone("vgg16", image_size=448).preprocessing
    assert (preprocessing.image_size, preprocessing.resize_size) == (448, 512)
    preprocessing = abstract_backbone("vit", **TINY_VIT).preprocessing
    assert (preprocessing.image_size, preprocessing.resize_size) == (32, 32)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("vgg11", marks=pytest.mark.slow),
        "resnet18",
        "vit_ti16",
        "squeezenet1_0",
        "digits_cnn",
    ],
)
def test_a_backbone_split_at_its_target_layer_computes_the_same_logits(name, random_backbone):
    backbone = random_backbone(name, image_size=64)
    some = jnp.array([7, 2])

    @nnx.jit
    def both(backbone, x):
        before, after = backbone.split()
        return backbone(x)[0], after(before(x)), after(before(x), some)

    logits, all_classes, chosen = both(backbone, images(64))
    np.testing.assert_allclose(all_classes, logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(chosen, logits[:, some], rtol=1e-5, atol=1e-6)


def test_a_vit_splits_inside_a_block_with_its_residual_stream_beside_the_layer():
    backbone = load_backbone("digits_vit")
    before, after = backbone.split("blocks.3.norm1")
    normed, stream = before(jnp.ones((2, 64, 64, 3)))
    changed = after((jnp.zeros_like(normed), stream))
    assert normed.shape == stream.shape == (2, 65, 64)
    assert not np.allclose(changed, after((normed, stream)))
    assert not np.allclose(changed, after((jnp.zeros_like(normed), jnp.zeros_like(stream))))


def test_an_unknown_layer_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match=r"no layer 'layer4'; it has stem, layers.0.0"):
        load_backbone("digits_cnn").split("layer4")


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("digits_cnn", 1),
        ("digits_cnn", 7),
        pytest.param("digits_vit", 6, marks=pytest.mark.slow),
    ],
)
def test_images_in_groups_give_what_they_give_all_at_once(name, count, monkeypatch):
    backbone = load_backbone(name)
    images = jax.random.normal(jax.random.key(0), (count, 64, 64, 3))

    def outputs_and_gradient(backbone, images):
        gradient = jax.grad(lambda x: backbone(x)[0].max(axis=-1).sum())(images)
        return backbone(images), gradient

    together = nnx.jit(outputs_and_gradient)(backbone, images)
    monkeypatch.setattr(compilers, "CPU_PIXELS", 3 * 64 * 64)
    forward, sizes = type(backbone)._forward, []
    counting = lambda self, x: sizes.append(len(x)) or forward(self, x)
    monkeypatch.setattr(type(backbone), "_forward", counting)
    grouped = nnx.jit(lambda *inputs: outputs_and_gradient(*inputs))(backbone, images)
    assert set(sizes) == {1: {1}, 6: {3, 6}, 7: {1, 7}}[count]
    for a, b in zip(jax.tree.leaves(grouped), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * jnp.abs(b).max())


def test_a_square_larger_than_the_resized_image_is_refused():
    with pytest.raises(ValueError, match="cannot crop 224 pixels from 200"):
        Preprocessing(resize_size=200)

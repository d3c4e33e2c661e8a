import pytest
from flax import nnx

from ttame_jax.attention import AttentionMechanism
from ttame_jax.methods import list_methods, load_method, method_title
from ttame_jax.weights import load_backbone

pytestmark = pytest.mark.quick

VIT_METHODS = ("transformer_lrp", "attnlrp", "libragrad")


@pytest.fixture(scope="module")
def cnn():
    return load_backbone("digits_cnn")


def mechanism(backbone, variant):
    channels = [c for _, _, c in backbone.feature_shapes()]
    return AttentionMechanism(channels, backbone.num_classes, variant=variant, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", list_methods())
def test_every_method_is_built_by_its_name(name, cnn):
    backbone = load_backbone("digits_vit") if name in VIT_METHODS else cnn
    attention = mechanism(backbone, name) if name in ("lcam", "ttame") else None
    method = load_method(name, backbone, attention)
    assert method.name == name
    assert (method.forward_passes == 0) == (name in ("gaussian", "random"))


def test_options_reach_the_method(cnn):
    assert load_method("rise", cnn, masks=12).forward_passes == 12


@pytest.mark.parametrize(
    ("name", "variant", "config", "message"),
    [
        ("lime", None, {}, "unknown method 'lime'; there are gradcam,"),
        ("gradcam", None, {"masks": 3}, "gradcam has no option masks; it has layer"),
        ("gradcam++", None, {"recipe": "mine"}, "recipes of gradcam.. are 'paper' and 'reference'"),
        ("rise", None, {"masks": 0}, "rise needs 1 mask or more, not 0"),
        ("ttame", None, {}, "'ttame' needs .* this is no run: .* --variant ttame"),
        ("lcam", "ttame", {}, "'lcam' needs .* a run of variant 'ttame': .* --variant lcam"),
        *((name, None, {}, f"{name} explains only ViTs") for name in VIT_METHODS),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(name, variant, config, message, cnn):
    attention = mechanism(cnn, variant) if variant else None
    with pytest.raises(ValueError, match=message) as error:
        load_method(name, cnn, attention, **config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("gradcam++", "Grad-CAM++"),
        ("ttame-seed-1", "T-TAME, seed-1"),
        ("no_skip-a", "no_skip-a"),
        ("my-own", "my-own"),
    ],
)
def test_titles_name_the_method_and_the_run(name, title):
    assert method_title(name) == title

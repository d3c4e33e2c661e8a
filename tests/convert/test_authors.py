"""Checkpoints of the authors' code, to runs and back."""

import json
import os
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from flax import nnx
from reference_code import CHANNELS, attention_state, checkpoint, class_maps, layers, scaled
from safetensors.torch import load_file, save_file

from ttame_jax import load_explainer
from ttame_jax.config import resolved
from ttame_jax.convert.authors import attention_state as authors_state
from ttame_jax.convert.authors import from_reference
from ttame_jax.convert.export import run_to_torch
from ttame_jax.convert.pytorch.torch_import import import_torchvision
from ttame_jax.convert.timm_table import randomise
from ttame_jax.convert.verify import random_images
from ttame_jax.files import read_safetensors, write_safetensors
from ttame_jax.losses import LossConfig
from ttame_jax.runs import build_attention, load_attention, load_config
from ttame_jax.weights import abstract_backbone
from ttame_jax.weights.transfer import to_torch


def random_module(model):
    """torchvision's module with random weights; its own initialisation is left out."""
    torchvision = import_torchvision()
    with torch.device("meta"):
        module = torchvision.models.get_model(model)
    return randomise(module.to_empty(device="cpu")).eval()


@pytest.fixture(scope="module")
def squeezenet():
    return random_module("squeezenet1_0")


@pytest.fixture
def written(tmp_path, squeezenet):
    """Writes a checkpoint on SqueezeNet, which is small; `change` may spoil its content."""

    def write(state=None, change=lambda content: None, **hyper_parameters):
        content = checkpoint(
            attention_state(CHANNELS["squeezenet1_0"]) if state is None else state,
            squeezenet.state_dict(),
            **{
                "model_name": "squeezenet1_0",
                "layers": layers("squeezenet1_0"),
                "attention_version": "TAME",
                "train_method": "raw_normalize",
                **hyper_parameters,
            },
        )
        change(content)
        torch.save(content, tmp_path / "theirs.ckpt")
        return tmp_path / "theirs.ckpt"

    return write


VARIANTS = {
    "ttame": ("TAME", 3, {}),
    "no_skip_reference": ("Noskipconnection", 3, {"class_wide": True}),
    "no_skip_no_batch_norm": ("NoskipNobatchnorm", 3, {"batch_norm": False}),
    "sigmoid": ("Sigmoidinfeaturebranch", 3, {}),
    "two_layers": ("TAME", 2, {}),
    "one_layer": ("TAME", 1, {}),
    "lcam": ("lcam", 1, {"lcam": True}),
}


@pytest.mark.parametrize(
    "variant",
    [
        "ttame",
        "lcam",
        "no_skip_reference",
        *(
            pytest.param(variant, marks=pytest.mark.slow)
            for variant in sorted(VARIANTS.keys() - {"ttame", "lcam", "no_skip_reference"})
        ),
    ],
)
def test_every_variant_comes_in_and_goes_back_bit_for_bit(variant, written, tmp_path):
    version, count, options = VARIANTS[variant]
    state = attention_state(CHANNELS["squeezenet1_0"][-count:], **options)
    path = written(
        state, attention_version=version, layers=layers("squeezenet1_0")[-count:], lr=2e-3
    )
    run, back = tmp_path / "run", tmp_path / "back"
    config = from_reference(path, run, weights="checkpoint")
    assert config.variant == variant

    run_to_torch(run, back)
    theirs, ours = (torch.load(p, weights_only=True) for p in (path, back / "attention.ckpt"))
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for key, tensor in theirs["state_dict"].items():
        assert ours["state_dict"][key].dtype == tensor.dtype and ours["state_dict"][key].equal(
            tensor
        )
    again, given = ours["hyper_parameters"], theirs["hyper_parameters"]
    assert {key: again[key] for key in given} == given
    stored = load_file(back / "attention.safetensors")
    assert stored.keys() == {key for key in theirs["state_dict"] if "attn_mech" in key}

    images = random_images(224, 1)
    with jax.default_matmul_precision("highest"):
        maps = load_explainer(run)(images, 3).maps
    features = run_torch(squeezenet_of(theirs), layers("squeezenet1_0")[-count:], images)
    expected = class_maps(
        state,
        features,
        skip=not variant.startswith("no_skip"),
        activation=torch.sigmoid if variant == "sigmoid" else torch.relu,
    )[:, 3:4]
    np.testing.assert_allclose(maps, scaled(expected).numpy(), atol=1e-5)


def squeezenet_of(content):
    model = import_torchvision().models.squeezenet1_0().eval()
    body = {k: v for k, v in content["state_dict"].items() if k.startswith("generic.body.")}
    model.load_state_dict({key.removeprefix("generic.body."): v for key, v in body.items()})
    return model


def run_torch(model, names, images):
    """Outputs of the named modules for images [B, H, W, 3] in [0, 1], as [B, C, h, w] float64."""
    x = torch.from_numpy(images).double().permute(0, 3, 1, 2)
    mean, std = torch.tensor([(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)]).double()
    found = []
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda m, a, out: found.append(out))
        for name in names
    ]
    with torch.no_grad():
        model.double()((x - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    model.float()
    for hook in hooks:
        hook.remove()
    return [
        out if out.ndim == 4 else out[:, 1:].transpose(1, 2).unflatten(2, (14, 14)) for out in found
    ]


@pytest.fixture(scope="module")
def vit_b_16():
    return random_module("vit_b_16")


@pytest.mark.slow
@pytest.mark.parametrize("features", ["norm", "block"])
def test_maps_of_vit_b16_equal_pytorchs(features, vit_b_16, tmp_path):
    suffix = ".ln_1" if features == "norm" else ""
    names = [f"encoder.layers.encoder_layer_{i}{suffix}" for i in (9, 10, 11)]
    config = check_maps("vit_b_16", vit_b_16, names, tmp_path, layers("vit_b_16", features))
    assert config.backbone == "vit_b16" and config.backbone_config == {"features": features}
    assert config.masking == "standardised" and config.evaluation_masking == "pixel"


@pytest.mark.parametrize(
    ("model", "features"),
    [
        pytest.param("vgg16", {"features": "pool"}, marks=pytest.mark.slow),
        ("resnet50", {}),
    ],
)
def test_maps_of_cnns_equal_pytorchs(model, features, tmp_path):
    module = random_module(model)
    config = check_maps(model, module, layers(model), tmp_path, layers(model))
    assert config.backbone_config == features and config.masking == "pixel"


def check_maps(model, module, names, folder, their_layers):
    """A checkpoint's maps in PyTorch equal ours, and both parts come back as they were."""
    body = module.state_dict()
    save_file(body, folder / "w.safetensors")
    state = attention_state(CHANNELS[model])
    method = "new" if model.startswith("vit") else "raw_normalize"
    content = checkpoint(state, model_name=model, layers=their_layers, train_method=method)
    torch.save(content, folder / "theirs.ckpt")
    config = from_reference(folder / "theirs.ckpt", folder / "run", str(folder / "w.safetensors"))
    explainer = load_explainer(folder / "run")
    images = random_images(224, 1)
    with jax.default_matmul_precision("highest"):
        maps = explainer(images, np.array([[1, 998]])).maps
    if model == "vgg16":
        module.classifier = torch.nn.Identity()  # no map reads it, and it is most of the weights
    expected = scaled(class_maps(state, run_torch(module, names, images))[:, [1, 998]])
    np.testing.assert_allclose(maps, expected.numpy(), atol=1e-5)

    back = authors_state(explainer.backbone, explainer.method.attention, 7)
    for key, tensor in content["state_dict"].items():
        np.testing.assert_array_equal(back[key], tensor.numpy())
    for key, value in to_torch(explainer.backbone, "torchvision").items():
        np.testing.assert_array_equal(value, body[key].numpy())
    (folder / "w.safetensors").unlink()
    return config


def test_the_authors_settings_are_taken_over(written, tmp_path):
    config = from_reference(written(epochs=5, lr=0.01), tmp_path / "run", weights="w.safetensors")
    assert resolved(config) == resolved(load_config(tmp_path / "run"))
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["output"] == str(tmp_path / "run") and saved["evaluation_masking"] == "pixel"
    assert (config.epochs, config.learning_rate, config.loss.recipe) == (5, 0.01, "reference")
    assert config.weights == "w.safetensors" and config.backbone == "squeezenet1_0"
    assert from_reference(written(), tmp_path / "default").weights == "torchvision"


def test_vgg_layers_choose_pooling_or_convolutional_features(tmp_path):
    state = attention_state(CHANNELS["vgg16"])
    conv = ["features.15", "features.22", "features.29"]
    torch.save(checkpoint(state, model_name="vgg16", layers=conv), tmp_path / "c.ckpt")
    assert from_reference(tmp_path / "c.ckpt", tmp_path / "run").backbone_config == {
        "features": "conv"
    }


def test_another_class_count_is_taken_from_the_tensors(written, tmp_path):
    path = written(attention_state(CHANNELS["squeezenet1_0"], classes=12))
    config = from_reference(path, tmp_path / "run")
    assert config.backbone_config == {"num_classes": 12}
    with pytest.raises(
        ValueError, match=r"classifier.1.weight has shape \[1000, 512, 1, 1\], need"
    ):
        from_reference(path, tmp_path / "other", weights="checkpoint")


@pytest.mark.parametrize(
    ("dtype", "prefix"), [(torch.float16, "module."), (torch.bfloat16, "model.")]
)
def test_half_precision_and_wrappers_are_undone(written, tmp_path, dtype, prefix):
    def change(content):
        content["state_dict"] = {
            prefix + key: value.to(dtype) if value.is_floating_point() else value
            for key, value in content["state_dict"].items()
            if "attn_mech" in key
        }

    from_reference(written(change=change), tmp_path / "run", weights="none")
    config = load_config(tmp_path / "run")
    backbone = abstract_backbone("squeezenet1_0")
    attention = nnx.eval_shape(lambda: build_attention(config, backbone))
    assert load_attention(tmp_path / "run", attention) == 7
    expected = attention_state(CHANNELS["squeezenet1_0"])["fuser.weight"].to(dtype).float()
    np.testing.assert_array_equal(attention.fusion.kernel[...], expected[:, :, 0, 0].T)


def refused(path, output, **options):
    before = set(os.listdir(output.parent))
    with pytest.raises(ValueError) as error:
        from_reference(path, output, **options)
    line = str(error.value)
    assert line.startswith(str(path)) and "\n" not in line
    assert set(os.listdir(output.parent)) == before
    return line


@pytest.mark.parametrize(
    ("hyper_parameters", "message"),
    [
        ({"attention_version": "TAttentionV3"}, "attention_version 'TAttentionV3', which is not"),
        ({"attention_version": ["TAME"]}, "attention_version ['TAME'], which is not supported"),
        (
            {"model_name": "alexnet"},
            "model_name 'alexnet', which is not supported; there are vgg11",
        ),
        (
            {"model_name": "convnext_tiny"},
            "model_name 'convnext_tiny', which is not supported; there are vgg11",
        ),
        ({"train_method": "layernorm"}, "train_method 'layernorm', which is not supported"),
        ({"layers": ["features.3"]}, "layers ['features.3']; of squeezenet1_0 the last of these"),
        ({"layers": "features.12"}, "reads layers features.12; of"),
        ({"layers": []}, "reads layers []; of"),
        ({"attention_version": "lcam"}, "'lcam' is supported with 1"),
        ({"layers": ["features.12"]}, "it has unknown convs.1.weight, convs.1.bias"),
        (
            {"attention_version": "NoskipNobatchnorm"},
            "it has unknown bns.0.weight, bns.0.bias, bns.0.running_mean",
        ),
    ],
)
def test_settings_without_a_counterpart_are_refused(hyper_parameters, message, written, tmp_path):
    assert message in refused(written(**hyper_parameters), tmp_path / "run")


def test_the_class_token_variant_of_a_vit_is_refused(tmp_path):
    state = attention_state((8,) * 3)
    options = {"layers": layers("vit_b_16"), "attention_version": "TTAME"}
    torch.save(checkpoint(state, model_name="vit_b_16", **options), tmp_path / "c.ckpt")
    assert "multiplies the patch tokens by the class token" in refused(
        tmp_path / "c.ckpt", tmp_path / "run"
    )


def drop(key):
    return lambda content: content["state_dict"].pop(key)


def put(key, value):
    return lambda content: content["state_dict"].__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("generic.attn_mech.fuser.weight"), "it lacks fuser.weight"),
        (drop("generic.attn_mech.bns.1.running_var"), "it lacks bns.1.running_var"),
        (
            put("generic.attn_mech.convs.1.weight", torch.zeros(9, 512, 1, 1)),
            "ttame on squeezenet1_0: convs.1.weight has shape [9, 512, 1, 1], needed is [512, 512",
        ),
        (put("generic.attn_mech.extra", torch.zeros(1)), "it has unknown extra"),
        (put("generic.attn_mech.extra", 3), "generic.attn_mech.extra is none"),
        (
            lambda content: content.pop("hyper_parameters"),
            "has no hyper_parameters with a model_na",
        ),
        (lambda content: content.pop("state_dict"), "not a plain state dict of tensors"),
        (
            lambda content: content.update(state_dict={"a": torch.zeros(1)}),
            "it has no generic.attn_mech.*",
        ),
    ],
)
def test_spoilt_checkpoints_are_refused_and_nothing_is_left(change, message, written, tmp_path):
    assert message in refused(written(change=change), tmp_path / "run")


def test_a_checkpoint_without_backbone_cannot_give_one(written, tmp_path):
    def change(content):
        state = content["state_dict"]
        content["state_dict"] = {key: state[key] for key in state if "attn_mech" in key}

    line = refused(written(change=change), tmp_path / "run", weights="checkpoint")
    assert line.endswith("holds no backbone (generic.body.*): choose other weights")


def test_a_truncated_checkpoint_is_refused(written, tmp_path):
    path = written()
    path.write_bytes(path.read_bytes()[:100_000])
    assert "is not a plain checkpoint" in refused(path, tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="no checkpoint .*nowhere.ckpt"):
        from_reference(tmp_path / "nowhere.ckpt", tmp_path / "run")


def test_a_folder_that_is_there_is_left_alone(written, tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="run exists already: choose another folder"):
        from_reference(written(), tmp_path / "run")


def test_an_interrupted_conversion_leaves_nothing(written, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    path = written()
    monkeypatch.setattr("ttame_jax.convert.authors.TrainConfig.save", stop)
    with pytest.raises(KeyboardInterrupt):
        from_reference(path, tmp_path / "run")
    assert os.listdir(tmp_path) == [path.name]


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_checkpoint_is_never_run(written, tmp_path):
    harm = tmp_path / "harm"

    def in_callbacks(content):
        content["callbacks"] = {"saver": Harmful(harm)}
        content["lr_schedulers"] = [{"anneal_func": print, "path": harm}]

    from_reference(written(change=in_callbacks), tmp_path / "run")
    assert not harm.exists()
    path = written(change=put("generic.attn_mech.convs.0.weight", Harmful(harm)))
    assert "convs.0.weight is none" in refused(path, tmp_path / "other")
    path = written(change=lambda content: content.update(hyper_parameters=Harmful(harm)))
    assert "has no hyper_parameters" in refused(path, tmp_path / "other")
    assert not harm.exists()


def test_lightnings_own_containers_are_read(written, tmp_path, monkeypatch):
    module = types.ModuleType("lightning_stub")
    module.AttributeDict = type("AttributeDict", (dict,), {"__module__": "lightning_stub"})
    monkeypatch.setitem(sys.modules, "lightning_stub", module)

    def change(content):
        content["hyper_parameters"] = module.AttributeDict(content["hyper_parameters"])

    path = written(change=change)
    monkeypatch.delitem(sys.modules, "lightning_stub")
    assert from_reference(path, tmp_path / "run").backbone == "squeezenet1_0"


def test_our_own_attention_file_is_read_too(written, tmp_path):
    from_reference(written(), tmp_path / "run", weights="checkpoint")
    run_to_torch(tmp_path / "run", tmp_path / "files")
    weights = str(tmp_path / "files" / "backbone.torchvision.safetensors")
    config = from_reference(
        tmp_path / "files" / "attention.safetensors", tmp_path / "again", weights
    )
    assert config.variant == "ttame"
    images = random_images(224, 1)
    first, second = (load_explainer(tmp_path / name)(images, 0) for name in ("run", "again"))
    np.testing.assert_array_equal(first.maps, second.maps)


def test_our_own_attention_file_keeps_the_loss_recipe(make_run, tmp_path):
    make_run(tmp_path / "run", "resnet18", loss=LossConfig("complement"))
    run_to_torch(tmp_path / "run", tmp_path / "files")
    weights = str(tmp_path / "files" / "backbone.torchvision.safetensors")
    path = tmp_path / "files" / "attention.safetensors"
    assert from_reference(path, tmp_path / "again", weights).loss.recipe == "complement"
    images = random_images(224, 1)
    first, second = (load_explainer(tmp_path / name)(images, 0) for name in ("run", "again"))
    np.testing.assert_array_equal(first.maps, second.maps)
    state, metadata = read_safetensors(path)
    write_safetensors(path, state, metadata | {"loss_recipe": "of_tomorrow"})
    with pytest.raises(ValueError, match="has loss_recipe 'of_tomorrow'; there are paper, ref"):
        from_reference(path, tmp_path / "other", weights)
    del metadata["loss_recipe"]  # a file of an earlier version
    write_safetensors(path, state, metadata)
    assert from_reference(path, tmp_path / "old", weights).loss.recipe == "reference"


def test_a_run_with_the_weights_of_its_checkpoint_can_be_moved(written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = from_reference(written(), Path("runs/theirs"), weights="checkpoint")
    assert Path(config.weights).is_file()
    (tmp_path / "runs" / "theirs").rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert Path(load_config(tmp_path / "moved").weights).samefile("../moved/backbone.safetensors")


def test_a_checkpoint_without_its_bias_is_refused(tmp_path):
    state = attention_state(CHANNELS["squeezenet1_0"])
    state = {key: value for key, value in state.items() if not key.endswith("fuser.bias")}
    options = {"model_name": "squeezenet1_0", "layers": layers("squeezenet1_0")}
    torch.save(checkpoint(state, **options), tmp_path / "c.ckpt")
    assert "lacks fuser.bias or op.bias" in refused(tmp_path / "c.ckpt", tmp_path / "run")

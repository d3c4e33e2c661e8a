import json

import numpy as np
import pytest
from references import assert_close
from running import run

from ttame_jax import Explainer, load_backbone, load_method, save_backbone
from ttame_jax.convert.pytorch.torch_import import import_torchvision
from ttame_jax.errors import Damaged

torch = pytest.importorskip("torch")
import_torchvision()  # which transformers imports
transformers = pytest.importorskip("transformers")

VIT_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
MODELS = {
    "vit": ("ViTForImageClassification", VIT_SIZES),
    "deit": ("DeiTForImageClassification", VIT_SIZES),
    "resnet": (
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [16, 32, 64, 128], "depths": [1, 2, 1, 1]},
    ),
}
PROCESSOR = {
    "size": {"height": 32, "width": 32},
    "resample": 3,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4],
}


@pytest.fixture(params=MODELS)
def saved(request, tmp_path):
    """A model of random weights, and the folder that it is saved in."""
    name, sizes = MODELS[request.param]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(request.param, num_labels=5, **sizes)
    module = getattr(transformers, name)(config).eval()
    for key, value in module.state_dict().items():
        if "running_var" in key:
            value.uniform_(0.5, 1.5)
        elif value.is_floating_point():
            value.add_(0.1 * torch.randn_like(value))
    module.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return module, tmp_path


def test_a_model_of_transformers_gives_its_logits(saved):
    module, folder = saved
    backbone = load_backbone(f"hf:{folder}", "hf")
    preprocessing = backbone.preprocessing
    assert (preprocessing.image_size, preprocessing.resize_size) == (32, 32)
    assert (preprocessing.interpolation, preprocessing.mean) == ("bicubic", (0.5, 0.4, 0.3))
    x = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = module(torch.from_numpy(x.transpose(0, 3, 1, 2))).logits.numpy()
    assert_close(run(backbone, x)[0], theirs)
    save_backbone(backbone, folder / "ours.safetensors")
    again = load_backbone(f"hf:{folder}", folder / "ours.safetensors")
    np.testing.assert_array_equal(run(again, x)[0], run(backbone, x)[0])


def test_class_names_are_the_models_own(saved):
    _, folder = saved
    assert load_backbone(f"hf:{folder}", "hf").class_names is None  # LABEL_0 and so on
    path, names = folder / "config.json", ("ant", "bee", "cat", "dog", "elk")
    labels = {str(i): name for i, name in enumerate(names)}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": labels}))
    backbone = load_backbone(f"hf:{folder}", "hf")
    assert Explainer(load_method("gradcam", backbone)).class_names == names
    save_backbone(backbone, folder / "ours.safetensors")
    assert load_backbone(f"hf:{folder}", folder / "ours.safetensors").class_names == names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "is not supported: it is a bert"),
        ({"hidden_act": "gelu_new"}, "it has the activation gelu_new"),
    ],
)
def test_other_models_are_refused(saved, change, message):
    _, folder = saved
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_backbone(f"hf:{folder}", "hf")


def test_a_configuration_that_lacks_a_field_is_damaged(saved):
    _, folder = saved
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["hidden_act"]
    path.write_text(json.dumps(config))
    with pytest.raises(Damaged, match="the configuration of hf:.* lacks 'hidden_act'"):
        load_backbone(f"hf:{folder}", "hf")


@pytest.mark.parametrize("saved", ["vit"], indirect=True)
@pytest.mark.parametrize(
    ("file", "content", "error", "message"),
    [
        ("config.json", '{"model_type": "vi', Damaged, "config.json is not a JSON file"),
        ("config.json", "[]", Damaged, "config.json is not a configuration of transformers"),
        ("preprocessor_config.json", '{"resample": 1}', ValueError, "Pillow's filter 1"),
        (
            "preprocessor_config.json",
            '{"resample": 2, "do_normalize": false}',
            ValueError,
            "has a preprocessing without do_normalize",
        ),
    ],
)
def test_files_that_cannot_be_used_are_refused(saved, file, content, error, message):
    _, folder = saved
    (folder / file).write_text(content)
    with pytest.raises(error, match=message):
        load_backbone(f"hf:{folder}", "hf")


def test_a_folder_without_its_files_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*model\.safetensors"):
        load_backbone(f"hf:{tmp_path}", "hf")
    with pytest.raises(ValueError, match="weights hf are those of an hf:OWNER/NAME"):
        load_backbone("resnet18", "hf")


@pytest.mark.parametrize("saved", ["deit"], indirect=True)
def test_a_deit_with_two_heads_is_refused(saved):
    _, folder = saved
    path = folder / "config.json"
    change = {"architectures": ["DeiTForImageClassificationWithTeacher"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="a second head for its distillation token"):
        load_backbone(f"hf:{folder}", "hf")

"""Where weights come from: files, the cache, torchvision, timm's hub."""

import contextlib
import json
import os
import pickle
import socket
import sys
import zipfile

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import TINY

from ttame_jax.convert.pytorch.checkpoints import read_torch
from ttame_jax.convert.verify import verify
from ttame_jax.errors import Damaged
from ttame_jax.files import read_safetensors
from ttame_jax.preprocessing import Preprocessing
from ttame_jax.weights import load_backbone, save_backbone
from ttame_jax.weights.transfer import parameters, to_torch

pytestmark = pytest.mark.quick

torch = pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TTAME_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def backbone(random_backbone):
    return random_backbone("digits_cnn", seed=5)


@pytest.fixture
def without_torch(monkeypatch):
    """From the call on, torch, torchvision and timm cannot be imported."""

    def block():
        for name in ("torch", "torchvision", "timm"):
            monkeypatch.setitem(sys.modules, name, None)

    return block


def torch_state(backbone):
    return {key: torch.tensor(v) for key, v in to_torch(backbone, "torchvision").items()}


def assert_equal(ours, theirs):
    ours, theirs = parameters(ours), parameters(theirs)
    assert ours.keys() == theirs.keys()
    for path, value in theirs.items():
        np.testing.assert_array_equal(ours[path], value)


def test_our_own_file_gives_back_backbone_and_config(tmp_path, random_backbone):
    preprocessing = Preprocessing(16, 20, "bicubic", (0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    backbone = random_backbone(
        "vit",
        patch_size=4,
        width=8,
        depth=2,
        num_heads=2,
        num_classes=3,
        preprocessing=preprocessing,
    )
    save_backbone(backbone, tmp_path / "own.safetensors")
    again = load_backbone("vit", tmp_path / "own.safetensors")
    assert again.architecture == backbone.architecture
    assert again.preprocessing == preprocessing and hash(again.preprocessing)
    assert_equal(again, backbone)
    assert os.listdir(tmp_path) == ["own.safetensors"]


def test_our_own_file_gives_back_the_feature_maps(tmp_path, random_backbone):
    backbone = random_backbone("vit", **TINY, features="norm")
    save_backbone(backbone, tmp_path / "own.safetensors")
    again = load_backbone("vit", tmp_path / "own.safetensors")
    assert again.feature_layers == backbone.feature_layers
    other = load_backbone("vit", tmp_path / "own.safetensors", features="block")
    assert other.feature_layers != backbone.feature_layers


def test_parameters_that_require_gradients_are_read(tmp_path, backbone):
    state = {
        key: torch.nn.Parameter(x)
        for key, x in torch_state(backbone).items()
        if x.is_floating_point()
    }
    buffers = {key: x for key, x in torch_state(backbone).items() if key not in state}
    torch.save(state | buffers, tmp_path / "w.pth")
    assert_equal(load_backbone("digits_cnn", tmp_path / "w.pth"), backbone)


def test_a_callers_option_overrides_the_files(tmp_path, backbone):
    save_backbone(backbone, tmp_path / "own.safetensors")
    again = load_backbone("digits_cnn", tmp_path / "own.safetensors", image_size=96)
    assert again.preprocessing.image_size == 96
    with pytest.raises(ValueError, match="head|fc.*10"):
        load_backbone("digits_cnn", tmp_path / "own.safetensors", num_classes=11)


def test_our_own_file_of_another_backbone_is_refused(tmp_path, backbone):
    save_backbone(backbone, tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match="own.safetensors holds a digits_cnn, not a resnet18"):
        load_backbone("resnet18", tmp_path / "own.safetensors")


@pytest.mark.parametrize("suffix", [".pth", ".pt"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_pth_files_are_read_plain_or_wrapped(tmp_path, backbone, suffix, wrapper):
    state = torch_state(backbone)
    path = tmp_path / f"w{suffix}"
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, path)
    assert_equal(load_backbone("digits_cnn", path), backbone)


def test_a_pth_file_in_bfloat16_is_widened(tmp_path, backbone):
    torch.save({k: v.bfloat16() for k, v in torch_state(backbone).items()}, tmp_path / "w.pth")
    ours = parameters(load_backbone("digits_cnn", tmp_path / "w.pth"))["fc.kernel"]
    expected = torch_state(backbone)["fc.weight"].bfloat16().float().numpy().T
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, expected)


def test_torch_is_needed_once(tmp_path, backbone, cache, without_torch):
    path = tmp_path / "w.pth"
    torch.save(torch_state(backbone), path)
    load_backbone("digits_cnn", path)
    (cached,) = cache.glob("pth/*")
    assert cached.suffix == ".safetensors"
    path.rename(tmp_path / "moved.pth")  # it is found by content, not by name
    without_torch()
    assert_equal(load_backbone("digits_cnn", tmp_path / "moved.pth"), backbone)


def test_the_cache_follows_the_content(tmp_path, random_backbone):
    path = tmp_path / "w.pth"
    for seed in (1, 2):
        other = random_backbone("digits_cnn", seed=seed)
        torch.save(torch_state(other), path)
        assert_equal(load_backbone("digits_cnn", path), other)


def test_without_torch_a_pth_file_says_what_to_install(tmp_path, backbone, without_torch):
    torch.save(torch_state(backbone), tmp_path / "w.pth")
    without_torch()
    with pytest.raises(ImportError, match=r"needs PyTorch: pip install 'ttame-jax\[convert\]'"):
        load_backbone("digits_cnn", tmp_path / "w.pth")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize(
    "save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))]
)
def test_a_pickle_is_never_run(tmp_path, cache, save):
    save({"fc.weight": Malicious(tmp_path / "harm")}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="w.pth is not a plain") as error:
        load_backbone("digits_cnn", tmp_path / "w.pth")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "harm").exists() and not cache.exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"epoch": 3}, ": epoch is none"),
        ([1, 2], ", nor has it one under 'state_dict' or 'model'"),
        (torch.zeros(3), ", nor has it one under"),
        ({}, ", nor has it one under"),
    ],
)
def test_a_pth_file_without_a_state_dict_is_refused(tmp_path, content, reason):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="not a plain state dict of tensors" + reason):
        load_backbone("digits_cnn", tmp_path / "w.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_damaged_file_is_refused_in_one_line(tmp_path, suffix):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(b"damaged" * 20)
    with pytest.raises(ValueError, match=f"w{suffix} is not a") as error:
        load_backbone("digits_cnn", path)
    assert "\n" not in str(error.value)


def test_what_is_no_weights_file_is_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="no weights file nowhere.pth; weights are a file, "
    ):
        load_backbone("digits_cnn", "nowhere.pth")
    (tmp_path / "w.npz").touch()
    with pytest.raises(
        ValueError,
        match="w.npz is not a weights file: the formats are .safetensors, .pth, .pt and .ckpt",
    ):
        load_backbone("digits_cnn", tmp_path / "w.npz")


def test_the_cache_is_in_the_users_cache_folder(monkeypatch, tmp_path):
    from ttame_jax.files import cache_dir

    monkeypatch.delenv("TTAME_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "ttame_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "ttame_jax"


@pytest.fixture
def torchvision_download(monkeypatch):
    """Puts a local state dict, or an error, in place of torchvision's download."""

    def place(result):
        def download(*args, **kwargs):
            if isinstance(result, Exception):
                raise result
            return result

        monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
        reached = "ttame_jax.convert.pytorch.torchvision.download"
        monkeypatch.setattr(reached, contextlib.nullcontext)

    from ttame_jax.convert.pytorch.torch_import import import_torchvision

    import_torchvision()
    return place


def test_torchvisions_weights_are_fetched_once(
    torchvision_download, without_torch, random_backbone
):
    model = random_backbone("squeezenet1_1", seed=2)
    torchvision_download(torch_state(model))
    assert_equal(load_backbone("squeezenet1_1", "torchvision"), model)
    without_torch()
    assert_equal(load_backbone("squeezenet1_1", "torchvision"), model)


def test_torchvisions_weights_out_of_reach(torchvision_download, without_torch, cache):
    torchvision_download(OSError("no route"))
    line = r"cannot download https://.*vgg16-\w+.pth \(no route\); .* pass --weights FILE"
    with pytest.raises(FileNotFoundError, match=line):
        load_backbone("vgg16", "torchvision")
    without_torch()
    with pytest.raises(ImportError, match=r"vgg16 need torchvision once: pip install 'ttame-jax"):
        load_backbone("vgg16", "torchvision")
    with pytest.raises(ValueError, match="torchvision has no weights for vit_s16; it has them for"):
        load_backbone("vit_s16", "torchvision")
    assert not cache.exists()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An offline Hugging Face hub whose local cache holds the models that are added to it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def add(model, card, tensors):
        folder = tmp_path / "hub" / f"models--timm--{model}"
        snapshot = folder / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("abc")
        (snapshot / "config.json").write_text(json.dumps(card))
        save_file(tensors, snapshot / "model.safetensors")

    return add


CARD = {
    "architecture": "vit_tiny_patch16_224",
    "num_classes": 7,
    "pretrained_cfg": {
        "input_size": [3, 224, 224],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.4, 0.5],
    },
}


@pytest.mark.parametrize(
    "weights",
    ["timm", "timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k", "timm:vit_tiny_patch16_224"],
)
def test_timms_weights_come_with_classes_and_preprocessing(hub, weights, random_backbone):
    model = random_backbone("vit_ti16", num_classes=7)
    hub("vit_tiny_patch16_224.augreg_in21k_ft_in1k", CARD, to_torch(model, "timm"))
    backbone = load_backbone("vit_ti16", weights)
    assert_equal(backbone, model)
    expected = Preprocessing(224, 248, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.4, 0.5))
    assert backbone.preprocessing == expected


def test_timms_hub_needs_neither_torch_nor_timm(hub, without_torch, random_backbone):
    model = random_backbone("vit_ti16", num_classes=7)
    hub("vit_tiny_patch16_224.augreg_in21k_ft_in1k", CARD, to_torch(model, "timm"))
    without_torch()
    assert_equal(load_backbone("vit_ti16", "timm"), model)
    with pytest.raises(ValueError, match="needs its tag, as in timm:vit_base_patch16_224.dino"):
        load_backbone("vit_ti16", "timm:vit_tiny_patch16_224")


def test_timms_weights_out_of_reach(hub):
    line = r"cannot download timm/resnet50.a1_in1k \(.* run 'hf download timm/resnet50.a1_in1k'"
    with pytest.raises(FileNotFoundError, match=line) as error:
        load_backbone("resnet50", "timm")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="timm has no weights for squeezenet1_0; it has them for"):
        load_backbone("squeezenet1_0", "timm")
    with pytest.raises(ValueError, match="timm has no pretrained model 'resnet5'"):
        load_backbone("resnet50", "timm:resnet5")


@pytest.fixture
def silent_server():
    """The address of a server that accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_silent_server_is_given_up(silent_server, tmp_path, monkeypatch):
    from huggingface_hub import constants

    from ttame_jax.convert.pytorch import downloads

    monkeypatch.setattr(downloads, "SECONDS", 0.2)
    monkeypatch.setattr(constants, "ENDPOINT", silent_server)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(FileNotFoundError, match="cannot download .*timed out"):
        load_backbone("resnet50", "timm:resnet50.a1_in1k")
    with pytest.raises(TimeoutError), downloads.download(silent_server):
        pytest.fail("it has answered")
    assert socket.getdefaulttimeout() is None


def odd_tensors():
    whole = torch.ones(4, 3)
    return {
        "sparse": (whole.to_sparse(), "is not a dense tensor"),
        "nested": (torch.nested.nested_tensor([whole[0], whole[:, 0]]), "is not a dense tensor"),
        "quantised": (torch.quantize_per_tensor(whole, 0.1, 0, torch.qint8), "is quantised"),
        "meta": (whole.to("meta"), "has no values"),
        "complex": (whole.to(torch.complex64), "is complex"),
        "repeated": (torch.ones(1).expand(4 * 10**10), "repeats its values"),
    }


@pytest.mark.parametrize("kind", odd_tensors())
def test_tensors_that_numpy_cannot_hold_are_named(kind, tmp_path):
    tensor, fault = odd_tensors()[kind]
    torch.save({"a.weight": torch.ones(2), "b.weight": tensor}, tmp_path / "w.pth")
    with pytest.raises(Damaged, match=f"w.pth cannot be read: b.weight {fault}"):
        load_backbone("vit_ti16", tmp_path / "w.pth")


def test_keys_that_are_no_names_are_refused(tmp_path):
    torch.save({0: torch.ones(2)}, tmp_path / "w.pth")
    with pytest.raises(Damaged, match="its key 0 is no name"):
        load_backbone("vit_ti16", tmp_path / "w.pth")


def test_tensors_that_share_memory_take_no_more_than_the_file(tmp_path):
    one = torch.ones(1000)
    torch.save({f"{i}.weight": one for i in range(1000)}, tmp_path / "w.pth")
    with pytest.raises(Damaged, match="its tensors share memory, 4,000,000 bytes in all"):
        load_backbone("vit_ti16", tmp_path / "w.pth")


def test_a_compressed_file_is_refused_before_it_takes_memory(tmp_path):
    torch.save({"a.weight": torch.zeros(10**6)}, tmp_path / "whole.pth")
    with (
        zipfile.ZipFile(tmp_path / "whole.pth") as whole,
        zipfile.ZipFile(tmp_path / "w.pth", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for entry in whole.infolist():
            small.writestr(entry.filename, whole.read(entry))
    with pytest.raises(Damaged, match=r"w.pth holds [\d,]+ bytes and declares 4,0\d\d,\d\d\d"):
        load_backbone("vit_ti16", tmp_path / "w.pth")


def test_saved_tensors_are_readable_by_their_path(tmp_path, backbone):
    save_backbone(backbone, tmp_path / "own.safetensors")
    tensors = load_file(tmp_path / "own.safetensors")
    assert tensors["layers.1.0.downsample.conv.kernel"].shape == (1, 1, 16, 32)
    assert tensors.keys() == parameters(backbone).keys()


def test_files_of_other_programs_are_not_digested(tmp_path, backbone, monkeypatch):
    own, other = tmp_path / "own.safetensors", tmp_path / "other.safetensors"
    save_backbone(backbone, own)
    save_file(load_file(own), other)
    digested = []
    monkeypatch.setattr("ttame_jax.files._digest_of", lambda *_: digested.append(1) or "other")
    read_safetensors(other)
    assert not digested
    with pytest.raises(Damaged):
        read_safetensors(own)


def test_what_needs_pytorch_says_so(without_torch, tmp_path):
    without_torch()
    for command in (lambda: list(verify("vit_ti16")), lambda: read_torch(tmp_path / "w.pth")):
        with pytest.raises(ImportError, match=r"needs PyTorch: pip install 'ttame-jax\[convert\]'"):
            command()

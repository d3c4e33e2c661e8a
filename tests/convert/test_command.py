"""The command `ttame convert`, and that its runs are runs."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from reference_code import CHANNELS, attention_state, checkpoint, layers

from ttame_jax.cli import main as ttame


def main(words):
    ttame(["convert", *words])


from ttame_jax.runs import load_config
from ttame_jax.weights import load_backbone
from ttame_jax.weights.transfer import parameters, to_torch


def test_help_names_every_command_and_needs_no_torch():
    script = (
        "import sys; from ttame_jax.cli import main\n"
        "try: main(['convert', '--help'])\n"
        "finally: assert not {'torch', 'timm', 'torchvision'} & set(sys.modules)"
    )
    help_text = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stdout
    assert "usage: ttame convert" in help_text
    for command in ("backbone", "import", "from-reference", "to-torch", "verify"):
        assert f"• {command} " in help_text


@pytest.mark.parametrize("command", ["backbone", "import", "from-reference", "to-torch", "verify"])
def test_every_argument_is_explained(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "[-h]" in capsys.readouterr().out


def test_backbone_writes_a_file_that_loads_without_pytorch(
    tmp_path, random_backbone, capsys, monkeypatch
):
    model = random_backbone("squeezenet1_1", num_classes=7)
    state = {key: torch.tensor(value) for key, value in to_torch(model, "torchvision").items()}
    torch.save(state, tmp_path / "theirs.pth")
    monkeypatch.setenv("TTAME_CACHE", str(tmp_path / "cache"))
    output = tmp_path / "ours.safetensors"
    source = str(tmp_path / "theirs.pth")
    main(
        ["backbone", "squeezenet1_1", "--weights", source, "--num-classes", "7"]
        + ["--output", str(output)]
    )
    assert capsys.readouterr().out == (
        f"{output}: squeezenet1_1 from {source}, 726,087 values, 7 classes\n"
    )
    monkeypatch.setitem(sys.modules, "torch", None)
    again = load_backbone("squeezenet1_1", output)
    assert again.num_classes == 7
    for path, value in parameters(model).items():
        np.testing.assert_array_equal(parameters(again)[path], value)


def test_the_backbone_inside_a_reference_checkpoint(tmp_path, random_backbone, monkeypatch):
    monkeypatch.setenv("TTAME_CACHE", str(tmp_path / "cache"))
    model = random_backbone("squeezenet1_0")
    body = {key: torch.tensor(value) for key, value in to_torch(model, "torchvision").items()}
    content = checkpoint({"fuser.bias": torch.zeros(3)}, body, model_name="squeezenet1_0")
    torch.save(content, tmp_path / "theirs.ckpt")
    output = tmp_path / "ours.safetensors"
    main(
        ["backbone", "squeezenet1_0", "--weights", str(tmp_path / "theirs.ckpt")]
        + ["--output", str(output)]
    )
    for path, value in parameters(load_backbone("squeezenet1_0", output)).items():
        np.testing.assert_array_equal(value, parameters(model)[path])


def test_an_imported_run_is_explained_exported_and_verified(
    tmp_path, random_backbone, pictures, capsys
):
    model = random_backbone("squeezenet1_0")
    body = {key: torch.tensor(value) for key, value in to_torch(model, "torchvision").items()}
    state = attention_state(CHANNELS["squeezenet1_0"])
    content = checkpoint(state, body, model_name="squeezenet1_0", layers=layers("squeezenet1_0"))
    torch.save(content, tmp_path / "theirs.ckpt")
    run, image = tmp_path / "run", pictures / "validation" / "000.png"

    main(
        ["from-reference", str(tmp_path / "theirs.ckpt"), "--output", str(run)]
        + ["--weights", "checkpoint"]
    )
    printed = capsys.readouterr().out
    assert f"{run}: ttame on squeezenet1_0, with the authors' settings:" in printed
    assert "  masking: standardised\n  evaluation_masking: pixel\n" in printed
    ttame(["explain", str(image), "--run", str(run), "--output", str(tmp_path / "maps")])
    assert (tmp_path / "maps" / "000.png").is_file()
    capsys.readouterr()
    dataclasses.replace(load_config(run), precision="bfloat16").save(run)
    main(["verify", str(run)])  # in float32, as the docs say
    assert capsys.readouterr().out.startswith("torchvision logits ")
    main(["to-torch", str(run), "--output", str(tmp_path / "files")])
    assert "  attention.ckpt: attention and backbone as the" in capsys.readouterr().out


def test_evaluation_masks_as_the_run_says(make_run, pictures, tmp_path):
    make_run(tmp_path / "run", evaluation_masking="pixel", dataset=f"folder:{pictures}")
    output = tmp_path / "figures.json"
    ttame(
        ["evaluate", "--run", str(tmp_path / "run"), "--output", str(output)]
        + ["--limit", "8", "--batch-size", "8"]
    )
    assert json.loads(output.read_text())["masking"] == "pixel"  # a ViT's own is the other


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["verify", "vgg17"], "ttame: unknown backbone 'vgg17'; there are vgg1"),
        (["verify", "runs/no"], "ttame: there is no run runs/no (TTAME_TRACEBACK=1 shows where)"),
        (
            ["verify", "models/no.safetensors"],
            "ttame: no imported classifier models/no.safetensors",
        ),
        (["to-torch", "no", "--output", "out"], "ttame: no is not a run: config.json is missing"),
        (["from-reference", "no.ckpt", "--output", "out"], "ttame: no checkpoint no.ckpt"),
        (
            ["backbone", "vgg16", "--output", "w.pt"],
            "ttame: --output is a .safetensors file, not w",
        ),
        (
            ["backbone", "vgg16", "--weights", "no.pth", "--output", "o.safetensors"],
            "ttame: no weights file no.pth; weights are a file, ",
        ),
    ],
)
def test_mistakes_end_with_one_line(arguments, line, tmp_path, monkeypatch, refusal):
    monkeypatch.chdir(tmp_path)
    status, said = refusal(["convert", *arguments])
    assert status in (1, 2) and said.startswith(line)
    assert not list(tmp_path.iterdir())

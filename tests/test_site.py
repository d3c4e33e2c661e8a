"""The documentation site and its notebooks."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from pages import DOCS, NOTEBOOKS, cells
from PIL import Image


def execute(notebook: str, replacements: dict[str, str]) -> dict:
    """Runs a notebook without its shell commands; returns the names that it defines."""
    sources = cells(DOCS / "notebooks" / notebook)
    code = "\n".join(source for language, source in sources if language == "python")
    for words, others in replacements.items():
        assert words in code, words
        code = code.replace(words, others)
    names = {}
    exec(code, names)  # noqa: S102
    return names


@pytest.fixture
def demo(run, pictures, tmp_path, monkeypatch) -> Path:
    """A working directory in which `ttame demo` has finished."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo" / "pictures").mkdir(parents=True)
    (tmp_path / "demo" / "run").symlink_to(run)
    for i, path in enumerate(sorted((pictures / "validation").iterdir())[:12]):
        with Image.open(path) as picture:
            picture.resize((32, 32)).save(tmp_path / "demo" / "pictures" / f"{i:02}_image.png")
    return tmp_path


@pytest.fixture
def hub(shared, tmp_path, monkeypatch):
    """A local Hugging Face cache that holds the weights that the notebooks download by name."""
    from huggingface_hub import constants

    folder = tmp_path / "hub" / "models--timm--tf_efficientnet_lite0.in1k"
    snapshot = folder / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    card = {"input_size": [3, 224, 224], "interpolation": "bicubic", "crop_pct": 0.875}
    card |= {"mean": [0.5] * 3, "std": [0.5] * 3}
    text = json.dumps({"num_classes": 1000, "pretrained_cfg": card})
    (snapshot / "config.json").write_text(text)
    weights = shared / "weights" / "tf_efficientnet_lite0.safetensors"
    (snapshot / "model.safetensors").symlink_to(weights)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def test_the_first_steps_can_be_taken(hub, demo):
    names = execute("first_steps.ipynb", {})
    assert names["explanation"].labels == ("Egyptian cat", "tiger cat")
    assert names["explanation"].resized().shape == (2, 300, 451)
    assert len(names["explanations"].maps) == 12
    assert {"explained.png", "overlay.png", "explained.npz"} <= {p.name for p in demo.iterdir()}


@pytest.mark.slow
def test_methods_are_compared_on_an_own_classifier(demo, capsys):
    names = execute("compare_methods.ipynb", {"test[:100]": "test[:8]", "masks=500": "masks=8"})
    *_, table = capsys.readouterr().out.partition("deletion\n")
    assert [line[:16].strip() for line in table.splitlines()] == list(names["maps"])


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_with_small_outputs_and_no_warnings(notebook):
    stored = json.loads(notebook.read_text())["cells"]
    outputs = [output for cell in stored for output in cell.get("outputs", [])]
    assert any("data" in output for output in outputs)
    assert all(output.get("name") != "stderr" for output in outputs)
    assert notebook.stat().st_size < 500_000


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path):
    if importlib.util.find_spec("sphinx") is None:
        pytest.skip("needs Sphinx: pip install 'ttame-jax[docs]'")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", DOCS, tmp_path / "site"]
    built = subprocess.run(command, check=False, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "site" / "contributing.html").read_text()
    assert 'href="changelog.html"' in page and "blob/main/LICENSE" in page and "GradCAM" in page

import ast
import importlib
import re
import tomllib

import pytest
from pages import DOCS, PAGES, ROOT, blocks, text
from PIL import Image

import ttame_jax
from ttame_jax.cli import COMMANDS, main
from ttame_jax.methods import list_methods, method_title
from ttame_jax.metrics import list_metrics
from ttame_jax.weights import list_backbones

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("name", list_methods())
def test_every_method_is_documented(name):
    assert method_title(name) in (DOCS / "methods.md").read_text()
    assert f"`{name}`" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", list_metrics())
def test_every_metric_is_documented(name):
    assert f"`{name}`" in (DOCS / "metrics.md").read_text()


@pytest.mark.parametrize("name", list_backbones())
def test_every_backbone_is_documented(name):
    assert f"`{name}`" in (DOCS / "models.md").read_text()


def test_every_public_name_is_in_the_api_reference():
    documented = re.findall(
        r"^\.\. auto\w+:: (?:\w+\.)*(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE
    )
    assert set(ttame_jax.__all__) <= set(documented)


def test_every_layer_is_in_the_diagram():
    with (ROOT / "pyproject.toml").open("rb") as file:
        contract, *_ = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    modules = set(re.findall(r"[\w.]+", " ".join(contract["layers"])))
    drawn = set(re.findall(r"[\w.]+", (DOCS / "layers.svg").read_text()))
    assert modules - drawn <= {name for name in modules if name.startswith("convert.")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text(page)):
        assert target.startswith(("https://", "mailto:")) or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_use_names_that_exist(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("ttame_jax"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name) or importlib.import_module(
                        f"{node.module}.{alias.name}"
                    )
            elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "ttame_jax":
                assert hasattr(ttame_jax, node.attr), node.attr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shell_blocks_use_commands_and_flags_that_exist(page, capsys):
    for block in blocks(page, "sh"):
        commands = block.replace("\\\n", " ").replace("python train.py", "ttame train")
        for words in re.findall(r"\bttame (.*)", commands):
            command, *rest = words.partition("#")[0].split()
            if command not in COMMANDS:  # a machine may have that name
                continue
            choosing = {"convert": rest[:1], "explain": ["--dataset=NAME"] * ("--dataset" in rest)}
            with pytest.raises(SystemExit):
                main([command, *choosing.get(command, []), "--help"])
            known = set(re.findall(r"--[a-z][a-z.-]*", capsys.readouterr().out))
            used = {word.rstrip('"') for word in rest if word.startswith("--")}
            assert used <= known, (words, used - known)


def test_the_first_example_works_when_pasted(shared, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Image.open(next((pictures / "validation").iterdir())) as image:
        image.resize((300, 200)).save("cat.jpg")
    weights = shared / "weights" / "squeezenet1_0.safetensors"
    (example, *_) = blocks(ROOT / "README.md", "python")
    offline = f'backbone="squeezenet1_0", weights={str(weights)!r}'
    names = {}
    exec(example.replace('backbone="resnet50"', offline), names)  # noqa: S102
    assert names["explanation"].resized().shape == (2, 200, 300)
    assert (tmp_path / "explained.png").is_file()

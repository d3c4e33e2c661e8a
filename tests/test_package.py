"""What is installed, and that it does not depend on where it runs."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The unpacked wheel, built from a clean copy."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("ttame_jax", "convert", "configs"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "."]
    subprocess.run([*command, "--no-build-isolation", "."], cwd=folder, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_one_package_with_everything_in_it(installed):
    assert {path.name for path in installed.iterdir() if path.suffix != ".dist-info"} == {
        "ttame_jax"
    }
    package = installed / "ttame_jax"
    sources = [
        *(path.relative_to(ROOT) for path in (ROOT / "ttame_jax").rglob("*.py")),
        *(Path("ttame_jax") / path.relative_to(ROOT) for path in (ROOT / "convert").rglob("*.py")),
        *(Path("ttame_jax") / path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.py")),
    ]
    assert all((installed / path).is_file() for path in sources)
    for data in ("py.typed", "experiments/report.html", "fonts/DejaVuSans.ttf", "imagenet.txt"):
        assert (package / data).is_file()


def test_a_users_own_convert_and_configs_break_nothing(installed, tmp_path):
    (tmp_path / "convert.py").write_text("raise RuntimeError('not yours')")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("raise RuntimeError('not yours')")
    script = (
        "import sys; sys.path.insert(1, sys.argv.pop(1))\n"
        "import ttame_jax.cli, ttame_jax.convert, ttame_jax.configs.vit_b16\n"
        "from pathlib import Path\n"
        "for module in (ttame_jax, ttame_jax.convert, ttame_jax.configs):\n"
        "    assert Path(module.__file__).is_relative_to(sys.path[1]), module\n"
        "ttame_jax.cli.main(sys.argv[1:])"
    )
    for words, said in (
        (["convert", "--help"], "usage: ttame convert"),
        (["train", "--backbone", "resnet50", "--help"], "runs/resnet50"),
    ):
        command = [sys.executable, "-c", script, str(installed), *words]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        assert said in done.stdout


def test_convert_is_a_module_of_the_checkout():
    command = [sys.executable, "-m", "convert", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "usage: ttame convert" in done.stdout

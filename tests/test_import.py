import os
import subprocess
import sys
from pathlib import Path

import pytest

FRAMEWORKS = """
import sys
import ttame_jax
for name in ttame_jax.__all__:
    getattr(ttame_jax, name)
import ttame_jax.experiments.train
import ttame_jax.convert.pytorch.timm
found = {"torch", "torchvision", "timm", "tensorflow"} & sys.modules.keys()
assert not found, found
"""

LISTING = """
import sys
import ttame_jax
from ttame_jax.cli import main
try:
    main(["--help"])
finally:
    assert not {"jax", "numpy", "tyro"} & sys.modules.keys()
"""

CORE = """
import sys
from ttame_jax.errors import EXTRAS

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from ttame_jax.cli import main

run, pictures, output = sys.argv[1:]
main(["explain", f"{pictures}/validation/000.png", "--run", run, "--output", output])
words = ["--run", run, "--dataset", f"folder:{pictures}", "--limit", "4", "--batch-size", "8"]
main(["evaluate", *words, "--output", f"{output}/figures.json"])
main(["train", "--backbone", "vit_b16", "--output", f"{output}/other"])
"""


def test_importing_the_project_imports_no_other_framework():
    subprocess.run([sys.executable, "-c", FRAMEWORKS], check=True)


def test_the_list_of_commands_needs_no_library():
    result = subprocess.run(
        [sys.executable, "-c", LISTING], check=False, text=True, capture_output=True
    )
    assert result.returncode == 0, result.stderr
    assert "explain" in result.stdout and "lr-find" in result.stdout


def test_a_core_installation_explains_and_evaluates(run, pictures, tmp_path):
    command = [sys.executable, "-c", CORE, str(run), str(pictures), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    result = subprocess.run(command, env=environment, check=False, text=True, capture_output=True)
    assert (tmp_path / "000.png").is_file() and (tmp_path / "figures.json").is_file(), result.stderr
    assert result.returncode == 1  # from training
    last = result.stderr.splitlines()[-1]
    assert "No module named 'grain': run pip install 'ttame-jax[train]'" in last


@pytest.mark.parametrize("words", [[], ["nonsense"], ["--nonsense"]])
def test_wrong_commands_are_refused_with_the_usage(words, capsys):
    from ttame_jax.cli import main

    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2 and "usage: ttame" in capsys.readouterr().err

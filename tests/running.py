import subprocess
import sys
from pathlib import Path

from flax import nnx

# Hides TensorFlow from `import` and from `find_spec`, as if it were not installed.
HIDE_TENSORFLOW = """
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
PathFinder.find_spec = lambda name, *args: (
    None if name.partition(".")[0] == "tensorflow" else find_spec(name, *args)
)
"""


@nnx.jit
def run(backbone, x):
    """A backbone's logits and feature maps, compiled."""
    return backbone(x)


def run_python(script: str, *args, check: bool = True) -> subprocess.CompletedProcess:
    """Runs a script in a fresh interpreter, in the repository."""
    command = [sys.executable, "-c", script, *map(str, args)]
    root = Path(__file__).parents[1]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=check)

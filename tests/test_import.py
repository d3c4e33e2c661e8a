import subprocess
import sys


def test_importing_the_project_imports_no_other_framework():
    code = """
import sys
import ttame_jax
import ttame_jax.cli
import ttame_jax.convert.pytorch.timm
found = {"torch", "torchvision", "timm", "tensorflow"} & sys.modules.keys()
assert not found, found
"""
    subprocess.run([sys.executable, "-c", code], check=True)

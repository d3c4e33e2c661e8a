import subprocess
import sys


def test_importing_the_project_imports_no_other_framework():
    code = """
import sys
import ttame_jax
import convert.files, convert.layouts, convert.pretrained, convert.torch_import, convert.weights
found = {"torch", "torchvision", "timm", "tensorflow"} & sys.modules.keys()
assert not found, found
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_convert_can_be_imported_first():
    subprocess.run([sys.executable, "-c", "import convert.files, ttame_jax"], check=True)

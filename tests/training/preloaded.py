"""What the processes of the tests have imported before they start; no test imports it.

Training needs no PyTorch, which TensorBoard's writer would import for nothing.
"""

import sys


class NoTorch:
    """Ends the search for PyTorch, as if it were not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, NoTorch())

import tensorboardX  # noqa: F401

import ttame_jax.cli
import ttame_jax.experiments.compare
import ttame_jax.experiments.explain
import ttame_jax.experiments.lr_find  # noqa: F401

"""Explanation methods behind one interface."""

from ttame_jax.methods.base import Method
from ttame_jax.methods.ttame import TTAME

__all__ = ["TTAME", "Method"]

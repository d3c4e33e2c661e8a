"""Conversion between PyTorch and Flax, in both directions.

The package is installed as `ttame_jax.convert`. It is the only one that imports PyTorch.
"""

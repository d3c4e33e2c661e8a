"""Reads PyTorch's files and its libraries' models. PyTorch is imported only when it is needed."""

INSTALL = "pip install 'ttame-jax[convert]'"
"""The command that installs PyTorch and the libraries."""

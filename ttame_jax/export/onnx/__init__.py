"""ONNX: an explainer as a graph for ONNX Runtime, written from its JAX program."""

from .model import onnx_model

__all__ = ["onnx_model"]

"""Exports an explainer as one file: StableHLO for JAX alone, or ONNX."""

from .onnx import onnx_model
from .stablehlo import stablehlo

__all__ = ["onnx_model", "stablehlo"]

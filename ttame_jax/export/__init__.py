"""Exports an explainer as one file: StableHLO for JAX alone, or ONNX."""

from .program import metadata, program
from .stablehlo import stablehlo

__all__ = ["metadata", "program", "stablehlo"]

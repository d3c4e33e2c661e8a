"""PyTorch <-> Flax, both ways: the only rooms that know PyTorch's names or import torch."""

"""Tensors under two names: PyTorch's key and layout, and the path of the Flax parameter.

A family lists its tensors as a table of `Entry(torch_key, flax_path, transform)` for each library.
`ttame_jax.weights` reads these tables in both directions. A table follows the structure of a
given module (its depth, with or without BatchNorm), so all variants of a family share one.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ttame_jax.files import Tensors


class Transform(NamedTuple):
    """A change of layout between PyTorch and Flax. Each direction is the inverse of the other."""

    to_flax: Callable[[Any], Any]
    to_torch: Callable[[Any], Any]


class Entry(NamedTuple):
    """A tensor under both names.

    A tensor without a Flax path has no counterpart here: it is ignored when read, and written as
    what its transform makes of zero.
    """

    torch_key: str
    flax_path: str | None
    transform: Transform


Table = list[Entry]

SAME = Transform(lambda x: x, lambda x: x)
LINEAR = Transform(lambda x: x.transpose(1, 0), lambda x: x.transpose(1, 0))  # OI <-> IO
CONV = Transform(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))  # OIHW, HWIO
# A linear layer stored as a 1x1 convolution: OI11 <-> IO.
LINEAR_AS_CONV = Transform(
    lambda x: x.reshape(x.shape[:2]).transpose(1, 0),
    lambda x: x.transpose(1, 0).reshape(*x.shape[::-1], 1, 1),
)


def constant(value: Any) -> Transform:
    """The transform of a tensor that is the same in every model."""
    return Transform(lambda x: x, lambda _: value)


def weights(torch: str, flax: str, transform: Transform, bias: bool = True) -> Table:
    """The kernel and bias of a convolution or linear layer."""
    table = [Entry(f"{torch}.weight", f"{flax}.kernel", transform)]
    return table + [Entry(f"{torch}.bias", f"{flax}.bias", SAME)] * bias


def layer_norm(torch: str, flax: str) -> Table:
    """The scale and bias of a LayerNorm."""
    names = {"weight": "scale", "bias": "bias"}
    return [Entry(f"{torch}.{t}", f"{flax}.{f}", SAME) for t, f in names.items()]


def batch_norm(torch: str, flax: str) -> Table:
    """The scale, bias and running statistics of a BatchNorm."""
    names = {"running_mean": "mean", "running_var": "var", "num_batches_tracked": "count"}
    statistics = [Entry(f"{torch}.{t}", f"{flax}.{f}", SAME) for t, f in names.items()]
    return layer_norm(torch, flax) + statistics


def conv_norm(conv: str, norm: str, flax: str) -> Table:
    """The tensors of a `ConvNorm` (see `layers`)."""
    return weights(conv, f"{flax}.conv", CONV, bias=False) + batch_norm(norm, f"{flax}.bn")


def squeeze_excite(reduce: str, expand: str, flax: str) -> Table:
    """The tensors of a `SqueezeExcite` (see `layers`)."""
    return [
        *weights(reduce, f"{flax}.reduce", LINEAR_AS_CONV),
        *weights(expand, f"{flax}.expand", LINEAR_AS_CONV),
    ]


def renamed(
    tensors: Tensors, names: Mapping[str, str | Callable[[re.Match], str]]
) -> dict[str, np.ndarray]:
    """Tensors with the first regular expression that matches a key replaced, as by `re.sub`."""

    def new(key: str) -> str:
        for pattern, name in names.items():
            if re.search(pattern, key):
                return re.sub(pattern, name, key)
        return key

    return {new(key): value for key, value in tensors.items()}

"""Checks of values against type hints."""

import types
import typing
from typing import Any


def accepts(hint: Any, value: Any) -> bool:
    """Whether a value is of a type, as a value from JSON or the command line may not be.

    Args:
      hint: a class, or a union, literal, annotated type or dict of such.
      value: the value. An int is a float, too; a bool is neither an int nor a float.
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return accepts(parts[0], value)
    if origin is typing.Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin in (typing.Union, types.UnionType):
        return any(accepts(part, value) for part in parts)
    if origin is dict:
        key, item = parts
        known = isinstance(value, dict)
        return known and all(accepts(key, k) and accepts(item, v) for k, v in value.items())
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)

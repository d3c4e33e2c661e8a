"""Types of command-line arguments."""

from collections.abc import Callable
from typing import Annotated, Any

import tyro


def listed(kind: Callable[[str], Any], metavar: str) -> tyro.constructors.PrimitiveConstructorSpec:
    """Reads several values, separated by commas or spaces, as a tuple."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar=metavar,
        instance_from_str=lambda words: tuple(map(kind, " ".join(words).replace(",", " ").split())),
        is_instance=lambda values: isinstance(values, tuple),
        str_from_instance=lambda values: [",".join(map(str, values))],
    )


Names = Annotated[tuple[str, ...], listed(str, "NAME,...")]

"""Names of classes, and how a user names them."""

import difflib
import functools
import importlib.resources
import os
from collections.abc import Sequence

from etils import epath

FILE = "class_names.txt"
"""Name of the file of a run that holds its class names, one per line."""


@functools.cache
def _imagenet() -> tuple[tuple[str, str], ...]:
    lines = importlib.resources.files("ttame_jax").joinpath("imagenet.txt").read_text()
    return tuple((line[:9], line[10:]) for line in lines.splitlines())


def imagenet_names() -> tuple[str, ...]:
    """The names of ImageNet's 1000 classes, as in torchvision."""
    return tuple(name for _, name in _imagenet())


def imagenet_ids() -> tuple[str, ...]:
    """The WordNet ids of ImageNet's 1000 classes, such as "n02391049"."""
    return tuple(wordnet for wordnet, _ in _imagenet())


def default_names(num_classes: int) -> tuple[str, ...] | None:
    """ImageNet's names for a classifier of 1000 classes, None for others."""
    names = imagenet_names()
    return names if len(names) == num_classes else None


def readable(names: Sequence[str]) -> tuple[str, ...]:
    """Class names, with ImageNet's own in place of WordNet ids."""
    known = dict(_imagenet())
    return tuple(known.get(name, name) for name in names)


def read_names(path: str | os.PathLike) -> tuple[str, ...]:
    """Reads a file with one class name per line.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a text file, or a line is empty.
    """
    try:
        text = epath.Path(path).read_bytes().decode("utf-8-sig")  # with or without a mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file with one class name per line") from error
    # Not `splitlines`, which also splits at rarer characters, such as a vertical tab.
    names = tuple(line.strip() for line in text.removesuffix("\n").split("\n"))
    if not all(names):
        raise ValueError(f"{path} has no class name in line {names.index('') + 1}")
    return names


def check_names(names: Sequence[str], num_classes: int) -> tuple[str, ...]:
    """Returns the names; raises ValueError if there is not one for each class."""
    if len(names) != num_classes:
        raise ValueError(f"there are {len(names)} class names for {num_classes} classes")
    return tuple(names)


def label(class_id: int, names: Sequence[str] | None) -> str:
    """The name of a class, or "class 3" if it has none."""
    return names[class_id] if names else f"class {class_id}"


def find_class(text: str, names: Sequence[str] | None, num_classes: int) -> int:
    """The class that a user names: by its name (case is ignored), its id or its WordNet id.

    A number that is a name, such as that of a folder of images, is not an id.

    Raises:
      ValueError: there is no such class; the message lists the nearest names.
    """
    text = text.strip()
    if text.isdecimal() and text not in (names or ()):
        if int(text) < num_classes:
            return int(text)
        raise ValueError(f"there is no class {text}: class ids are 0 to {num_classes - 1}")
    if not names:
        raise ValueError(
            f"the classes have no names, so {text!r} is unknown: give ids (0 to {num_classes - 1}), "
            "all, top5, or the names with --class-names"
        )
    ids = {name.casefold(): i for i, name in reversed(list(enumerate(names)))}
    if tuple(names) == imagenet_names():
        ids |= {wordnet: i for i, wordnet in enumerate(imagenet_ids())}
    if (found := ids.get(text.casefold())) is not None:
        return found
    raise ValueError(f"there is no class {text!r}{_nearest(text, names)}")


def _nearest(text: str, names: Sequence[str]) -> str:
    """Names that contain the text, or that resemble it."""
    wanted = text.casefold()
    near = [name for name in names if wanted in name.casefold()]
    by_key = {name.casefold(): name for name in names}
    near += [by_key[key] for key in difflib.get_close_matches(wanted, by_key, cutoff=0.6)]
    near = list(dict.fromkeys(near))[:5]
    return f": did you mean {', '.join(near)}?" if near else "; give a name or an id"

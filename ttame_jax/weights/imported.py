"""Files of imported classifiers: the graph and the tensors in one .safetensors file."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ttame_jax.backbones.imported import Description, ImportedBackbone, decode
from ttame_jax.errors import Damaged
from ttame_jax.files import Tensors, read_safetensors, write_safetensors
from ttame_jax.preprocessing import Preprocessing

FORMAT = "ttame_jax imported"
SUFFIX = ".safetensors"


def is_imported(name: str) -> bool:
    """Whether the name of a backbone is the path of an imported classifier."""
    return name.endswith(SUFFIX)


def load_imported(
    path: str, weights: str | Path | None, config: Mapping[str, Any]
) -> ImportedBackbone:
    """Loads a classifier that `ttame convert import` wrote.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is no such classifier, or weights or options are given, which it does not
        take.
    """
    description, tensors = _read(path, weights, config)
    return ImportedBackbone(path, description, tensors)


def save_imported(backbone: ImportedBackbone, path: Path, source: str = "") -> None:
    """Writes an imported classifier.

    Args:
      backbone: the classifier.
      path: the file.
      source: what it was imported from, for the reader of the metadata.
    """
    fields: dict[str, Any] = dataclasses.asdict(backbone.description)
    graph = fields.pop("graph")
    metadata = {"format": FORMAT, "source": source, "graph": graph, "config": json.dumps(fields)}
    tensors = {key: np.asarray(value) for key, value in backbone.params.items()}
    write_safetensors(path, tensors, metadata)


def _read(
    path: str, weights: str | Path | None, config: Mapping[str, Any]
) -> tuple[Description, Tensors]:
    if weights is not None:
        raise ValueError(f"{path} has its own weights: leave out {weights}")
    options = {key: value for key, value in config.items() if value is not None}
    if jnp.dtype(options.pop("dtype", jnp.float32)) != jnp.float32:
        raise ValueError(f"{path} was imported in float32 and computes in no other precision")
    if options:
        raise ValueError(
            f"{path} was imported as it is and takes no {', '.join(options)}: import it anew "
            "(ttame convert import --help)"
        )
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"no imported classifier {path}: write it with ttame convert import"
        )
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} holds weights but no classifier: name its architecture, as in "
            f"--backbone resnet50 --weights {path}, or write one with ttame convert import"
        )
    try:
        fields = json.loads(metadata["config"])
        preprocessing = Preprocessing(**fields.pop("preprocessing"))
        description = Description(
            graph=metadata["graph"], preprocessing=preprocessing, **_tuples(fields)
        )
        decode(description.graph).check(tensors, (*description.features, description.target))
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{path} cannot be read: {error}") from None
    return description, tensors


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields from JSON, whose lists become tuples."""
    return {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}

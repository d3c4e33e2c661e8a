"""Builds backbones by name and fills them with weights."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from ttame_jax.backbones import FAMILIES, Architecture, Backbone, Family, family_of
from ttame_jax.backbones.imported import ImportedBackbone
from ttame_jax.convert.pytorch import checkpoints, timm, torchvision
from ttame_jax.files import read_safetensors, write_safetensors
from ttame_jax.preprocessing import Preprocessing

from . import huggingface, module_files, timm_models, transfer
from .imported import is_imported, load_imported, save_imported

FORMAT = "ttame_jax"  # names our own layout in a safetensors file's metadata

TIMM = "timm:"
"""Prefix of the name of a model whose architecture timm defines."""

HUGGINGFACE = "hf:"
"""Prefix of the name of a model of transformers on the Hugging Face hub, or of a folder of one."""

_FAMILIES = {name: family for family in FAMILIES for name in family.architectures}


def list_backbones() -> list[str]:
    """All names that `load_backbone` knows, besides "timm:MODEL" and "hf:OWNER/NAME"."""
    return list(_FAMILIES)


def load_backbone(
    name: str, weights: str | Path | None = None, *, seed: int = 0, **config: Any
) -> Backbone:
    """Loads a frozen classifier.

    Args:
      name: one of `list_backbones()`, or "timm:MODEL" for a model of timm's in one of our
        families. timm then provides the architecture, unless `weights` is a file that
        `save_backbone` wrote. "hf:OWNER/NAME" is an image classifier of transformers on the Hugging
        Face hub, "hf:FOLDER" one on disk. "FILE.py:FUNCTION" is what a function in a Python file
        returns, see `FunctionBackbone`. "FILE.safetensors" is a classifier that
        `ttame convert import` wrote, with its weights; it takes no options.
      weights: a file (``.safetensors``, ``.pth``, ``.pt`` or ``.ckpt``, in torchvision's, timm's or our own
        layout); "torchvision" (its IMAGENET1K_V1 weights); "timm" (its default weights) or
        "timm:MODEL"; "hf" (those of the "hf:" model); None for random initialisation from `seed`.
      seed: of the random initialisation.
      **config: num_classes, image_size, dtype (of the computation and the feature maps, e.g.
        "bfloat16"), preprocessing, class_names; features ("pool" or "conv" for VGG, "block" or "norm" for ViT);
        for "vit" also patch_size, width, depth and num_heads. None is the default: what the
        source of the weights says, or else the architecture's own. Of "FILE.py:FUNCTION", the
        arguments of the function.

    Raises:
      ValueError: unknown name or option, or weights that do not fit; the message says which.
      FileNotFoundError: weights that do not exist or cannot be downloaded.
      ImportError: weights that need PyTorch, where it is not installed.
    """
    if is_imported(name):
        return load_imported(name, weights, config)
    if function := module_files.parse(name):
        return _made(*function, weights, config)
    config = _given(name, config)
    if weights is None:
        return _build(name, _described(name, config) | config, nnx.Rngs(seed))
    path, described = _locate(name, weights)
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") == FORMAT:
        if metadata.get("name") != name:
            raise ValueError(f"{weights} holds a {metadata.get('name')}, not a {name}")
        described = json.loads(metadata.get("config", "{}"))
    else:
        described = _described(name, config) | described
    abstract = transfer.abstract(lambda rngs: _build(name, described | config, rngs))
    return transfer.fill(abstract, transfer.to_flax(abstract, tensors, str(weights)))


def abstract_backbone(name: str, **config: Any) -> Backbone:
    """A backbone without weights: its parameters are shapes, and nothing is computed.

    Arguments and errors are those of `load_backbone`. One that a user's function returns has its
    own weights.
    """
    if is_imported(name):
        return transfer.abstract(lambda rngs: load_imported(name, None, config))
    if function := module_files.parse(name):
        return _made(*function, None, config)
    config = _given(name, config)
    config = _described(name, config) | config
    return transfer.abstract(lambda rngs: _build(name, config, rngs))


def save_backbone(backbone: Backbone, path: str | Path) -> None:
    """Writes a backbone as safetensors in our own layout, to be read by `load_backbone`.

    The tensors are the parameters by dotted path. The metadata holds the name and the configuration.
    """
    if isinstance(backbone, ImportedBackbone):
        return save_imported(backbone, Path(path))
    metadata = {
        "format": FORMAT,
        "name": backbone.name,
        "config": json.dumps(_config(backbone)),
    }
    tensors = {key: np.asarray(value) for key, value in transfer.parameters(backbone).items()}
    write_safetensors(Path(path), tensors, metadata)


def _made(
    path: Path, function: str, weights: str | Path | None, config: Mapping[str, Any]
) -> Backbone:
    """What a user's function returns."""
    if weights is not None:
        raise ValueError(f"{path}:{function} loads its own weights: give none, not {weights}")
    options = {key: value for key, value in config.items() if value is not None}
    if np.dtype(options.get("dtype", np.float32)) == np.float32:  # the default
        options.pop("dtype", None)
    return module_files.load(path, function, options)


def _config(backbone: Backbone) -> dict[str, Any]:
    """What `load_backbone` needs besides the name to build the backbone again, as JSON."""
    family, fields = family_of(backbone), asdict(backbone.architecture)
    config: dict[str, Any] = {
        "num_classes": fields.pop("num_classes"),
        "preprocessing": fields.pop("preprocessing"),
    }
    if names := fields.pop("class_names"):
        config["class_names"] = names
    if backbone.features:
        config["features"] = backbone.features
    if _is_foreign(backbone.name):
        config["architecture"] = {"family": family.backbone.__name__, **fields}
    for field in family.free.get(backbone.name, ()):
        config[field] = fields[field]
    return config


def _given(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are not None, of a backbone that exists."""
    if not _is_foreign(name) and name not in _FAMILIES:
        similar = ", ".join(difflib.get_close_matches(name, _FAMILIES, n=6, cutoff=0))
        raise ValueError(
            f"unknown backbone {name!r}; there are {similar} and others "
            "(ttame_jax.list_backbones()), timm:MODEL, hf:OWNER/NAME, FILE.safetensors "
            "(see ttame convert import) and FILE.py:FUNCTION"
        )
    return {key: value for key, value in config.items() if value is not None}


def _is_foreign(name: str) -> bool:
    """Whether the source of a model's weights also defines its architecture."""
    return name.startswith((TIMM, HUGGINGFACE))


class Parts(NamedTuple):
    """The parts of the name of a backbone that has a path.

    Attributes:
      prefix: "hf:" for a model of transformers, or empty.
      path: a file or a folder. That of "hf:OWNER/NAME" need not exist.
      rest: ":FUNCTION" of a Python file, or empty.
    """

    prefix: str
    path: str
    rest: str


def parts_of(name: str) -> Parts | None:
    """The parts of the name of a backbone; None if it has no path."""
    if name.startswith(HUGGINGFACE):
        return Parts(HUGGINGFACE, name.removeprefix(HUGGINGFACE), "")
    if is_imported(name):
        return Parts("", name, "")
    function = module_files.parse(name)
    return Parts("", str(function[0]), f":{function[1]}") if function else None


def unmoved(name: str) -> str:
    """The name of a backbone without the folder of its path, which is the same after a move."""
    parts = parts_of(name)
    return "".join(parts._replace(path=Path(parts.path).name)) if parts else name


def is_file(weights: str) -> bool:
    """Whether weights are a file, and not published ones such as "torchvision" or "timm:MODEL"."""
    return weights.partition(":")[0] not in ("torchvision", "timm", "hf")


def default_weights(name: str) -> str | None:
    """Where the published weights of a backbone come from: "torchvision", "timm" or "hf".

    None for a backbone that is a file, which has its own.
    """
    if _is_foreign(name):
        return name.partition(":")[0]
    if parts_of(name):
        return None
    libraries = [one for one in ("torchvision", "timm") if name in published(one)]
    return next(iter(libraries), "torchvision")


def _described(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration that timm or transformers gives one of its models."""
    if not _is_foreign(name) or "architecture" in config:
        return {}
    if name.startswith(HUGGINGFACE):
        return huggingface.describe(name.removeprefix(HUGGINGFACE))
    return timm_models.describe(name.removeprefix(TIMM), config.get("num_classes"))


def _build(name: str, config: Mapping[str, Any], rngs: nnx.Rngs) -> Backbone:
    fields = {key: _hashable(value) for key, value in config.items()}
    family, architecture = _architecture(name, fields)
    _check_options(name, family, fields)
    size = fields.pop("image_size", None)
    module = {key: fields.pop(key) for key in ("features", "dtype") if key in fields}
    architecture = replace(architecture, **fields)
    if size is not None and size != architecture.preprocessing.image_size:
        preprocessing = architecture.preprocessing.resized(size)
        architecture = replace(architecture, preprocessing=preprocessing)
    return family.backbone(name, architecture, rngs=rngs, **module)


def _architecture(name: str, fields: dict[str, Any]) -> tuple[Family, Architecture]:
    """The named architecture, or the one that the configuration describes (and loses)."""
    if isinstance(preprocessing := fields.get("preprocessing"), Mapping):
        fields["preprocessing"] = Preprocessing(**preprocessing)
    if not _is_foreign(name):
        return _FAMILIES[name], _FAMILIES[name].architectures[name]
    described = {key: _hashable(value) for key, value in fields.pop("architecture").items()}
    wanted = described.pop("family")
    family = next(family for family in FAMILIES if family.backbone.__name__ == wanted)
    return family, family.architecture(**described)


def _check_options(name: str, family: Family, fields: Mapping[str, Any]) -> None:
    free = set(family.free.get(name, ()))
    options = {"num_classes", "class_names", "preprocessing", "image_size", "dtype"} | free
    if family.backbone.feature_kinds:
        options.add("features")
    if _is_foreign(name):
        options.add("architecture")
    for other, settable in family.free.items():
        if fixed := [field for field in settable if field in fields and field not in free]:
            raise ValueError(
                f"{name} has a fixed {', '.join(fixed)}; the backbone {other!r} lets you choose it"
            )
    if unknown := fields.keys() - options:
        raise ValueError(
            f"{name} has no option {', '.join(sorted(unknown))}; it has {', '.join(sorted(options))}"
        )
    for field in free & fields.keys():
        if not isinstance(fields[field], int) or fields[field] < 1:
            raise ValueError(f"{field} must be a positive integer, not {fields[field]!r}")


def _hashable(value: Any) -> Any:
    """JSON's lists as tuples, as static attributes of a module have to be."""
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def _locate(name: str, weights: str | Path) -> tuple[Path, dict[str, Any]]:
    """A local safetensors file, and the configuration that its source describes."""
    if weights == "torchvision":
        return torchvision.weights(_published(name, "torchvision")), {}
    if weights == "hf":
        if not name.startswith(HUGGINGFACE):
            raise ValueError(f"weights hf are those of an hf:OWNER/NAME, which {name} is not")
        return huggingface.weights(name.removeprefix(HUGGINGFACE)), {}
    source, _, model = str(weights).partition(":")
    if source == "timm":
        own = name.removeprefix(TIMM) if name.startswith(TIMM) else _published(name, "timm")
        return timm.weights(model or own)
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights file {path}; weights are a file, torchvision, timm, timm:MODEL or hf"
        )
    if path.suffix == ".safetensors":
        return path, {}
    if path.suffix in (".pth", ".pt", ".ckpt"):
        return checkpoints.converted(path), {}
    raise ValueError(
        f"{path} is not a weights file: the formats are .safetensors, .pth, .pt and .ckpt"
    )


def published(library: str) -> dict[str, str]:
    """A library's model of each backbone, by the backbone's name."""
    return {
        name: model
        for family in FAMILIES
        if library in family.libraries
        for name, model in family.libraries[library].models.items()
    }


def _published(name: str, library: str) -> str:
    models = published(library)
    if name not in models:
        raise ValueError(
            f"{library} has no weights for {name}; it has them for {', '.join(models)}"
        )
    return models[name]

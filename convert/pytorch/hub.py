"""Files of the Hugging Face hub."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from .downloads import download


def files_of(model: str, names: Sequence[str]) -> list[Path]:
    """Files of a model on the hub, in the hub's own cache, or of a local folder.

    Args:
      model: OWNER/NAME, or a folder.
      names: the files.

    Raises:
      FileNotFoundError: they cannot be downloaded, or are missing in the folder.
    """
    if Path(model).is_dir():
        paths = [Path(model) / name for name in names]
        if missing := [str(path) for path in paths if not path.is_file()]:
            raise FileNotFoundError(f"no file {', '.join(missing)}")
        return paths
    try:
        return [Path(_from_hub(model, name)) for name in names]
    except (OSError, ValueError) as error:  # ValueError: not a name of the hub
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"cannot download {model} ({reason}); on a machine with access run "
            f"'hf download {model}' and copy its Hugging Face cache folder here"
        ) from None


def _from_hub(model: str, name: str) -> str:
    """The path of a file in the hub's cache, where it is downloaded if it is missing."""
    from huggingface_hub import constants, errors, hf_hub_download

    with contextlib.suppress(errors.LocalEntryNotFoundError):
        return hf_hub_download(model, name, local_files_only=True)
    with contextlib.nullcontext() if constants.HF_HUB_OFFLINE else download(constants.ENDPOINT):
        return hf_hub_download(model, name)

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with real images and weights, which are not part of the project."""
    path = Path(os.environ.get("TTAME_SHARED", Path(__file__).parents[1] / ".." / "shared"))
    if not path.is_dir():
        pytest.skip(f"needs the shared images and weights; set TTAME_SHARED (no {path})")
    return path.resolve()

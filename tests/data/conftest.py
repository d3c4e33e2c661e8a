from pathlib import Path

import pytest
from data_helpers import HIDE_TENSORFLOW, run_python
from filelock import FileLock


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory, worker_id) -> Path:
    """Data folder with the data set digits, generated once for all workers, without TensorFlow."""
    folder = tmp_path_factory.getbasetemp()
    data_dir = (folder if worker_id == "master" else folder.parent) / "digits"
    with FileLock(f"{data_dir}.lock"):
        if not data_dir.exists():
            data_dir.mkdir()
            run_python(
                HIDE_TENSORFLOW
                + "import sys; from ttame_jax.data import load_source; "
                + "load_source('digits', 'train', sys.argv[1])",
                data_dir,
            )
    return data_dir

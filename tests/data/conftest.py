from pathlib import Path

import pytest
from data_helpers import HIDE_TENSORFLOW, run_python


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory) -> Path:
    """Data folder with the data set digits, generated where there is no TensorFlow."""
    data_dir = tmp_path_factory.mktemp("digits")
    run_python(
        HIDE_TENSORFLOW
        + "import sys; from ttame_jax.data import load_source; "
        + "load_source('digits', 'train', sys.argv[1])",
        data_dir,
    )
    return data_dir

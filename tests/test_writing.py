import os
from pathlib import Path

import pytest
from etils import epath

from ttame_jax.files import absolute, in_bucket, write_atomically

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("kind", [str, Path, epath.Path])
def test_files_are_replaced_whole_and_nothing_else_is_left(tmp_path, kind):
    path = tmp_path / "new" / "file.txt"
    for content in ("first", b"second"):
        write_atomically(kind(path), content)
    assert path.read_text() == "second"
    assert list(path.parent.iterdir()) == [path]


def test_a_buckets_address_is_absolute_and_stays_as_it_is(tmp_path, monkeypatch):
    address = "gs://bucket/run/checkpoints"
    assert os.fspath(absolute(address)) == os.fspath(absolute(epath.Path(address))) == address
    assert in_bucket(epath.Path(address)) and not in_bucket(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert absolute("run") == tmp_path.resolve() / "run"

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


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    write_atomically(path, "old")

    def full(_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_link_under_a_guessed_temporary_name_is_not_followed(tmp_path):
    other = tmp_path / "other"
    other.write_text("mine")
    for name in (f".file.txt.{os.getpid()}", ".file.txt", ".file.txt.tmp"):
        (tmp_path / name).symlink_to(other)
    write_atomically(tmp_path / "file.txt", "new")
    assert other.read_text() == "mine"


def test_files_have_the_permissions_that_the_user_gives_new_files(tmp_path):
    (tmp_path / "usual").write_text("")
    write_atomically(tmp_path / "ours", "")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_buckets_address_is_absolute_and_stays_as_it_is(tmp_path, monkeypatch):
    address = "gs://bucket/run/checkpoints"
    assert os.fspath(absolute(address)) == os.fspath(absolute(epath.Path(address))) == address
    assert in_bucket(epath.Path(address)) and not in_bucket(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert absolute("run") == tmp_path.resolve() / "run"

import contextlib
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from ttame_jax.errors import Damaged, Failure
from ttame_jax.files import (
    absolute,
    check_output_folder,
    check_seal,
    in_bucket,
    locked,
    read_arrays,
    save_arrays,
    seal,
    to_json,
    write_atomically,
)

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


@pytest.mark.parametrize("folder", [True, False])
def test_an_output_is_locked_until_the_end(tmp_path, folder):
    output = tmp_path / "new" / "output"
    with locked(output, folder):
        refused = pytest.raises(Failure, match="another process is writing to .*/new/output")
        with refused, locked(output, folder):
            pytest.fail("it was free")
        with locked(output.with_name("other"), folder):  # which is another output
            pass
    with locked(output, folder):
        pass
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    script = "import os, sys; from ttame_jax.files import locked\n"
    script += "with locked(sys.argv[1]): os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert (tmp_path / ".lock").exists()
    with locked(tmp_path):
        pass


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, capsys):
    def missing(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", missing)
    with locked(tmp_path):
        assert f"{tmp_path} is on a file system without locks" in capsys.readouterr().err


def test_too_little_space_is_reported_before_any_work(tmp_path):
    check_output_folder(tmp_path / "new", space=1)
    with pytest.raises(OSError, match=r"MiB left, \d+ MiB are needed: make room, or choose"):
        check_output_folder(tmp_path / "new", space=2**62)
    assert not (tmp_path / "new").exists()


def test_sealed_fields_come_back_and_changed_ones_do_not():
    fields = {"AD": {"15": 24.0}, "nothing": float("nan"), "names": ["a", "ä"]}
    text = to_json(seal(fields))
    assert check_seal(json.loads(text)) == fields | {"nothing": None}
    assert check_seal({"of": "an earlier version"}) == {"of": "an earlier version"}
    for changed in (text.replace("24.0", "94.0"), text.replace("nothing", "nought")):
        with pytest.raises(Damaged):
            check_seal(json.loads(changed))


def test_damaged_arrays_are_refused_or_whole(tmp_path):
    path, values = tmp_path / "rows.npz", np.arange(200) % 7
    save_arrays(path, rows=values)
    whole = path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        path.write_bytes(bytes(damaged))
        with contextlib.suppress(Damaged):
            np.testing.assert_equal(read_arrays(path), {"rows": values})

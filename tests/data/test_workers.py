"""Worker processes: their ends, their shared memory, their number."""

import os
import time
from pathlib import Path

import pytest
from data_helpers import Pictures
from running import run_python

from ttame_jax.data import workers
from ttame_jax.data.loader import train_batches
from ttame_jax.preprocessing import Preprocessing

SMALL = Preprocessing(image_size=8, resize_size=10)

STARTED = """
import multiprocessing, os, sys
sys.path.insert(0, "tests/data")
from data_helpers import Pictures
from ttame_jax.data.loader import train_batches
from ttame_jax.preprocessing import Preprocessing
batches = train_batches(Pictures(8), Preprocessing(8, 10), 4, seed=0, workers=1)
next(batches)
for child in multiprocessing.active_children():
    print(child.pid, flush=True)
"""


def test_workers_end_when_their_parent_is_killed():
    script = STARTED + "os.kill(os.getpid(), 9)"
    pids = [int(pid) for pid in run_python(script, check=False).stdout.split()]
    assert len(pids) == 1
    deadline = time.monotonic() + 20
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs /dev/shm")
def test_a_killed_process_group_leaves_no_shared_memory():
    script = "import os; os.setsid()\n" + STARTED
    script += "maps = open('/proc/self/maps').read().split()\n"
    script += "print(*{word for word in maps if word.startswith('/dev/shm/')}, flush=True)\n"
    script += "os.killpg(0, 9)"
    used = {Path(word) for word in run_python(script, check=False).stdout.split()[1:]}
    assert used
    deadline = time.monotonic() + 20
    while any(path.exists() for path in used):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_workers_survive_signals_to_their_group_and_a_dead_one_is_an_error():
    script = "import os; os.setsid()\n" + STARTED
    script += "import signal\n"
    script += "for number in (signal.SIGINT, signal.SIGTERM):\n"
    script += "    signal.signal(number, lambda *_: None)\n"
    script += "    os.killpg(0, number)\n"
    script += "for _ in range(20): next(batches)\n"
    script += "print('alive')\n"
    script += "os.kill(multiprocessing.active_children()[0].pid, 9)\n"
    script += "for _ in range(100): next(batches)"
    result = run_python(script, check=False)
    assert result.stdout.splitlines()[-1] == "alive", result.stderr
    assert result.returncode == 1 and "KeyboardInterrupt" not in result.stderr
    assert "Failure: an input worker has died" in result.stderr.splitlines()[-1]


def test_no_more_workers_than_cores_are_started(capsys):
    batches = train_batches(Pictures(8), SMALL, 4, seed=0, workers=1000)
    assert batches._workers <= max(os.cpu_count(), 2)
    assert "1000 workers on" in capsys.readouterr().err


def test_batches_that_do_not_fit_into_shared_memory_are_announced(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(workers, "_SHARED_MEMORY", str(tmp_path))
    assert workers._fits_in_shared_memory(1)
    assert not workers._fits_in_shared_memory(2**60)
    assert "they go through pipes, which is slower (in Docker, raise --shm-size" in (
        capsys.readouterr().err
    )
    monkeypatch.setattr(workers, "_SHARED_MEMORY", str(tmp_path / "missing"))
    assert workers._fits_in_shared_memory(2**60)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True

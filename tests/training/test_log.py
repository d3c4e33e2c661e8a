import json
import time
from types import SimpleNamespace

import numpy as np
import pytest

from ttame_jax import files
from ttame_jax.training.log import JsonLines, Log, Validation, read_lines

pytestmark = pytest.mark.quick


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_after_the_step_resumed_from_are_forgotten(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    lines = JsonLines(path, 2)
    assert steps(path) == [1, 2]
    lines.append({"step": 3})
    assert steps(path) == [1, 2, 3]


def test_damaged_lines_are_named_and_dropped(tmp_path, capfd):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n{"step"\n[]\n{"step": "x"}\n{"step": 2}\n')
    JsonLines(path, 2)
    assert steps(path) == [1, 2]
    assert f"{path}: damaged lines are dropped (2, 3, 4, 5)" in capfd.readouterr().err


def test_a_log_is_read_without_its_damaged_lines(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert read_lines(path) == []
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n{"step": 2, "loss": 0.5}\n{"st')
    assert read_lines(path) == [{"step": 1}, {"step": 2, "loss": 0.5}]


def test_lines_in_a_bucket_are_written_whole_now_and_then_and_at_the_end(tmp_path, monkeypatch):
    """A folder stands in for the bucket."""
    monkeypatch.setattr(files, "in_bucket", lambda path: True)
    path = tmp_path / "lines.jsonl"
    path.write_text('{"step": 1}\n')
    lines = JsonLines(path, 1)
    lines.append({"step": 2})
    lines.append({"step": 3})
    assert steps(path) == [1]
    later = time.monotonic() + 60
    monkeypatch.setattr(time, "monotonic", lambda: later)
    lines.append({"step": 4})
    assert steps(path) == [1, 2, 3, 4]
    lines.append({"step": 5})
    lines.close()
    assert steps(path) == [1, 2, 3, 4, 5]


def test_waiting_is_the_share_of_the_time_since_the_last_line(tmp_path, monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    feed = SimpleNamespace(waited=3.0)  # before this log began
    with Log(tmp_path, 0, 4, feed) as logged:
        for step, seconds, waited in ((1, 10, 2), (2, 5, 0)):
            now += seconds
            feed.waited += waited
            logged.write(step, {"loss": np.ones(()), "learning_rate": 0.1}, 20)
        now, feed.waited = now + 7, feed.waited + 7
        logged.write_validation(2, 1, Validation({"AD_15": 1.0}))  # its time is not the training's
        now, feed.waited = now + 4, feed.waited + 1
        logged.write(3, {"loss": np.ones(()), "learning_rate": 0.1}, 20)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["waiting"] for line in lines] == pytest.approx([0.2, 0, 0.25])
    assert [line["images_per_second"] for line in lines] == pytest.approx([2, 4, 5])

"""The logs of a run: a progress bar, metrics.jsonl, validation.jsonl and TensorBoard events."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from ttame_jax.files import FLUSH_SECONDS, LineFile, to_json

if TYPE_CHECKING:
    from ttame_jax.training.feed import Feed  # needs Grain, which reading a log does not


def say(line: str) -> None:
    """Prints a line above the progress bar, in process 0 only."""
    if jax.process_index() == 0:
        tqdm.write(line, file=sys.stderr)


class Validation(NamedTuple):
    """What is logged of a validation.

    Attributes:
      metrics: means in % by name.
      panel: a picture of some maps, uint8 ``[H, W, 3]``. Only process 0 needs it.
    """

    metrics: dict[str, float]
    panel: np.ndarray | None = None


class Log:
    """The logs of a run. A context manager. Only process 0 writes them.

    Args:
      folder: the run's folder.
      first: number of steps finished earlier, 0 for a new run.
      total: number of steps of the whole run.
      feed: its waiting time is logged.
    """

    def __init__(self, folder: Path, first: int, total: int, feed: "Feed"):
        self._feed = feed
        self._writes = jax.process_index() == 0
        self.bar = tqdm(
            initial=first, total=total, unit="step", dynamic_ncols=True, disable=not self._writes
        )
        if self._writes:
            from tensorboardX import SummaryWriter  # slow: it imports PyTorch if installed

            self.metrics, self.validation = (
                JsonLines(folder / name, first) for name in ("metrics.jsonl", "validation.jsonl")
            )
            self.writer = SummaryWriter(
                str(folder / "tensorboard"), purge_step=first, flush_secs=FLUSH_SECONDS
            )
        self._start_interval(first)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()
        if self._writes:
            self.metrics.close()
            self.validation.close()
            self.writer.close()

    def advance(self) -> None:
        self.bar.update()

    def write(self, step: int, metrics: Mapping[str, jax.Array], batch_size: int) -> None:
        values = {name: float(value) for name, value in metrics.items()}  # waits for the step
        seconds = time.perf_counter() - self._since
        values["images_per_second"] = (step - self._last) * batch_size / seconds
        values["waiting"] = (self._feed.waited - self._waited) / seconds
        self._start_interval(step)
        self.bar.set_postfix(loss=f"{values['loss']:.3f}", rate=f"{values['learning_rate']:.1e}")
        self._append("metrics", step, values)

    def write_validation(self, step: int, epoch: int, validation: Validation) -> None:
        values = validation.metrics
        table = ", ".join(f"{name} {value:.1f}" for name, value in values.items())
        say(f"epoch {epoch}: {table}" if epoch else f"before training: {table}")
        self._append("validation", step, {"epoch": epoch, **values})
        if self._writes and validation.panel is not None:
            self.writer.add_image("maps", validation.panel, step, dataformats="HWC")
        self._start_interval(step)

    def _start_interval(self, step: int) -> None:
        self._since, self._last, self._waited = time.perf_counter(), step, self._feed.waited

    def _append(self, name: str, step: int, values: dict[str, float]) -> None:
        if not self._writes:
            return
        getattr(self, name).append({"step": step, **values})
        for key, value in values.items():
            self.writer.add_scalar(f"{name}/{key}", value, step)


class JsonLines:
    """A file with one JSON object per line.

    Lines of steps after the resumed one are dropped, all lines if a run starts anew. So are damaged
    lines, with a message.
    """

    def __init__(self, path: Path, step: int):
        there = epath.Path(path)
        text = there.read_bytes().decode(errors="replace") if there.exists() else ""
        lines = text.split("\n")[:-1]  # an incomplete last line is dropped
        steps = list(map(_step, lines))
        if damaged := [str(i) for i, of in enumerate(steps, start=1) if of is None]:
            say(f"{path}: damaged lines are dropped ({', '.join(damaged[:5])})")
        kept = [line for line, of in zip(lines, steps) if of is not None and of <= step and step]
        self._file = LineFile(path, [line + "\n" for line in kept])
        if text:
            self._file.flush()

    def append(self, record: Mapping) -> None:
        self._file.append(to_json(record) + "\n")

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> list[dict]:
    """The lines of a log without damaged ones. Empty if there is no log, as in an imported run."""
    file = epath.Path(path)
    text = file.read_bytes().decode(errors="replace") if file.exists() else ""
    return [json.loads(line) for line in text.split("\n") if _step(line) is not None]


def _step(line: str) -> int | None:
    """The step of a line; None if the line is damaged."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return None
    return step if isinstance(step, int) else None

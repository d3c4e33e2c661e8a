"""What a run says: a progress bar, metrics.jsonl, validation.jsonl and TensorBoard events."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import jax
from tensorboardX import SummaryWriter
from tqdm import tqdm

from ttame_jax.files import write_atomically


def say(line: str) -> None:
    """Prints a line above the progress bar, from one process of a run alone."""
    if jax.process_index() == 0:
        tqdm.write(line, file=sys.stderr)


class Log:
    """The logs of one run, from the step that it starts or resumes at; a context manager.

    Args:
      folder: of the run.
      first: steps done before.
      total: steps of the whole run.
    """

    def __init__(self, folder: Path, first: int, total: int):
        self.metrics, self.validation = folder / "metrics.jsonl", folder / "validation.jsonl"
        for path in (self.metrics, self.validation):
            _drop_lines_after(path, first)
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first)
        self.bar = tqdm(initial=first, total=total, unit="step", dynamic_ncols=True)
        self._since, self._last = time.perf_counter(), first

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()
        self.writer.close()

    def advance(self) -> None:
        self.bar.update()

    def write(self, step: int, metrics: Mapping[str, jax.Array], batch_size: int) -> None:
        values = {name: float(value) for name, value in metrics.items()}  # waits for the step
        now = time.perf_counter()
        values["images_per_second"] = (step - self._last) * batch_size / (now - self._since)
        self._since, self._last = now, step
        self.bar.set_postfix(loss=f"{values['loss']:.3f}", rate=f"{values['learning_rate']:.1e}")
        self._append(self.metrics, step, values)

    def write_validation(self, step: int, epoch: int, values: dict[str, float]) -> None:
        table = ", ".join(f"{name} {value:.1f}" for name, value in values.items())
        say(f"epoch {epoch}: {table}")
        self._append(self.validation, step, {"epoch": epoch, **values})
        self._since, self._last = time.perf_counter(), step

    def _append(self, path: Path, step: int, values: dict[str, float]) -> None:
        with path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self.writer.add_scalar(f"{path.stem}/{name}", value, step)
        self.writer.flush()


def _drop_lines_after(path: Path, step: int) -> None:
    """Forgets what was logged after the checkpoint that a run resumes from."""
    if not path.exists():
        return
    lines = path.read_text().split("\n")[:-1]  # what follows the last line end was cut short
    kept = [line + "\n" for line in lines if json.loads(line)["step"] <= step]
    write_atomically(path, "".join(kept))

"""Evaluations that resume after an interruption."""

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from ttame_jax.files import SEAL, LineFile, check_seal, seal, to_json
from ttame_jax.metrics.base import Rows


class ResumableRows:
    """Rows of an evaluation, in a file beside its output: a line of settings, then one per image.

    The first of several processes owns the file and tells the others which images are left.

    Args:
      output: the evaluation's output file.
      settings: a file with other settings is discarded.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any]):
        self.path = output.with_name(output.name + ".partial")
        self.header = to_json({"settings": settings})

    def collect(
        self,
        batches: Callable[[np.ndarray, int], Iterable[Rows]],
        indices: Sequence[int] | np.ndarray,
    ) -> tuple[Rows, float]:
        """Evaluates the images that have no row yet.

        Args:
          batches: yields the rows of the images with the given indices, batch by batch. It is also
            given the number of images that have rows.
          indices: of all images.

        Returns:
          The rows of all images, sorted by index, and the total time in seconds. Processes other than
          the first may have no rows.
        """
        first = jax.process_index() == 0
        records = self._read() if first else []
        done = np.isin(indices, [record["index"] for record in records])
        left = np.asarray(indices)[~multihost_utils.broadcast_one_to_all(done)]
        bar = tqdm(
            total=len(indices), initial=len(indices) - len(left), unit="image", disable=not first
        )
        start = time.perf_counter()
        with bar, contextlib.closing(self._file(records)) as file:
            for rows in batches(left, len(indices) - len(left)) if len(left) else ():
                seconds, start = time.perf_counter() - start, time.perf_counter()
                count = len(rows["index"])
                new = [
                    {name: values[i].tolist() for name, values in rows.items()}
                    | {"seconds": seconds / count}
                    for i in range(count)
                ]
                if first:
                    file.append(*map(_line, new))
                records += new
                bar.update(count)
        if not records:  # all were there, and only the first process has read them
            return {}, 0.0
        records.sort(key=lambda record: record["index"])
        rows = {name: _column([record[name] for record in records]) for name in records[0]}
        return rows, float(rows.pop("seconds").sum())

    def remove(self) -> None:
        """Deletes the file, once the output is written."""
        self.path.unlink()

    def _file(self, records: Iterable[dict]) -> LineFile:
        return LineFile(self.path, [self.header + "\n", *map(_line, records)])

    def _read(self) -> list[dict]:
        """The rows of a file with these settings, one per image. A file without any is deleted.

        Damaged lines are left out, so that their images are evaluated again.
        """
        lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []
        same = bool(lines) and lines[0].decode(errors="replace") == self.header
        rows = {row["index"]: row for line in lines[1:] if same and (row := _row(line))}
        if not rows:
            self.path.unlink(missing_ok=True)
        return list(rows.values())


def _line(record: Mapping[str, Any]) -> str:
    return to_json(seal(record)) + "\n"


def _row(line: bytes) -> dict | None:
    """The row in a line of the file; None if the line is damaged."""
    try:
        fields = json.loads(line)
        return check_seal(fields) if SEAL in fields else None
    except (ValueError, TypeError, AttributeError):
        return None


def _column(values: Sequence) -> np.ndarray:
    """One value per image; null, which stands for NaN in the file, becomes NaN again."""
    column = np.array(values)
    return column.astype(float) if column.dtype == object else column

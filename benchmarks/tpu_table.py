"""The table of docs/tpu.md, from results of `tpu_compile.py`.

python benchmarks/tpu_table.py results/*.json
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

HEADER = """\
| chips | backbone | program | batch | cycles, million | ms | images/s | share of peak | GiB | all-reduces |
|---|---|---|---|---|---|---|---|---|---|"""


def table(results: Iterable[dict]) -> str:
    """A Markdown table with one row per result."""
    return "\n".join([HEADER, *map(row, results)])


def row(result: dict) -> str:
    setting, seconds = result["setting"], result["estimated_seconds"]
    share, reduced = result["share_of_peak"], result["collectives"].get("all-reduce")
    cells = [
        setting["topology"],
        setting["backbone"],
        setting["program"],
        result["batch_size"],
        f"{result['estimated_cycles'] / 1e6:.0f}",
        f"{1e3 * seconds:.0f}",
        f"{result['batch_size'] / seconds:,.0f}",
        "" if share is None else f"{share:.0%}".replace("%", " %"),
        f"{result['memory_bytes_per_chip'] / 2**30:.1f}",
        f"{reduced['count']} ({reduced['bytes'] / 1e6:.0f} MB)" if reduced else "0",
    ]
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    print(table(json.loads(Path(path).read_text()) for path in sys.argv[1:]))

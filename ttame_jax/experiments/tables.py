"""Methods side by side, as in the paper's Tables II to V: Markdown, CSV and LaTeX."""

import csv
import io
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

from ttame_jax.methods import method_title
from ttame_jax.metrics import TableRow, interval, list_metrics, load_metrics

Figures = Mapping[str, Any]
"""A method's figures, as `ttame evaluate` writes them."""


@dataclass(frozen=True)
class Row:
    """A metric's values for all methods.

    Attributes:
      title: the metric's.
      values: in %.
      intervals: 95 %.
      lower_is_better: the metric's direction.
      within_chance: whether a value that is not the best differs from it by chance only.
      spreads: the standard deviations over seeds; None for a method with one.
    """

    title: str
    values: tuple[float, ...]
    intervals: tuple[tuple[float, float], ...]
    lower_is_better: bool
    within_chance: tuple[bool, ...]
    spreads: tuple[float | None, ...]

    def texts(self) -> list[str]:
        """The values, and the standard deviations of those that have one."""
        return [
            f"{value:.2f}" if spread is None else f"{value:.2f} ± {spread:.2f}"
            for value, spread in zip(self.values, self.spreads)
        ]

    def ranks(self, ranked: Sequence[bool]) -> list[int | None]:
        """Ranks the methods: 0 is the best, and values equal to two decimals share a rank.

        The rank is None where `ranked` is False.
        """
        sign = 1 if self.lower_is_better else -1
        signed = [sign * round(value, 2) for value in self.values]
        order = sorted({value for value, counts in zip(signed, ranked) if counts})
        places = {value: place for place, value in enumerate(order)}
        return [places[v] if counts else None for v, counts in zip(signed, ranked)]


def comparison_tables(
    figures: Sequence[Figures], replicates: Sequence[Mapping[str, Any]] = ()
) -> dict[str, list[Row]]:
    """Returns the tables by name, with the metrics that all methods were evaluated on.

    Metrics that share a table take turns: AD↓(100%), IC↑(100%), AD↓(50%) and so on.

    Args:
      figures: of each method.
      replicates: `metrics.replicates` of each method, to tell what is within chance of the best.
    """
    tables = defaultdict(list)
    for metric in load_metrics(list_metrics()):
        if all(metric.key in one for one in figures):
            tables[metric.table].append(metric.table_rows())
    return {
        table: [
            _row(row, figures, replicates)
            for row in chain.from_iterable(zip_longest(*rows))
            if row is not None
        ]
        for table, rows in tables.items()
    }


def _row(row: TableRow, figures: Sequence[Figures], replicates: Sequence[Mapping[str, Any]]) -> Row:
    values = tuple(map(row.value, figures))
    intervals = tuple(tuple(row.value(one["intervals"])) for one in figures)
    ranked = _ranked(figures)
    best = (min if row.lower_is_better else max)(v for v, counts in zip(values, ranked) if counts)
    chance = [False] * len(values)
    for i, (value, counts) in enumerate(zip(values, ranked)):
        if replicates and counts and value != best:
            difference = row.value(replicates[i]) - row.value(replicates[values.index(best)])
            low, high = interval(difference)
            chance[i] = bool(low <= 0 <= high)
    spreads = tuple(row.value(one["spread"]) if "spread" in one else None for one in figures)
    return Row(row.title, values, intervals, row.lower_is_better, tuple(chance), spreads)


def _ranked(figures: Sequence[Figures]) -> list[bool]:
    """Whether each method is ranked: not if it was evaluated on fewer images than others."""
    most = max(one["images"] for one in figures)
    return [one["images"] == most for one in figures]


Cell = Callable[[str, int | None, bool], str]
"""Formats a value with its rank, and whether it is within chance of the best."""


def _cells(figures: Sequence[Figures], rows: Sequence[Row], cell: Cell) -> list[list[str]]:
    """Returns the table's body: titles and values, with the forward passes in the last row.

    Methods evaluated on fewer images than others are excluded from the ranking.
    """
    ranked = _ranked(figures)
    body = []
    for row in rows:
        body.append([row.title, *map(cell, row.texts(), row.ranks(ranked), row.within_chance)])
    return [*body, ["FP↓", *(str(one["forward_passes"]) for one in figures)]]


def marked_in_markdown(value: str, rank: int | None, chance: bool = False) -> str:
    """A value: bold if it is the best, underlined if it is the second best, and with an asterisk if
    it is within chance of the best."""
    marks = {0: f"**{value}**", 1: f"<u>{value}</u>"}
    return marks.get(-1 if rank is None else rank, value) + (r"\*" if chance else "")


def marked_in_latex(value: str, rank: int | None, chance: bool = False) -> str:
    """As `marked_in_markdown`."""
    marks = {0: rf"\textbf{{{value}}}", 1: rf"\underline{{{value}}}"}
    return marks.get(-1 if rank is None else rank, value) + ("$^{*}$" if chance else "")


CHANCE = "* is within chance of the best: the 95 % interval of the difference on the same images contains 0"


def titles(figures: Sequence[Figures]) -> list[str]:
    """Returns the methods' titles, with the number of seeds if it is not one, and of images if others
    have more."""
    most = max(one["images"] for one in figures)
    return [_title(one, most) for one in figures]


def _title(figures: Figures, most: int) -> str:
    notes = [f"{figures['seeds']} seeds"] if "seeds" in figures else []
    if figures["images"] < most:
        notes.append(f"{figures['images']} images")
    name = method_title(figures["method"])
    return f"{name} ({', '.join(notes)})" if notes else name


def markdown(figures: Sequence[Figures], rows: Sequence[Row]) -> str:
    """Formats a Markdown table, with the marks of `marked_in_markdown`."""
    body = _cells(figures, rows, marked_in_markdown)
    head = [["measure", *titles(figures)], ["---"] * (len(figures) + 1)]
    note = f"\n\\{CHANCE}.\n" if any(any(row.within_chance) for row in rows) else ""
    return markdown_table([*head, *body]) + note


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Formats lines of cells, the second of which are dashes, as a Markdown table."""
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def all_rows(figures: Sequence[Figures]) -> list[Row]:
    """Returns the rows of all tables, one table after the other."""
    return [row for rows in comparison_tables(figures).values() for row in rows]


def differences(head: Sequence[str], labels: Iterable[Sequence[str]], rows: Sequence[Row]) -> str:
    """Formats a Markdown table with a line for each difference, in percentage points.

    Brackets are 95 % intervals. Differences whose interval does not contain 0 are bold.

    Args:
      head: the titles of the labels.
      labels: the first cells of each line.
      rows: of differences.
    """
    lines = [[*label, *(_difference(row, i) for row in rows)] for i, label in enumerate(labels)]
    titles = [*head, *(row.title for row in rows)]
    return markdown_table([titles, ["---"] * len(titles), *lines])


def _difference(row: Row, i: int) -> str:
    low, high = row.intervals[i]
    text = f"{row.values[i]:+.1f} [{low:.1f}, {high:.1f}]"
    return text if low <= 0 <= high else f"**{text}**"


def comma_separated(figures: Sequence[Figures], rows: Sequence[Row]) -> str:
    """Formats CSV with plain values."""
    return csv_table([["measure", *titles(figures)], *_cells(figures, rows, lambda v, *_: v)])


def csv_table(lines: Iterable[Iterable[Any]]) -> str:
    """Formats lines of cells as CSV."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(lines)
    return buffer.getvalue()


def latex(figures: Sequence[Figures], rows: Sequence[Row]) -> str:
    """Formats a LaTeX table, which needs the package booktabs.

    Marks are those of `marked_in_latex`. A line below each row has the 95 % intervals. The caption has the backbone and the number of images.
    """
    *body, passes = _cells(figures, rows, marked_in_latex)
    text = []
    for row, cells in zip(rows, body, strict=True):
        small = (rf"{{\scriptsize [{low:.1f}, {high:.1f}]}}" for low, high in row.intervals)
        text += [_latex_line(cells), _latex_line(["", *small]) + r"[2pt]"]
    backbone, images = figures[0]["backbone"], max(one["images"] for one in figures)
    caption = f"Explanation methods on {backbone}, {images} images, with 95 % intervals; FP is the "
    caption += "number of forward passes per image."
    if any("spread" in one for one in figures):
        caption += " ± is the standard deviation over seeds."
    if any(any(row.within_chance) for row in rows):
        caption += f" {CHANCE}."
    text += [r"\midrule", _latex_line(passes)]
    return _latex_table(caption, "l" + "r" * len(figures), ["Measure", *titles(figures)], text)


def latex_table(
    caption: str, columns: str, head: Sequence[str], body: Sequence[Sequence[str]]
) -> str:
    """Formats lines of cells as a LaTeX table, which needs the package booktabs.

    Args:
      caption: plain text.
      columns: their alignment, such as "lrr".
      head: the titles of the columns.
      body: the lines of cells.
    """
    return _latex_table(caption, columns, head, list(map(_latex_line, body)))


def _latex_table(caption: str, columns: str, head: Sequence[str], text: Sequence[str]) -> str:
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{caption.translate(_LATEX)}}}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            _latex_line(head),
            r"\midrule",
            *text,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _latex_line(cells: Sequence[str]) -> str:
    return " & ".join(cells).translate(_LATEX) + r" \\"


_LATEX = str.maketrans(
    {"%": r"\%", "↓": r"$\downarrow$", "↑": r"$\uparrow$", "_": r"\_", "±": r"$\pm$"}
)

FORMATS = {"md": markdown, "csv": comma_separated, "tex": latex}
"""Formatting functions by file extension."""

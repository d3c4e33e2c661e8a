"""The paper's Tables II to V: methods side by side, as Markdown, CSV and LaTeX."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

TITLES = {
    "gradcam": "Grad-CAM",
    "gradcam++": "Grad-CAM++",
    "scorecam": "Score-CAM",
    "ablationcam": "Ablation-CAM",
    "rise": "RISE",
    "transformer_lrp": "Transformer LRP",
    "iia": "IIA",
    "lcam": "L-CAM-Img",
    "ttame": "T-TAME",
}
"""Methods' names in the paper."""


@dataclass(frozen=True)
class Row:
    """A measure of every method, in %."""

    title: str
    values: tuple[float, ...]
    lower_is_better: bool

    def ranks(self, ranked: Sequence[bool]) -> list[int | None]:
        """Place of each method, 0 the best and equal ones alike, as far as two decimals tell;
        None of those that are not ranked."""
        sign = 1 if self.lower_is_better else -1
        signed = [sign * round(value, 2) for value in self.values]
        order = sorted({value for value, counts in zip(signed, ranked) if counts})
        places = {value: place for place, value in enumerate(order)}
        return [places[v] if counts else None for v, counts in zip(signed, ranked)]


def ad_ic_rows(figures: Sequence[Mapping]) -> list[Row]:
    """Tables II and III."""
    return [
        Row(f"{measure}{arrow}({percent}%)", _values(figures, measure, percent), arrow == "↓")
        for percent in ("100", "50", "15")
        for measure, arrow in (("AD", "↓"), ("IC", "↑"))
        if all(measure in one for one in figures)
    ]


def road_rows(figures: Sequence[Mapping]) -> list[Row]:
    """Tables IV and V."""
    if not all("ROAD" in one for one in figures):
        return []
    return [
        Row(f"{order}{arrow}", tuple(one["ROAD"][order]["mean"] for one in figures), arrow == "↓")
        for order, arrow in (("MoRF", "↓"), ("LeRF", "↑"))
    ]


def _values(figures: Sequence[Mapping], measure: str, percent: str) -> tuple[float, ...]:
    return tuple(one[measure][percent] for one in figures)


Cell = Callable[[str, int | None], str]  # a value and its rank


def _cells(figures: Sequence[Mapping], rows: Sequence[Row], cell: Cell) -> list[list[str]]:
    """The table's body: a title and the methods' values in each line, forward passes last.

    Methods measured on fewer images than others stand unranked.
    """
    most = max(one["images"] for one in figures)
    ranked = [one["images"] == most for one in figures]
    body = [
        [row.title, *(cell(f"{v:.2f}", r) for v, r in zip(row.values, row.ranks(ranked)))]
        for row in rows
    ]
    return [*body, ["FP↓", *(str(one["forward_passes"]) for one in figures)]]


def titles(figures: Sequence[Mapping]) -> list[str]:
    """The methods' names, with their number of images where it is less than the others'."""
    most = max(one["images"] for one in figures)
    names = [TITLES.get(one["method"], one["method"]) for one in figures]
    return [
        name if one["images"] == most else f"{name} ({one['images']} images)"
        for name, one in zip(names, figures)
    ]


def markdown(figures: Sequence[Mapping], rows: Sequence[Row]) -> str:
    """The best value of a line is bold, the second underlined."""
    marks = {0: "**{}**", 1: "<u>{}</u>"}
    body = _cells(figures, rows, lambda value, rank: marks.get(rank, "{}").format(value))
    head = [["measure", *titles(figures)], ["---"] * (len(figures) + 1)]
    return "".join("| " + " | ".join(line) + " |\n" for line in [*head, *body])


def comma_separated(figures: Sequence[Mapping], rows: Sequence[Row]) -> str:
    """Plain values."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["measure", *titles(figures)])
    writer.writerows(_cells(figures, rows, lambda value, rank: value))
    return buffer.getvalue()


def latex(figures: Sequence[Mapping], rows: Sequence[Row]) -> str:
    """A tabular; the best value of a line is bold, the second underlined."""
    marks = {0: r"\textbf{%s}", 1: r"\underline{%s}"}
    body = _cells(figures, rows, lambda value, rank: marks.get(rank, "%s") % value)
    lines = [["Measure", *titles(figures)], *body]
    text = [" & ".join(line).translate(_LATEX) + r" \\" for line in lines]
    columns = "l" + "r" * len(figures)
    return "\n".join(
        [rf"\begin{{tabular}}{{{columns}}}", r"\hline", text[0], r"\hline"]
        + text[1:]
        + [r"\hline", r"\end{tabular}", ""]
    )


_LATEX = str.maketrans({"%": r"\%", "↓": r"$\downarrow$", "↑": r"$\uparrow$", "_": r"\_"})

FORMATS = {"md": markdown, "csv": comma_separated, "tex": latex}
"""File endings and what writes them."""

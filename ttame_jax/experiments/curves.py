"""`ttame curves`: ROAD scores over the share of removed pixels (Fig. 8 to 13 of the paper)."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ttame_jax.experiments.evaluate import read_figures
from ttame_jax.experiments.tables import titles
from ttame_jax.files import below_common, check_output_folder, write_atomically
from ttame_jax.plots import line_style, save_figure

ORDERS = {"MoRF": "most relevant first (lower is better)", "LeRF": "least relevant first (higher)"}


def curves(figures: Sequence[Path], output: Path) -> None:
    """Draws the ROAD curves of evaluations and writes their values.

    Args:
      figures: JSON files of `ttame evaluate --measures road`. Lines are named after their methods,
        or after the files if two have the same method, with their folders if two files have the
        same name.
      output: folder for `road.png`, `road.svg` and `road.csv`.

    Raises:
      ValueError: a file has no ROAD figures.
      Damaged: a file is damaged.
      FileNotFoundError: a file does not exist.
    """
    check_output_folder(output)
    save_curves(_read(figures), output)


def save_curves(lines: Mapping[str, Mapping], output: Path) -> None:
    """Writes `road.png`, `road.svg` and `road.csv`.

    Args:
      lines: `{name: figures}`.
      output: an existing folder.
    """
    figure = draw(lines)
    for suffix in ("png", "svg"):
        save_figure(figure, output / f"road.{suffix}")
    write_atomically(output / "road.csv", table(lines))
    print(f"{output / 'road.png'}, .svg and .csv: {', '.join(lines)}")


def _read(paths: Sequence[Path]) -> dict[str, dict]:
    """Returns `{name: figures}`, where the name also replaces the method in the figures."""
    if not paths:
        raise ValueError("no figures given: ttame curves FIGURES.json... --output DIR")
    paths = list(dict.fromkeys(path.absolute() for path in paths))
    contents = [_figures(path) for path in paths]
    methods = [content["method"] for content in contents]
    in_folders = [str(path.with_suffix("")) for path in below_common(paths)]
    choices = methods, [path.stem for path in paths], in_folders, list(map(str, paths))
    names = next(names for names in choices if len(set(names)) == len(paths))
    return {name: content | {"method": name} for name, content in zip(names, contents)}


def _figures(path: Path) -> dict:
    figures = read_figures(path)
    if "ROAD" not in figures:
        raise ValueError(f"{path} has no ROAD figures: run ttame evaluate --measures road")
    return figures


def draw(lines: Mapping[str, Mapping]) -> Figure:
    """Draws MoRF and LeRF side by side, from `{name: figures}`."""
    height = 3.4 + 0.2 * math.ceil(len(lines) / 2)  # the legend is below, in two columns
    figure = Figure(figsize=(9, height), layout="constrained")
    for axes, (order, title) in zip(figure.subplots(1, 2, sharey=True), ORDERS.items()):
        for i, (name, line) in enumerate(zip(titles(list(lines.values())), lines.values())):
            road = dict(line["ROAD"][order])
            label = f"{name}: {road.pop('mean'):.1f}"
            axes.plot([int(v) for v in road], list(road.values()), **line_style(i), label=label)
        axes.set(title=f"{order}: {title}", xlabel="removed pixels, %")
        axes.grid(alpha=0.3)
        place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.18), "ncols": 2}
        for text in axes.legend(title="mean", fontsize=8, **place).get_texts():
            text.set_parse_math(False)
    figure.axes[0].set_ylabel("confidence, %")
    figure.axes[0].set_ylim(bottom=0)  # of both axes, after all lines are drawn
    return figure


def table(lines: Mapping[str, Mapping]) -> str:
    """Returns the curves' values as CSV, with one line per method and order."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    columns = list(next(iter(lines.values()))["ROAD"]["MoRF"])
    writer.writerow(["method", "order", *columns])
    for name, line in lines.items():
        for order in ORDERS:
            values = line["ROAD"][order]
            writer.writerow([name, order, *(f"{values[key]:.3f}" for key in columns)])
    return buffer.getvalue()

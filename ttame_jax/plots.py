"""Plots, drawn with Matplotlib."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ttame_jax.files import write_atomically
from ttame_jax.pictures import overlay

# Okabe and Ito's colours, which colour-blind readers can distinguish. Markers and dashes distinguish
# the lines in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "os^Dv<>P"
DASHES = ("-", "--", "-.", ":")


def line_style(i: int) -> dict[str, str]:
    """Matplotlib's colour, marker and line style for the i-th line of a plot."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[i % len(MARKERS)],
        "linestyle": DASHES[i % len(DASHES)],
    }


def explanation_grid(
    images: np.ndarray, maps: Mapping[str, np.ndarray], titles: Sequence[str]
) -> Figure:
    """Images ``[N, H, W, 3]`` uint8 in columns, above one row per method with its maps ``[N, h, w]``
    over the images (the paper's Fig. 15)."""
    rows: list[tuple[str, Sequence[np.ndarray] | np.ndarray]] = [("image", images)]
    for name, of_images in maps.items():
        rows.append((name, [overlay(image, one) for image, one in zip(images, of_images)]))
    return picture_grid(rows, titles)


def picture_grid(
    rows: Sequence[tuple[str, Sequence[np.ndarray] | np.ndarray]], titles: Sequence[str]
) -> Figure:
    """Rows of pictures ``[H, W, 3]`` uint8 with the rows' names, below the titles of the columns."""
    columns = len(rows[0][1])
    size = (1.5 * columns + 0.4, 1.5 * len(rows) + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes_row, (name, pictures) in zip(grid, rows):
        for axes, picture in zip(axes_row, pictures):
            axes.imshow(picture)
            axes.set(xticks=[], yticks=[])
        axes_row[0].set_ylabel(name, fontsize=9, parse_math=False)
    for axes, title in zip(grid[0], titles):
        axes.set_title(title, fontsize=9, parse_math=False)
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes a figure in the format of the file's extension. The same figure gives the same file."""
    buffer, kind = io.BytesIO(), Path(path).suffix.lstrip(".")
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    with matplotlib.rc_context({"svg.hashsalt": "ttame"}):
        figure.savefig(buffer, format=kind, dpi=120, metadata=undated)
    write_atomically(path, buffer.getvalue())

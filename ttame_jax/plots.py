"""Plots, drawn with Matplotlib."""

import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ttame_jax.files import write_atomically
from ttame_jax.pictures import COLOUR_MAP, heatmap, overlay

# Okabe and Ito's colours, which colour-blind readers can distinguish. Markers and dashes distinguish
# the lines in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "os^Dv<>P"
DASHES = ("-", "--", "-.", ":")


def line_style(i: int) -> dict[str, str]:
    """Matplotlib's colour, marker and line style for the i-th line of a plot.

    The first 64 differ, since markers and dashes are shifted where the colours begin again.
    """
    shifted = i + i // len(COLOURS)
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[shifted % len(MARKERS)],
        "linestyle": DASHES[shifted % len(DASHES)],
    }


class Panel(NamedTuple):
    """A picture of a grid.

    Attributes:
      picture: uint8 ``[H, W, 3]``.
      title: the lines of text above it.
      span: the number of columns that it is centred over.
    """

    picture: np.ndarray
    title: str = ""
    span: int = 1


SIDE = 1.6  # inches; the height or width of a picture
GAP = 0.08  # inches
TEXT_SIZE = 8  # points
LINE = 1.25 * TEXT_SIZE / 72  # inches
LETTER = 0.55 * TEXT_SIZE / 72  # inches; the mean width of a letter
BAR = 0.1  # inches; the width of the colour bar


def picture_grid(
    rows: Sequence[tuple[str, Sequence[Panel]]],
    same: Literal["height", "width"] = "height",
    colour_map: str = COLOUR_MAP,
) -> Figure:
    """Pictures in rows and columns with equal gaps, and a colour bar from 0 to 1.

    Args:
      rows: the label of each row and its pictures.
      same: the side that all pictures have in common. The other one follows from their proportions.
      colour_map: of the bar; a name in cmap's catalogue.
    """
    sizes = [[_size(panel, same) for panel in panels] for _, panels in rows]
    heights = [max(height for _, height in of_row) for of_row in sizes]
    titles = [
        [_wrapped(panel.title, width) for panel, (width, _) in zip(panels, of_row)]
        for (_, panels), of_row in zip(rows, sizes)
    ]
    labels = [_wrapped(label, height) for (label, _), height in zip(rows, heights)]
    lines = [max(map(len, of_row)) for of_row in titles]
    heads = [LINE * (max(lines) if i and count else count) for i, count in enumerate(lines)]
    left = GAP + LINE * max(map(len, labels))
    edges = left + np.cumsum([0, *(_column_widths(rows, sizes) + GAP)])
    height = sum(heights) + sum(heads) + GAP * (len(rows) + 1)
    figure = Figure((edges[-1] + BAR + 6 * LETTER, height))
    bottom = height
    for i, (_, panels) in enumerate(rows):
        bottom -= GAP + heads[i] + heights[i]
        middle = bottom + heights[i] / 2
        label = "\n".join(labels[i])
        _write(figure, left - GAP / 2, middle, label, rotation=90, ha="right", va="center")
        column = 0
        for panel, size, title in zip(panels, sizes[i], titles[i]):
            centre = (edges[column] + edges[column + panel.span] - GAP) / 2
            axes = _axes(figure, centre - size[0] / 2, bottom, *size)
            axes.imshow(panel.picture, aspect="auto")
            for k, line in enumerate(reversed(title)):
                _write(figure, centre, bottom + size[1] + LINE * (k + 0.35), line, ha="center")
            column += panel.span
    bar = _axes(figure, edges[-1], bottom, BAR, height - heads[0] - GAP - bottom)
    colours = heatmap(np.linspace(1, 0, 256)[:, None], (256, 1), colour_map)
    bar.imshow(colours, aspect="auto", extent=(0, 1, 0, 1))
    bar.yaxis.tick_right()
    bar.set_yticks([0, 0.5, 1], ["0", "0.5", "1"], fontsize=TEXT_SIZE)
    return figure


def _column_widths(rows: Sequence[tuple[str, Sequence[Panel]]], sizes) -> np.ndarray:
    """The width of the widest picture in each column, in inches, of those that have one column."""
    widths = np.zeros(sum(panel.span for panel in rows[0][1]))
    for (_, panels), of_row in zip(rows, sizes):
        column = 0
        for panel, (width, _) in zip(panels, of_row):
            if panel.span == 1:
                widths[column] = max(widths[column], width)
            column += panel.span
    return widths


def _size(panel: Panel, same: Literal["height", "width"]) -> tuple[float, float]:
    """Width and height of a picture in inches."""
    height, width = panel.picture.shape[:2]
    return (SIDE * width / height, SIDE) if same == "height" else (SIDE, SIDE * height / width)


def _axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes without ticks at a place in inches."""
    whole = figure.get_figwidth(), figure.get_figheight()
    place = left / whole[0], bottom / whole[1], width / whole[0], height / whole[1]
    axes = figure.add_axes(place)
    axes.set(xticks=[], yticks=[])
    return axes


def _write(figure: Figure, x: float, y: float, text: str, **alignment: Any) -> None:
    """Writes text at a place in inches."""
    place = x / figure.get_figwidth(), y / figure.get_figheight()
    figure.text(*place, text, fontsize=TEXT_SIZE, parse_math=False, ma="center", **alignment)


def _wrapped(text: str, width: float) -> list[str]:
    """The lines of a text, each broken into at most two that fit into a width in inches."""
    letters = max(int(width / LETTER), 4)
    wrapper = textwrap.TextWrapper(letters, max_lines=2, placeholder="…")
    return [line for whole in text.split("\n") for line in wrapper.wrap(whole)]


def explanation_grid(
    images: np.ndarray, maps: Mapping[str, np.ndarray], titles: Sequence[str]
) -> Figure:
    """Images ``[N, H, W, 3]`` uint8 in columns, above one row per method with its maps ``[N, h, w]``
    over the images (the paper's Fig. 15)."""
    overlays = {
        name: [Panel(overlay(image, one)) for image, one in zip(images, of_images)]
        for name, of_images in maps.items()
    }
    first = ("image", [Panel(image, title) for image, title in zip(images, titles)])
    return picture_grid([first, *overlays.items()])


def inline_svg(figure: Figure) -> str:
    """A figure as an SVG element for a web page, whose text colour and fonts it takes."""
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    for legend in (*figure.legends, *filter(None, (axes.get_legend() for axes in figure.axes))):
        legend.set_frame_on(False)
    buffer, none = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": "ttame", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata=none)
    element = buffer.getvalue().partition("<svg")[2]
    # Ids would not be unique on a page with several figures.
    named = re.sub(r'<g id="[^"]*"', "<g", f"<svg{element}")
    return named.replace("#000000", "currentColor")


def save_figure(figure: Figure, path: str | Path, dpi: int = 120) -> None:
    """Writes a figure in the format of the file's extension. The same figure gives the same file.

    Args:
      figure: the figure.
      path: a .png, .svg or .pdf file.
      dpi: dots per inch of PNG files, and of pictures in the others.
    """
    buffer, kind = io.BytesIO(), Path(path).suffix.lstrip(".")
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    # Journals take no Type 3 fonts, which are the default in PDF files.
    with matplotlib.rc_context({"svg.hashsalt": "ttame", "pdf.fonttype": 42}):
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=undated)
    write_atomically(path, buffer.getvalue())

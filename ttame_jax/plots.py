"""Explanation maps as pictures."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ttame_jax.files import write_atomically
from ttame_jax.masking import upsample

COLOUR_MAP = "turbo"

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


def heatmap(explanation_map: jax.typing.ArrayLike, size: tuple[int, int]) -> np.ndarray:
    """A map ``[h, w]`` in [0, 1] as colours: uint8 ``[*size, 3]``, blue (0) to red (1)."""
    values = np.asarray(upsample(jnp.asarray(explanation_map, jnp.float32), size))
    return matplotlib.colormaps[COLOUR_MAP](values, bytes=True)[..., :3]


def overlay(
    image: np.ndarray, explanation_map: jax.typing.ArrayLike, opacity: float = 0.5
) -> np.ndarray:
    """The heatmap of a map ``[h, w]`` over its image ``[H, W, 3]``, both uint8."""
    colours = heatmap(explanation_map, image.shape[:2])
    return ((1 - opacity) * image + opacity * colours).round().astype(np.uint8)


def explanation_figure(
    image: np.ndarray, maps: Sequence[jax.typing.ArrayLike], titles: Sequence[str]
) -> Figure:
    """An image ``[H, W, 3]`` uint8 and its overlay for each map ``[h, w]``, in one row."""
    panels = [(image, "image"), *((overlay(image, m), title) for m, title in zip(maps, titles))]
    figure = Figure(figsize=(2.6 * len(panels), 2.9), layout="constrained")
    for axes, (picture, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        axes.imshow(picture)
        axes.set_title(title, fontsize=10, parse_math=False)
        axes.axis("off")
    return figure


def explanation_grid(
    images: np.ndarray, maps: Mapping[str, np.ndarray], titles: Sequence[str]
) -> Figure:
    """Images ``[N, H, W, 3]`` uint8 in columns, above one row per method with its maps ``[N, h, w]``
    over the images (the paper's Fig. 15)."""
    rows: dict[str, Sequence[np.ndarray] | np.ndarray] = {"image": images}
    for name, of_images in maps.items():
        rows[name] = [overlay(image, one) for image, one in zip(images, of_images)]
    size = (1.5 * len(images) + 0.4, 1.5 * len(rows) + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(rows), len(images), squeeze=False)
    for axes_row, (name, pictures) in zip(grid, rows.items()):
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


def save_image(image: np.ndarray, path: str | Path) -> None:
    """Writes a uint8 ``[H, W, 3]`` image as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())

"""Explanation maps as pictures, drawn with Pillow."""

import functools
import io
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import cmap
import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ttame_jax.files import write_atomically

COLOUR_MAP = "inferno"
"""Name of the default colour map, which is perceptually uniform."""

FONT = Path(__file__).parent / "fonts" / "DejaVuSans.ttf"
"""The font of titles. It has Latin, Greek and Cyrillic letters."""

OPACITY = 0.5
"""Default share of the heatmap in an overlay."""

PANEL_HEIGHT = 320
MOST_ELONGATED = 16
"""Largest width of a panel, as a multiple of its height."""
COLUMNS = 7
GAP = 12
TEXT_SIZE = 15
BAR_WIDTH = 14


def check_colour_map(name: str) -> None:
    """Raises ValueError if cmap's catalogue has no colour map of that name."""
    _colours(name)


@functools.cache
def _colours(colour_map: str) -> np.ndarray:
    """The colours of the values 0 to 255: uint8 ``[256, 3]``."""
    try:
        colours = cmap.Colormap(colour_map)
    except ValueError:
        raise ValueError(
            f"there is no colour map {colour_map!r}; there are inferno, viridis, magma, turbo, jet "
            "and the others of https://cmap-docs.readthedocs.io"
        ) from None
    return np.asarray(colours(np.arange(256), bytes=True))[:, :3]


def resize_map(explanation_map: jax.typing.ArrayLike, size: tuple[int, ...]) -> np.ndarray:
    """Resizes a map ``[h, w]`` to ``[*size]``, bilinear with half-pixel centres; float32.

    Equal to `ttame_jax.masking.upsample` as long as no side shrinks.
    """
    values, (height, width) = Image.fromarray(np.asarray(explanation_map, np.float32)), size
    return np.asarray(values.resize((width, height), Image.Resampling.BILINEAR))


def heatmap(
    explanation_map: jax.typing.ArrayLike, size: tuple[int, ...], colour_map: str = COLOUR_MAP
) -> np.ndarray:
    """A map ``[h, w]`` in [0, 1] as colours: uint8 ``[*size, 3]``."""
    values = resize_map(explanation_map, size).clip(0, 1)
    return _colours(colour_map)[(255 * values + 0.5).astype(np.uint8)]


def overlay(
    image: np.ndarray,
    explanation_map: jax.typing.ArrayLike,
    opacity: float = OPACITY,
    colour_map: str = COLOUR_MAP,
) -> np.ndarray:
    """The heatmap of a map ``[h, w]`` over its image: uint8 ``[H, W, 3]``, as the image.

    Args:
      image: the image.
      explanation_map: values in [0, 1].
      opacity: share of the heatmap, in [0, 1].
      colour_map: name of a colour map in cmap's catalogue, which includes Matplotlib's.

    Raises:
      ValueError: an opacity outside [0, 1], or an unknown colour map.
    """
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity must lie in [0, 1], not {opacity}")
    colours = heatmap(explanation_map, image.shape[:2], colour_map)
    return np.asarray(Image.blend(Image.fromarray(image), Image.fromarray(colours), opacity))


def transparent(
    explanation_map: jax.typing.ArrayLike, size: tuple[int, ...], colour_map: str = COLOUR_MAP
) -> np.ndarray:
    """The heatmap of a map ``[h, w]``, the more opaque the higher its value: uint8 ``[*size, 4]``."""
    values = resize_map(explanation_map, size).clip(0, 1)
    levels = (255 * values + 0.5).astype(np.uint8)
    return np.dstack([_colours(colour_map)[levels], levels])


def panels(
    pictures: Iterable[np.ndarray], titles: Sequence[str], colour_map: str = COLOUR_MAP
) -> Image.Image:
    """Pictures of one size, uint8 ``[H, W, 3]``, under their titles, with a colour bar.

    Rows have at most `COLUMNS` pictures, which are drawn one at a time and need not all be in memory.
    """
    pictures = iter(pictures)
    first = next(pictures)
    height, width = first.shape[:2]
    rows = -(-len(titles) // COLUMNS)
    columns = -(-len(titles) // rows)
    font = _font()
    scale = min(PANEL_HEIGHT / height, MOST_ELONGATED * PANEL_HEIGHT / width)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    wide = max(size[0], 8 * TEXT_SIZE)
    title_lines = [_wrapped(title, wide, font) for title in titles]
    line_height = round(1.3 * TEXT_SIZE)
    top = GAP + line_height * max(map(len, title_lines))
    bar_text = round(font.getlength("0.0")) + 6
    total = GAP + columns * (wide + GAP) + BAR_WIDTH + bar_text + GAP
    canvas = Image.new("RGB", (total, rows * (top + PANEL_HEIGHT) + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (picture, lines) in enumerate(zip(itertools.chain([first], pictures), title_lines)):
        row, column = divmod(i, columns)
        left, upper = GAP + column * (wide + GAP), top + row * (top + PANEL_HEIGHT)
        panel = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
        middle_of_row = upper + (PANEL_HEIGHT - size[1]) // 2
        canvas.paste(panel, (left + (wide - size[0]) // 2, middle_of_row))
        for j, line in enumerate(lines):
            middle = (left + wide / 2, upper - 4 - line_height * (len(lines) - 1 - j))
            draw.text(middle, line, fill="black", font=font, anchor="md")
    _draw_bar(canvas, (total - GAP - bar_text - BAR_WIDTH, top), colour_map)
    return canvas


def _draw_bar(canvas: Image.Image, corner: tuple[int, int], colour_map: str) -> None:
    (left, top), draw = corner, ImageDraw.Draw(canvas)
    colours = np.repeat(_colours(colour_map)[::-1, None], BAR_WIDTH, axis=1)
    canvas.paste(Image.fromarray(colours).resize((BAR_WIDTH, PANEL_HEIGHT)), corner)
    for value, anchor in ((0, "ld"), (0.5, "lm"), (1, "la")):
        y = top + (1 - value) * (PANEL_HEIGHT - 1)
        text = (left + BAR_WIDTH + 5, y)
        draw.text(text, f"{value:g}", fill="black", font=_font(12), anchor=anchor)


def framed(image: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """An image ``[H, W, 3]`` uint8, darkened outside a box (left, top, right, bottom)."""
    left, top, right, bottom = box
    dark = (0.4 * image).astype(np.uint8)
    dark[top:bottom, left:right] = image[top:bottom, left:right]
    return dark


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont, lines: int = 2) -> list[str]:
    """A title in at most so many lines; what does not fit is cut off."""
    rows = [""]
    for word in text.split():
        longer = f"{rows[-1]} {word}".strip()
        if rows[-1] and font.getlength(longer) > width:
            rows.append(word)
        else:
            rows[-1] = longer
    rows = rows[: lines - 1] + [" ".join(rows[lines - 1 :])] if len(rows) > lines else rows
    return [_shortened(row, width, font) for row in rows]


def _shortened(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


@functools.cache
def _font(size: int = TEXT_SIZE) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(FONT, size)


def to_png(image: np.ndarray | Image.Image) -> bytes:
    """A uint8 image ``[H, W, 3 or 4]``, or a picture, as a PNG file."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=3)
    return buffer.getvalue()


def save_image(image: np.ndarray | Image.Image, path: str | Path) -> None:
    """Writes a uint8 image ``[H, W, 3 or 4]``, or a picture, as PNG."""
    write_atomically(path, to_png(image))

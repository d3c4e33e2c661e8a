"""The explanation of one picture: its maps, and how they are shown and saved."""

import base64
import dataclasses
import html
import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image

from ttame_jax import pictures
from ttame_jax.files import save_arrays

Style = Literal["figure", "overlay", "heatmap", "transparent"]
"""What is drawn: a figure of the picture and an overlay of each map; or, of the first class only,
at the picture's size, its overlay, its heatmap, or a heatmap whose opacity is the map's value."""

MOST_SHOWN = 20
"""Classes in a figure or a line, at most."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    """Explanation maps of a picture for K classes.

    Attributes:
      image: uint8 ``[H, W, 3]``, the picture.
      maps: float32 ``[K, h, w]`` in [0, 1], at the resolution the method works in.
      classes: int32 ``[K]``, the explained classes.
      probabilities: float32 ``[K]``, the classifier's confidence in each of them.
      labels: the names of these classes.
      box: left, top, right and bottom, in pixels of the picture, of the part that the classifier
        was shown and that the maps cover.
    """

    image: np.ndarray
    maps: np.ndarray
    classes: np.ndarray
    probabilities: np.ndarray
    labels: tuple[str, ...]
    box: tuple[float, float, float, float]

    @property
    def titles(self) -> list[str]:
        """A line per class: its name and probability."""
        return [f"{label}: {p:.1%}" for label, p in zip(self.labels, self.probabilities)]

    @property
    def summary(self) -> str:
        """The titles in a line. Of more than `MOST_SHOWN` classes it has the most probable ones."""
        titles, chosen = self.titles, self._shown()
        left = len(titles) - len(chosen)
        return ", ".join([*(titles[i] for i in chosen), *([f"{left} more"] if left else [])])

    def _shown(self) -> list[int]:
        """The places of the classes that are shown."""
        if len(self.maps) <= MOST_SHOWN:
            return list(range(len(self.maps)))
        return np.argsort(-self.probabilities, kind="stable")[:MOST_SHOWN].tolist()

    @property
    def is_whole(self) -> bool:
        """Whether the maps cover the whole picture."""
        height, width = self.image.shape[:2]
        return self._pixel_box() == (0, 0, width, height)

    def _pixel_box(self) -> tuple[int, int, int, int]:
        """The box in whole pixels, at least one in each direction."""
        height, width = self.image.shape[:2]
        left, top, right, bottom = map(round, self.box)
        left, top = min(left, width - 1), min(top, height - 1)
        return left, top, max(right, left + 1), max(bottom, top + 1)

    def resized(self) -> np.ndarray:
        """The maps at the picture's size and in their place: float32 ``[K, H, W]``.

        They are NaN outside `box`, which the classifier was not shown.
        """
        left, top, right, bottom = self._pixel_box()
        size = (bottom - top, right - left)
        resized = np.full((len(self.maps), *self.image.shape[:2]), np.nan, np.float32)
        for whole, values in zip(resized, self.maps):
            whole[top:bottom, left:right] = pictures.resize_map(values, size)
        return resized

    def overlay(
        self,
        index: int = 0,
        opacity: float = pictures.OPACITY,
        colour_map: str = pictures.COLOUR_MAP,
    ) -> np.ndarray:
        """The heatmap of a class over the picture: uint8 ``[H, W, 3]``.

        What the classifier was not shown is darkened.

        Args:
          index: the place of the class in `classes`.
          opacity: share of the heatmap, in [0, 1].
          colour_map: name of a colour map in cmap's catalogue, which includes Matplotlib's.

        Raises:
          ValueError: an opacity outside [0, 1], or an unknown colour map.
        """
        box = self._pixel_box()
        left, top, right, bottom = box
        whole = self.image if self.is_whole else pictures.framed(self.image, box)
        part = whole[top:bottom, left:right]
        drawn = pictures.overlay(part, self.maps[index], opacity, colour_map)
        if self.is_whole:
            return drawn
        whole[top:bottom, left:right] = drawn
        return whole

    def figure(
        self, opacity: float = pictures.OPACITY, colour_map: str = pictures.COLOUR_MAP
    ) -> Image.Image:
        """The picture and an overlay for each class, with names, probabilities and a colour bar.

        Of more than `MOST_SHOWN` classes it shows the most probable ones.
        """
        shown = self.image if self.is_whole else pictures.framed(self.image, self._pixel_box())
        first = "image" if self.is_whole else "image (not dark: what is explained)"
        chosen, all_titles = self._shown(), self.titles
        if len(chosen) < len(self.maps):
            first += f", {len(chosen)} of {len(self.maps)} classes"
        overlays = (self.overlay(i, opacity, colour_map) for i in chosen)
        titles = [first, *(all_titles[i] for i in chosen)]
        return pictures.panels(itertools.chain([shown], overlays), titles, colour_map)

    def draw(
        self,
        style: Style = "figure",
        opacity: float = pictures.OPACITY,
        colour_map: str = pictures.COLOUR_MAP,
    ) -> Image.Image:
        """The explanation as a picture, see `Style`.

        Args:
          style: what is drawn.
          opacity: of a figure and an overlay, see `overlay`.
          colour_map: see `overlay`.

        Raises:
          ValueError: an unknown style or colour map, or an opacity outside [0, 1].
        """
        if style not in get_args(Style):
            raise ValueError(f"style must be one of {', '.join(get_args(Style))}, not {style!r}")
        if style == "figure":
            return self.figure(opacity, colour_map)
        if style == "overlay":
            return Image.fromarray(self.overlay(0, opacity, colour_map))
        values = np.nan_to_num(dataclasses.replace(self, maps=self.maps[:1]).resized()[0])
        drawn = pictures.heatmap if style == "heatmap" else pictures.transparent
        return Image.fromarray(drawn(values, values.shape, colour_map))

    def save(self, path: str | Path, **style) -> None:
        """Writes the explanation.

        Args:
          path: a .png file for a picture, or an .npz file for `maps`, `classes`, `probabilities`,
            `labels` and `box`.
          **style: of the picture, as for `draw`.

        Raises:
          ValueError: another kind of file.
        """
        kind = Path(path).suffix.lower()
        if kind == ".png":
            pictures.save_image(self.draw(**style), path)
        elif kind == ".npz":
            names = ("maps", "classes", "probabilities", "labels", "box")
            save_arrays(path, **{name: np.asarray(getattr(self, name)) for name in names})
        else:
            raise ValueError(f"cannot write {path}: explanations are saved as .png or .npz")

    def __repr__(self) -> str:
        (height, width), (rows, columns) = self.image.shape[:2], self.maps.shape[1:]
        return f"Explanation({self.summary}; maps {rows}x{columns}, image {height}x{width})"

    def _repr_html_(self) -> str:
        file = io.BytesIO()
        self.figure().save(file, "JPEG", quality=90)  # a PNG would be six times as large
        data = base64.b64encode(file.getvalue()).decode()
        return f'<img src="data:image/jpeg;base64,{data}" alt="{html.escape(repr(self))}">'


def merge_tiles(
    maps: np.ndarray, probabilities: np.ndarray, boxes: Sequence[tuple[float, ...]], side: int
) -> np.ndarray:
    """Joins the maps of overlapping squares along a line into maps of the whole.

    A tile's map is scaled by the tile's confidence relative to the most confident tile's, since
    each map alone spans [0, 1]. Tiles without any confidence in a class count alike. Overlaps are
    averaged.

    Args:
      maps: ``[T, K, h, w]`` in [0, 1].
      probabilities: ``[T, K]``, the tiles' confidence in the classes.
      boxes: left, top, right and bottom of each tile.
      side: of a tile in the result, in pixels.

    Returns:
      float32 ``[K, side, L]`` for a row of tiles, ``[K, L, side]`` for a column.
    """
    corners = np.array(boxes)[:, :2]
    scale = side / (boxes[0][2] - boxes[0][0])
    offsets = (corners * scale).round().astype(int)[:, ::-1]  # rows, columns
    shape = offsets.max(axis=0) + side
    total, count = np.zeros((maps.shape[1], *shape), np.float32), np.zeros(shape, np.float32)
    best = probabilities.max(axis=0)
    weights = np.where(best > 0, probabilities / np.where(best > 0, best, 1), 1)
    for (top, left), of_classes, weight in zip(offsets, maps, weights):
        part = (slice(top, top + side), slice(left, left + side))
        for k, values in enumerate(of_classes):
            total[k][part] += weight[k] * pictures.resize_map(values, (side, side))
        count[part] += 1
    return total / count

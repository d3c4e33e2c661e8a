import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from ttame_jax.plots import explanation_grid, save_figure

pytestmark = pytest.mark.quick

IMAGES = np.zeros((1, 8, 8, 3), np.uint8)


def grid(title: str = "class 3") -> Figure:
    return explanation_grid(IMAGES, {title: np.ones((1, 2, 2))}, [title])


def test_figures_are_written_as_their_ending_says(tmp_path):
    figure = grid()
    save_figure(figure, tmp_path / "a.png")
    save_figure(figure, tmp_path / "a.svg")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG"
    assert "<svg" in (tmp_path / "a.svg").read_text()


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_the_same_figure_gives_the_same_file(kind, tmp_path):
    for name in ("a", "b"):
        save_figure(grid(), tmp_path / f"{name}.{kind}")
    assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


def test_titles_are_not_read_as_formulas(tmp_path):
    save_figure(grid(r"$100 bill \frac{ $"), tmp_path / "a.svg")

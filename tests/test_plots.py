import numpy as np
import pytest
from PIL import Image

from ttame_jax.plots import explanation_figure, explanation_grid, heatmap, overlay, save_figure

pytestmark = pytest.mark.quick


def test_heatmap_runs_from_blue_to_red_at_the_images_size():
    colours = heatmap(np.array([[0.0, 1.0]]), (8, 16))
    assert colours.shape == (8, 16, 3) and colours.dtype == np.uint8
    low, high = colours[0, 0].astype(int), colours[0, -1].astype(int)
    assert low[2] > low[0] and high[0] > high[2]


def test_overlay_keeps_the_image_visible():
    image = np.zeros((8, 8, 3), np.uint8)
    image[:4] = 255
    over = overlay(image, np.full((2, 2), 0.5)).astype(int)
    assert (over[0, 0] - over[-1, 0] >= 126).all()


def test_figures_are_written_as_their_ending_says(tmp_path):
    figure = explanation_figure(np.zeros((8, 8, 3), np.uint8), [np.eye(2)], ["class 3"])
    save_figure(figure, tmp_path / "a.png")
    save_figure(figure, tmp_path / "a.svg")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG"
    assert "<svg" in (tmp_path / "a.svg").read_text()


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_the_same_figure_gives_the_same_file(kind, tmp_path):
    for name in ("a", "b"):
        figure = explanation_figure(np.zeros((8, 8, 3), np.uint8), [np.eye(2)], ["class 3"])
        save_figure(figure, tmp_path / f"{name}.{kind}")
    assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


def test_titles_are_not_read_as_formulas(tmp_path):
    images = np.zeros((1, 8, 8, 3), np.uint8)
    title = r"$100 bill \frac{ $"
    save_figure(explanation_figure(images[0], [np.eye(2)], [title]), tmp_path / "a.svg")
    save_figure(explanation_grid(images, {title: np.ones((1, 2, 2))}, [title]), tmp_path / "b.png")

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from ttame_jax.plots import (
    Panel,
    explanation_grid,
    inline_svg,
    line_style,
    picture_grid,
    save_figure,
)

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


def test_a_figure_in_a_page_takes_the_colour_of_its_text():
    figure = Figure()
    axes = figure.subplots()
    axes.plot([0, 1], color="black", label="loss")
    axes.legend()
    svg = inline_svg(figure)
    assert svg.startswith("<svg") and "#000000" not in svg and "currentColor" in svg
    assert ">loss</text>" in svg and "#ffffff" not in svg


def boxes(figure: Figure) -> np.ndarray:
    """Left, bottom, right and top of each picture, in inches."""
    whole = figure.get_size_inches()
    return np.array([np.ravel(axes.get_position().get_points() * whole) for axes in figure.axes])


def shape(height: int, width: int) -> np.ndarray:
    return np.zeros((height, width, 3), np.uint8)


def test_pictures_keep_their_proportions_and_equal_gaps():
    names = ["a", "a name that needs more than a single line\n12.3%", "c"]
    columns = [shape(20, 10), shape(20, 40), shape(20, 20)]
    rows = [("", [Panel(one, name) for one, name in zip(columns, names)]) for _ in range(3)]
    left, bottom, right, top = boxes(picture_grid(rows))[:-1].reshape(3, 3, 4).transpose(2, 0, 1)
    np.testing.assert_allclose((right - left) / (top - bottom), [[0.5, 2, 1]] * 3)
    np.testing.assert_allclose(left[:, 1:] - right[:, :-1], left[0, 1] - right[0, 0])
    np.testing.assert_allclose(bottom[:-1] - top[1:], bottom[0, 0] - top[1, 0])


def test_pictures_of_the_same_width_are_as_high_as_their_proportions_say():
    rows = [("", [Panel(shape(30, 20))]), ("", [Panel(shape(10, 20))])]
    left, bottom, right, top = boxes(picture_grid(rows, "width"))[:-1].T
    np.testing.assert_allclose(right - left, right[0] - left[0])
    np.testing.assert_allclose((top - bottom) / (right - left), [1.5, 0.5])


def test_a_picture_is_centred_over_its_columns():
    below = [Panel(shape(8, 8)) for _ in range(4)]
    above = [Panel(shape(8, 8), "cat", span=2), Panel(shape(8, 8), "dog", span=2)]
    places = boxes(picture_grid([("", above), ("vgg16", below)]))
    middles = (places[:, 0] + places[:, 2]) / 2
    np.testing.assert_allclose(middles[:2], [middles[2:4].mean(), middles[4:6].mean()])


def test_the_colour_bar_has_the_colours_of_its_map():
    grids = [picture_grid([("", [Panel(shape(8, 8))])], colour_map=m) for m in ("inferno", "jet")]
    inferno, jet = (grid.axes[-1].get_images()[0].get_array()[[0, -1], 0] for grid in grids)
    np.testing.assert_allclose(inferno, [[252, 255, 164], [0, 0, 4]], atol=1)
    np.testing.assert_allclose(jet, [[128, 0, 0], [0, 0, 128]], atol=1)


def test_all_text_lies_on_the_figure():
    label, title = "tf_efficientnet_lite0\nIntegrated Gradients", "black-and-tan coonhound\n9.1%"
    figure = picture_grid([(label, [Panel(shape(8, 8), f"{title} (true class)")] * 2)])
    FigureCanvasAgg(figure).draw()
    texts = [*figure.texts, *figure.axes[-1].get_yticklabels()]
    width, height = figure.get_size_inches() * figure.dpi
    for text in texts:
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text


def test_lines_of_a_plot_can_be_told_apart():
    assert len({tuple(line_style(i).values()) for i in range(64)}) == 64

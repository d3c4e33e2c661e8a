import numpy as np
import pytest
from PIL import Image

from ttame_jax import explanation as explanation_module
from ttame_jax import pictures
from ttame_jax.explanation import Explanation, merge_tiles

pytestmark = pytest.mark.quick

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
MAPS = np.random.default_rng(1).uniform(size=(2, 4, 4)).astype(np.float32)


def explanation(box=(0, 0, 60, 40)) -> Explanation:
    classes, probabilities = np.array([3, 1]), np.array([0.75, 0.125], np.float32)
    return Explanation(IMAGE, MAPS, classes, probabilities, ("cat", "a <dog>"), box)


def test_it_describes_itself_in_one_line():
    assert repr(explanation()) == ("Explanation(cat: 75.0%, a <dog>: 12.5%; maps 4x4, image 40x60)")


def test_maps_are_resized_to_the_picture():
    resized = explanation().resized()
    assert resized.shape == (2, 40, 60)
    np.testing.assert_array_equal(resized[1], pictures.resize_map(MAPS[1], (40, 60)))


def test_maps_of_a_part_stand_in_their_place():
    resized = explanation((10, 0, 50, 40)).resized()
    assert np.isnan(resized[:, :, :10]).all() and np.isnan(resized[:, :, 50:]).all()
    np.testing.assert_array_equal(resized[0, :, 10:50], pictures.resize_map(MAPS[0], (40, 40)))


def test_what_the_classifier_was_not_shown_is_dark():
    drawn = explanation((10, 0, 50, 40)).overlay()
    np.testing.assert_array_equal(drawn[:, :10], (0.4 * IMAGE[:, :10]).astype(np.uint8))
    np.testing.assert_array_equal(drawn[:, 10:50], pictures.overlay(IMAGE[:, 10:50], MAPS[0]))


def test_drawing_changes_nothing():
    before = IMAGE.copy()
    for one in (explanation(), explanation((10, 0, 50, 40))):
        one.figure()
        one.overlay(1)
    np.testing.assert_array_equal(IMAGE, before)


@pytest.mark.parametrize(
    ("style", "mode"), [("overlay", "RGB"), ("heatmap", "RGB"), ("transparent", "RGBA")]
)
def test_single_pictures_have_the_pictures_size(style, mode, tmp_path):
    explanation((10, 0, 50, 40)).save(tmp_path / "a.png", style=style, colour_map="viridis")
    with Image.open(tmp_path / "a.png") as drawn:
        assert drawn.size == (60, 40) and drawn.mode == mode


def test_arrays_are_saved(tmp_path):
    explanation().save(tmp_path / "a.npz")
    saved = np.load(tmp_path / "a.npz")
    np.testing.assert_array_equal(saved["maps"], MAPS)
    assert saved["labels"].tolist() == ["cat", "a <dog>"] and saved["classes"].tolist() == [3, 1]
    assert saved["box"].tolist() == [0, 0, 60, 40]
    with pytest.raises(ValueError, match="as .png or .npz"):
        explanation().save(tmp_path / "a.jpg")


def test_notebooks_show_it():
    page = explanation()._repr_html_()
    assert page.startswith('<img src="data:image/jpeg;base64,') and "a &lt;dog&gt;" in page


def test_tiles_are_weighted_by_their_confidence_and_averaged_where_they_overlap():
    maps = np.ones((2, 1, 2, 2), np.float32)
    boxes = [(0, 0, 10, 10), (5, 0, 15, 10)]
    (merged,) = merge_tiles(maps, np.array([[0.8], [0.2]]), boxes, side=4)
    assert merged.shape == (4, 6)
    np.testing.assert_allclose(merged[0], [1, 1, 0.625, 0.625, 0.25, 0.25])


def test_a_class_without_confidence_has_finite_maps():
    boxes = [(0, 0, 10, 10), (10, 0, 20, 10)]
    merged = merge_tiles(np.ones((2, 1, 2, 2), np.float32), np.zeros((2, 1)), boxes, side=4)
    np.testing.assert_array_equal(merged, np.ones((1, 4, 8)))


def test_a_column_of_tiles_becomes_a_tall_map():
    maps = np.ones((2, 3, 2, 2), np.float32)
    boxes = [(0, 0, 10, 10), (0, 10, 10, 20)]
    merged = merge_tiles(maps, np.full((2, 3), 0.5), boxes, side=4)
    np.testing.assert_array_equal(merged, np.ones((3, 8, 4)))


def test_a_figure_of_many_classes_shows_the_most_probable_ones_in_rows(monkeypatch):
    count = explanation_module.MOST_SHOWN + 5
    probabilities = np.random.default_rng(2).permutation(count).astype(np.float32) / count
    maps = np.repeat(MAPS[:1], count, axis=0)
    labels = tuple(f"class {i}" for i in range(count))
    many = Explanation(IMAGE, maps, np.arange(count), probabilities, labels, (0, 0, 60, 40))
    drawn = {}

    def panels(shown, titles, colour_map):
        drawn["titles"], drawn["count"] = titles, len(list(shown))

    monkeypatch.setattr(pictures, "panels", panels)
    many.figure()
    likeliest = np.argsort(-probabilities)[: explanation_module.MOST_SHOWN]
    assert drawn["titles"] == ["image, 20 of 25 classes", *(many.titles[i] for i in likeliest)]
    assert drawn["count"] == len(drawn["titles"])
    assert many.summary == ", ".join([*(many.titles[i] for i in likeliest), "5 more"])
    assert repr(many).startswith(f"Explanation({many.summary}; maps")


def test_an_unknown_style_is_refused():
    with pytest.raises(ValueError, match="style must be one of figure, overlay.*, not 'heat'"):
        explanation().draw("heat")


@pytest.mark.parametrize("style", ["figure", "overlay", "heatmap", "transparent"])
@pytest.mark.parametrize("size", [(1, 100), (100, 1), (10, 3000)])
def test_pictures_of_any_shape_can_be_drawn(style, size):
    image = np.zeros((*size, 3), np.uint8)
    (height, width), short = size, min(size)
    left, top = (width - 0.4 * short) / 2, (height - 0.4 * short) / 2
    box = (left, top, left + 0.4 * short, top + 0.4 * short)
    of_part = Explanation(image, MAPS, np.arange(2), np.ones(2), ("a", "b"), box)
    drawn = of_part.draw(style)
    assert drawn.size == size[::-1] if style != "figure" else drawn.width < 20_000


def test_a_single_map_is_resized_if_a_single_one_is_drawn(monkeypatch):
    resized = []
    resize_map = pictures.resize_map
    monkeypatch.setattr(
        pictures, "resize_map", lambda *args: resized.append(1) or resize_map(*args)
    )
    explanation().draw("heatmap")
    assert len(resized) < 3  # for the values, and for the heatmap

import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from PIL import Image

from ttame_jax import masking, pictures

pytestmark = pytest.mark.quick

MAP = np.random.default_rng(0).uniform(size=(3, 5)).astype(np.float32)


def test_maps_are_resized_as_the_metrics_resize_them():
    ours = pictures.resize_map(MAP, (24, 35))
    np.testing.assert_allclose(ours, masking.upsample(jnp.asarray(MAP), (24, 35)), atol=1e-6)


@pytest.mark.parametrize("name", ["inferno", "jet"])
def test_heatmaps_have_the_colours_of_the_colour_map(name):
    colours = pictures.heatmap(np.array([[0.0, 0.5, 1.0]]), (1, 3), name)
    expected = matplotlib.colormaps[name](np.array([0, 128, 255]), bytes=True)[:, :3]
    np.testing.assert_allclose(colours[0].astype(int), expected, atol=1)


def test_overlays_mix_the_image_and_the_heatmap():
    image = np.full((4, 4, 3), 255, np.uint8)
    np.testing.assert_array_equal(pictures.overlay(image, MAP, opacity=0), image)
    whole = pictures.overlay(image, MAP, opacity=1)
    np.testing.assert_array_equal(whole, pictures.heatmap(MAP, (4, 4)))
    half = pictures.overlay(image, MAP, opacity=0.5)
    np.testing.assert_allclose(half, (image.astype(float) + whole) / 2, atol=1)


def test_transparent_heatmaps_are_as_opaque_as_the_map_is_high():
    drawn = pictures.transparent(np.array([[0.0, 1.0]]), (1, 2))
    assert drawn.shape == (1, 2, 4) and drawn[0, :, 3].tolist() == [0, 255]


def test_wrong_styles_are_refused():
    image = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match=r"opacity must lie in \[0, 1\], not 2"):
        pictures.overlay(image, MAP, opacity=2)
    with pytest.raises(ValueError, match="no colour map 'rainbows'"):
        pictures.overlay(image, MAP, colour_map="rainbows")


@pytest.mark.parametrize("shape", [(30, 20), (20, 200), (300, 20)])
def test_panels_stand_side_by_side_at_their_aspect(shape):
    white, black = np.full((*shape, 3), 255, np.uint8), np.zeros((*shape, 3), np.uint8)
    drawn = np.asarray(pictures.panels([black, white, black], ["a", "b", "c"]))
    row = drawn[-pictures.GAP - pictures.PANEL_HEIGHT // 2]
    dark = (row.max(axis=-1) == 0).nonzero()[0]
    width = round(pictures.PANEL_HEIGHT * shape[1] / shape[0])
    assert len(dark) >= 2 * width  # the colour bar may add to them


def test_long_and_foreign_titles_fit():
    image = np.zeros((10, 10, 3), np.uint8)
    names = ["a very long name of a class that has many words: 12.0 %", "x" * 200, "Ελέφαντας é"]
    drawn = pictures.panels([image] * 3, names)
    assert drawn.width < 4 * pictures.PANEL_HEIGHT


def test_the_same_image_gives_the_same_file(tmp_path):
    for name in ("a", "b"):
        pictures.save_image(np.zeros((8, 8, 3), np.uint8), tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG" and picture.size == (8, 8)

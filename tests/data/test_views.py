import numpy as np
import pytest
from PIL import Image

from ttame_jax.data.transforms import centre_crop
from ttame_jax.data.views import crop_view, tiles, whole_view
from ttame_jax.preprocessing import Preprocessing

pytestmark = pytest.mark.quick

PREPROCESSING = Preprocessing(image_size=64, resize_size=96)


def picture(width: int, height: int) -> Image.Image:
    """Red grows to the right and green downwards, from 0 to 255."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))


def middle(pixels: np.ndarray) -> np.ndarray:
    """The fractions of the whole picture at which the middle of a view lies: across, down."""
    height, width = pixels.shape[:2]
    return pixels[height // 2, width // 2, :2] / 255


def test_the_crop_is_that_of_evaluation_and_its_box_is_where_it_lies():
    image = picture(300, 200)
    view = crop_view(image, PREPROCESSING)
    np.testing.assert_array_equal(view.pixels, centre_crop(image, PREPROCESSING))
    left, top, right, bottom = view.box
    assert right - left == pytest.approx(64 * 200 / 96) == bottom - top
    np.testing.assert_allclose(
        middle(view.pixels), [(left + right) / 600, (top + bottom) / 400], atol=0.02
    )


@pytest.mark.parametrize(
    ("size", "shape"), [((200, 200), (96, 96)), ((300, 200), (96, 144)), ((100, 780), (744, 96))]
)
def test_the_whole_picture_is_shown_at_evaluations_scale_with_few_different_sizes(size, shape):
    view = whole_view(picture(*size), PREPROCESSING)
    assert view.pixels.shape == (*shape, 3) and view.box == (0, 0, *size)
    assert view.pixels[0, 0].max() < 10 and view.pixels[-1, -1, :2].min() > 245


@pytest.mark.parametrize(("size", "count"), [((200, 200), 1), ((210, 200), 2), ((200, 900), 5)])
def test_tiles_cover_the_picture(size, count):
    views = tiles(picture(*size), PREPROCESSING)
    assert len(views) == count
    covered = np.zeros(size[::-1], bool)
    for view in views:
        left, top, right, bottom = map(round, view.box)
        assert right - left == bottom - top == min(size)
        assert view.pixels.shape == (64, 64, 3)
        covered[top:bottom, left:right] = True
        np.testing.assert_allclose(
            middle(view.pixels),
            [(left + right) / 2 / size[0], (top + bottom) / 2 / size[1]],
            atol=0.02,
        )
    assert covered.all()


@pytest.mark.parametrize("show", [whole_view, tiles])
def test_very_elongated_pictures_are_not_shown_as_a_whole(show):
    with pytest.raises(ValueError, match="9x1 pixels is too elongated"):
        show(picture(9, 1), PREPROCESSING)

"""Explains images with a method, compiled and with checked arguments."""

import functools
import os
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from PIL import Image

from ttame_jax.backbones import Backbone
from ttame_jax.data.transforms import MAX_PIXELS, open_picture
from ttame_jax.data.views import View, ViewName, check_elongation, crop_view, tiles, whole_view
from ttame_jax.explanation import Explanation, merge_tiles
from ttame_jax.labels import check_names, find_class, label
from ttame_jax.methods import Explanations, Method
from ttame_jax.methods.base import checked_classes, checked_images
from ttame_jax.preprocessing import to_float

Classes = int | str | Sequence[int | str] | np.ndarray | jax.Array | None

Picture = str | os.PathLike | Image.Image | np.ndarray | jax.Array
"""A path, a PIL image of any mode, or an array ``[H, W, 3]`` or ``[H, W]``: uint8, or floats in
[0, 1]."""


@functools.partial(jax.jit, static_argnames=("graph", "likeliest"))
def _explain(graph, state, images, classes, likeliest):
    return nnx.merge(graph, state).explain(images, classes, likeliest)


@functools.partial(jax.jit, static_argnames=("graph",))
def _classify(graph, state, images):
    backbone = nnx.merge(graph, state).backbone
    return jax.nn.softmax(backbone(backbone.preprocessing.standardise(images))[0])


class Explainer:
    """Explains images with a method.

    Args:
      method: T-TAME (`TTAME`) or any other method.
      class_names: one for each class; None is those of the backbone.

    Attributes:
      method: the method.
      backbone: the classifier it explains.
      class_names: the names of its classes, or None.

    Raises:
      ValueError: there is not one name for each class.
    """

    def __init__(self, method: Method, class_names: Sequence[str] | None = None):
        self.method = method
        self._graph, self._state = nnx.split(method)
        count = method.backbone.num_classes
        self.class_names = (
            method.backbone.class_names if class_names is None else check_names(class_names, count)
        )

    @property
    def backbone(self) -> Backbone:
        return self.method.backbone

    def __call__(self, images: jax.typing.ArrayLike, classes: Classes = None) -> Explanations:
        """Explains a batch of images.

        Args:
          images: ``[B, H, W, 3]`` in [0, 1] (not standardised), of the size in
            ``backbone.preprocessing``, or any other that the backbone takes.
          classes: the classes to explain. None is the predicted class, ``"all"`` every class in
            order, ``"top5"`` (or another number) the most probable ones. An int or a name, such as
            ``"zebra"``, is one class for all images, a list ``[K]`` of either the same K classes
            for all images, and an array ``[B, K]`` the classes of each image.

        Raises:
          ValueError: the images are not floats ``[B, H, W, 3]`` in [0, 1], or a class is not one of
            the classifier's.
        """
        images = checked_images(images)
        wanted, likeliest = self.resolve(classes)
        if wanted is not None:
            if wanted.ndim != 2 or len(wanted) not in (1, len(images)):
                raise ValueError(
                    f"classes must be one class, a list of them, or integers [B, K] with "
                    f"B = {len(images)}, not {wanted.dtype} {list(wanted.shape)}"
                )
            shared = len(wanted) == 1  # by all images
            wanted = checked_classes(wanted[0] if shared else wanted, self.backbone)
        return _explain(self._graph, self._state, images, wanted, likeliest)

    def explain_picture(
        self,
        picture: Picture,
        classes: Classes = None,
        view: ViewName | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> Explanation:
        """Explains a picture of any size.

        Args:
          picture: a path, a PIL image, or an array.
          classes: as for calling the explainer with a batch of one image.
          view: what the classifier is shown: ``"whole"``, the whole picture, or ``"crop"``, the
            centre crop of its evaluation. None is ``"whole"`` for a classifier that takes inputs
            of any size, and ``"crop"`` for others. With ``"whole"`` these others are shown square
            tiles, whose probabilities are averaged and whose maps are joined.
          max_pixels: largest number of pixels of the picture.

        Raises:
          FileNotFoundError: the file does not exist.
          UnreadableImage: the file is not an image, or the image is damaged or too large.
          ValueError: an array is not a picture, a class is not one of the classifier's, or the
            picture is too elongated to be shown as a whole.
        """
        opened = open_picture(_as_pil(picture), max_pixels)
        if view not in (None, "whole", "crop"):
            raise ValueError(f"view must be whole or crop, not {view!r}")
        if view == "whole" and not self.backbone.any_size:
            return self._explain_tiles(opened, classes)
        shown = self.view(opened, view)
        explained = jax.device_get(self(_batch([shown]), classes))
        return self._explanation(
            opened, explained.maps[0], explained.classes[0], explained.probabilities[0], shown.box
        )

    def view(self, picture: Image.Image, view: ViewName | None = None) -> View:
        """What the classifier is shown of an RGB picture in one input.

        Args:
          picture: the picture.
          view: as for `explain_picture`. Classifiers that take inputs of one size are shown the
            centre crop.

        Raises:
          ValueError: the picture is too elongated to be shown as a whole.
        """
        whole = self.backbone.any_size and view != "crop"
        return (whole_view if whole else crop_view)(picture, self.backbone.preprocessing)

    def check_view(self, picture: Image.Image, view: ViewName | None = None) -> None:
        """Raises ValueError if a picture is too elongated for a view, see `explain_picture`."""
        if view == "whole" or (view is None and self.backbone.any_size):
            check_elongation(picture)

    def class_ids(self, classes: Sequence[int | str]) -> list[int]:
        """The ids of classes that are given by id, name or WordNet id.

        Raises:
          ValueError: there is no such name or WordNet id; the message lists similar names.
        """
        count = self.backbone.num_classes
        return [
            find_class(one, self.class_names, count) if isinstance(one, str) else one
            for one in classes
        ]

    def resolve(self, classes: Classes) -> tuple[np.ndarray | None, int]:
        """Returns the classes as an array ``[1 or B, K]``, or None and the number of likeliest ones.

        Args:
          classes: as for calling the explainer.

        Raises:
          ValueError: a name is unknown, or there are fewer classes than ``"top5"`` asks for.
        """
        count = self.backbone.num_classes
        if classes is None:
            return None, 1
        if isinstance(classes, str):
            number = classes.removeprefix("top")
            if classes == "all":
                return np.arange(count)[None], 0
            if number != classes and number.isdecimal():
                if not 0 < int(number) <= count:
                    raise ValueError(f"classes {classes!r}: use up to 'top{count}'")
                return None, int(number)
            classes = [classes]
        if isinstance(classes, Sequence):
            classes = self.class_ids(classes)
        wanted = np.asarray(classes)
        return wanted.reshape(1, -1) if wanted.ndim < 2 else wanted, 0

    def _explain_tiles(self, picture: Image.Image, classes: Classes) -> Explanation:
        preprocessing = self.backbone.preprocessing
        views = tiles(picture, preprocessing)
        images = _batch(views)
        wanted, likeliest = self.resolve(classes)
        if wanted is None:
            mean = np.asarray(_classify(self._graph, self._state, images)).mean(axis=0)
            wanted = np.argsort(-mean, kind="stable")[None, :likeliest]
        explained = jax.device_get(self(images, np.repeat(wanted, len(images), axis=0)))
        maps = merge_tiles(
            explained.maps,
            explained.probabilities,
            [view.box for view in views],
            preprocessing.image_size,
        )
        whole = (0, 0, picture.width, picture.height)
        probabilities = explained.probabilities.mean(axis=0)
        return self._explanation(picture, maps, explained.classes[0], probabilities, whole)

    def _explanation(self, picture, maps, classes, probabilities, box) -> Explanation:
        labels = tuple(label(int(i), self.class_names) for i in classes)
        return Explanation(np.asarray(picture), maps, classes, probabilities, labels, box)


def _batch(views: Sequence[View]) -> np.ndarray:
    return to_float(np.stack([view.pixels for view in views]))


def _as_pil(picture: Picture) -> str | os.PathLike | Image.Image:
    if isinstance(picture, str | os.PathLike | Image.Image):
        return picture
    values = np.asarray(picture)
    if values.dtype != np.uint8 and np.issubdtype(values.dtype, np.floating):
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError(
                "an array of floats must lie in [0, 1]; divide values up to 255 by 255"
            )
        values = (255 * values + 0.5).astype(np.uint8)
    shaped = values.ndim == 2 or (values.ndim == 3 and values.shape[-1] == 3)
    if values.dtype != np.uint8 or not shaped or not values.size:
        raise ValueError(
            f"a picture must be uint8, or floats in [0, 1], [H, W, 3] or [H, W], not "
            f"{values.dtype} {list(values.shape)}"
        )
    return Image.fromarray(values)

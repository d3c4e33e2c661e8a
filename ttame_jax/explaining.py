"""Explanation maps of pictures in one call."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ttame_jax.backbones import Backbone
from ttame_jax.config import preset
from ttame_jax.data.transforms import MAX_PIXELS
from ttame_jax.data.views import ViewName
from ttame_jax.explainer import Classes, Explainer, Picture
from ttame_jax.explanation import Explanation
from ttame_jax.methods import load_method
from ttame_jax.runs import load_explainer
from ttame_jax.weights import abstract_backbone, load_backbone

METHOD = "gradcam"
"""The method that explains a backbone without a run, unless another is given."""


def explain(
    images: Picture | list[Picture] | tuple[Picture, ...],
    run: str | Path | None = None,
    backbone: str | Backbone | None = None,
    weights: str | Path | None = None,
    method: str | None = None,
    classes: Classes = None,
    *,
    view: ViewName | None = None,
    class_names: Sequence[str] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Explanation | list[Explanation]:
    """Explains pictures with a trained run, or with a method that needs no training.

    Everything is loaded anew at each call. For many calls, load an `Explainer` once (see
    `load_explainer` and `load_method`) and call its `explain_picture`.

    Args:
      images: a path, a PIL image, or an array (``[H, W, 3]`` or ``[H, W]``: uint8, or floats in
        [0, 1]) of any size; or several of them, as a list or an array ``[N, H, W, 3]``.
      run: the folder of a run.
      backbone: without a run, a classifier or its name (see `load_backbone`).
      weights: of a backbone given by name, see `load_backbone`; None is those it would be trained
        with. Of a run, those of its backbone if they have moved.
      method: one of `list_methods()`. None is the run's own, or Grad-CAM without a run.
      classes: None is the predicted class, ``"top5"`` (or another number) the most probable ones,
        ``"all"`` every class; an id, a name such as ``"zebra"``, or a list of either.
      view: what the classifier is shown, ``"whole"`` or ``"crop"``, see
        `Explainer.explain_picture`.
      class_names: one for each class; None is those of the run or of the backbone.
      max_pixels: largest number of pixels of a picture.

    Returns:
      An explanation, or a list of them if several images are given.

    Raises:
      FileNotFoundError: the run, the weights or an image do not exist.
      UnreadableImage: a file is not an image, or the image is damaged or too large.
      ValueError: neither or both of run and backbone are given, or an argument is wrong; the
        message says which.
    """
    explainer = open_explainer(run, backbone, weights, method, class_names=class_names)

    def of_one(image: Picture) -> Explanation:
        return explainer.explain_picture(image, classes, view, max_pixels)

    if isinstance(images, list | tuple):
        return [of_one(image) for image in images]
    if isinstance(images, np.ndarray | jax.Array) and images.ndim == 4:
        return [of_one(image) for image in images]
    return of_one(images)


def open_explainer(
    run: str | Path | None = None,
    backbone: str | Backbone | None = None,
    weights: str | Path | None = None,
    method: str | None = None,
    *,
    backbone_config: Mapping[str, int | str] | None = None,
    method_config: Mapping[str, float | str] | None = None,
    class_names: Sequence[str] | None = None,
) -> Explainer:
    """Loads the explainer of a run, or of a backbone. Arguments and errors are those of `explain`.

    Args:
      run: see `explain`.
      backbone: see `explain`.
      weights: see `explain`.
      method: see `explain`.
      backbone_config: options of a backbone given by name, as for `load_backbone`.
      method_config: options of the method, as for `load_method`.
      class_names: see `explain`.
    """
    if run is not None and backbone is not None:
        raise ValueError("a run has its own backbone: give either a run or a backbone")
    options: dict[str, Any] = dict(method_config or {})
    if backbone_config and not isinstance(backbone, str):
        raise ValueError(
            "options of a backbone (--backbone-config) need its name (--backbone): a run or a loaded "
            "backbone has its own"
        )
    if run is not None:
        moved = None if weights is None else str(weights)
        return load_explainer(run, moved, method, options, class_names)
    if backbone is None:
        raise ValueError("give a run, or a backbone to explain without training")
    if isinstance(backbone, Backbone) and weights is not None:
        raise ValueError("a loaded backbone has its own weights: give its name, or no weights")
    if isinstance(backbone, str):
        chosen = preset(backbone).weights if weights is None else weights
        settings: dict[str, Any] = dict(backbone_config or {})
        if chosen is not None and not Path(chosen).is_file():  # refused before a download
            load_method(method or METHOD, abstract_backbone(backbone, **settings), **options)
        backbone = load_backbone(backbone, chosen, **settings)
    return Explainer(load_method(method or METHOD, backbone, **options), class_names)

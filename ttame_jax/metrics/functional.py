"""The metrics as functions of arrays, for any classifier and any maps::

    from ttame_jax.metrics import functional

    functional.average_drop(predict, images, maps)  # {"100": 12.3, "50": 20.1, "15": 51.0}

`predict` is any function of images `[B, H, W, 3]` in [0, 1] that returns probabilities
`[B, num_classes]`: of JAX arrays, or one that needs NumPy arrays, as other frameworks do.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ttame_jax.masking import upsample
from ttame_jax.metrics.base import Rows, Sample, load_metrics, measure_sample, pixels_inside
from ttame_jax.metrics.confidence import confidence
from ttame_jax.metrics.evaluation import summarise
from ttame_jax.preprocessing import IMAGENET, Masking, Preprocessing

Predict = Callable[[Any], Any]


def measure(
    predict: Predict,
    images: jax.typing.ArrayLike,
    maps: jax.typing.ArrayLike,
    metrics: Sequence[str] = ("ad", "ic"),
    *,
    classes: jax.typing.ArrayLike | None = None,
    inside: jax.typing.ArrayLike | None = None,
    boxes: jax.typing.ArrayLike | None = None,
    preprocessing: Preprocessing = IMAGENET,
    masking: Masking = "pixel",
    batch_size: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """Computes metrics of explanation maps.

    Args:
      predict: images `[B, H, W, 3]` in [0, 1] to probabilities `[B, num_classes]`.
      images: `[N, H, W, 3]` in [0, 1].
      maps: `[N, h, w]` in [0, 1]. They are upsampled to the images.
      metrics: names of the metrics, see `list_metrics`.
      classes: int `[N]`, the explained classes. None is the predicted ones.
      inside: bool `[N, H, W]`, the pixels of the object, which the pointing games need. None is
        those in the boxes.
      boxes: `[N, M, 4]`, the ymin, xmin, ymax and xmax of each image's boxes as fractions of the
        image; NaN for an image with fewer. MaxBoxAcc needs them.
      preprocessing: its mean and standard deviation give the colour of removed pixels and the scale
        of ROAD's noise. Use the classifier's own.
      masking: how a map masks an image for AD and IC.
      batch_size: images that are measured at a time.
      seed: of ROAD's noise.

    Returns:
      The means over the images in %, as `summarise` returns them: `{"AD": {"100": ...}, ...}`.

    Raises:
      ValueError: an argument has the wrong shape, type or range, a metric does not exist, or
        needs `inside` or `boxes`, which are missing.
    """
    arrays = _checked(images, maps, classes, inside, boxes)
    loaded = load_metrics(metrics)
    for metric in loaded:
        if metric.needs and metric.needs not in arrays:
            raise ValueError(f"the metric {metric.name!r} needs {metric.needs} of the objects")
    of_standardised, num_classes = _of_standardised(predict, arrays["images"][:1], preprocessing)
    explained = arrays.get("classes", np.zeros(1, int))
    if explained.min() < 0 or explained.max() >= num_classes:
        raise ValueError(f"classes must lie in 0 to {num_classes - 1}")

    @jax.jit
    def rows_of(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        images = batch["images"]
        probabilities = of_standardised(preprocessing.standardise(images))
        explained = batch.get("classes", probabilities.argmax(axis=-1))
        sample = Sample(
            predict=of_standardised,
            images=images,
            maps=upsample(batch["maps"], images.shape[1:3]),
            classes=explained,
            confidence=confidence(probabilities, explained),
            preprocessing=preprocessing,
            masking=masking,
            index=batch["index"],
            key=jax.random.key(seed),
            boxes=batch.get("boxes"),
            inside=batch.get("inside"),
        )
        return measure_sample(sample, loaded)

    rows = _in_batches(rows_of, arrays, min(batch_size, len(arrays["index"])))
    return summarise(rows, metrics)


def _in_batches(
    rows_of: Callable[[dict[str, Any]], dict[str, jax.Array]],
    arrays: dict[str, np.ndarray],
    batch_size: int,
) -> Rows:
    """The rows of all images. The last batch is filled up with its last image."""
    parts, count = [], len(arrays["index"])
    for start in range(0, count, batch_size):
        index = np.arange(start, start + batch_size)
        batch = {name: values[np.minimum(index, count - 1)] for name, values in arrays.items()}
        rows = jax.device_get(rows_of(batch))
        parts.append({name: values[index < count] for name, values in rows.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def average_drop(
    predict: Predict, images: jax.typing.ArrayLike, maps: jax.typing.ArrayLike, **options: Any
) -> dict[str, float]:
    """Average Drop in % by the percentage of pixels kept, lower is better.

    Arguments, options and errors are those of `measure`. Paper, section IV-B.
    """
    return measure(predict, images, maps, ("ad",), **options)["AD"]


def increase_in_confidence(
    predict: Predict, images: jax.typing.ArrayLike, maps: jax.typing.ArrayLike, **options: Any
) -> dict[str, float]:
    """Increase in Confidence in % by the percentage of pixels kept, higher is better.

    Arguments, options and errors are those of `measure`. Paper, section IV-B.
    """
    return measure(predict, images, maps, ("ic",), **options)["IC"]


def road(
    predict: Predict, images: jax.typing.ArrayLike, maps: jax.typing.ArrayLike, **options: Any
) -> dict[str, dict[str, float]]:
    """ROAD's confidences in % by order (MoRF: lower is better, LeRF: higher) and percentage.

    Arguments, options and errors are those of `measure`. Rong et al., ICML 2022.
    """
    return measure(predict, images, maps, ("road",), **options)["ROAD"]


def insertion(
    predict: Predict, images: jax.typing.ArrayLike, maps: jax.typing.ArrayLike, **options: Any
) -> float:
    """Area under the confidence in % while pixels are inserted, higher is better.

    Arguments, options and errors are those of `measure`. Petsiuk et al., BMVC 2018.
    """
    return measure(predict, images, maps, ("insertion",), **options)["insertion"]["mean"]


def deletion(
    predict: Predict, images: jax.typing.ArrayLike, maps: jax.typing.ArrayLike, **options: Any
) -> float:
    """Area under the confidence in % while pixels are removed, lower is better.

    Arguments, options and errors are those of `measure`. Petsiuk et al., BMVC 2018.
    """
    return measure(predict, images, maps, ("deletion",), **options)["deletion"]["mean"]


def pointing(maps: jax.typing.ArrayLike, inside: jax.typing.ArrayLike) -> float:
    """Share of maps in % whose maximum lies on the object, higher is better.

    Args:
      maps: `[N, h, w]` in [0, 1]. They are upsampled to `inside`.
      inside: bool `[N, H, W]`, the pixels of the object.

    Raises:
      ValueError: as for `measure`.
    """
    return _localisation("pointing", maps, inside)


def energy(maps: jax.typing.ArrayLike, inside: jax.typing.ArrayLike) -> float:
    """Mean share in % of a map's energy on the object, higher is better.

    Arguments and errors are those of `pointing`.
    """
    return _localisation("energy", maps, inside)


def max_box_accuracy(
    maps: jax.typing.ArrayLike, boxes: jax.typing.ArrayLike, size: tuple[int, int]
) -> dict[str, float]:
    """MaxBoxAcc (key "50") and MaxBoxAccV2 (key "V2") in %, higher is better.

    Choe et al., CVPR 2020, and arXiv:2007.04178.

    Args:
      maps: `[N, h, w]` in [0, 1].
      boxes: see `measure`.
      size: height and width of the images, to which maps are upsampled.

    Raises:
      ValueError: as for `measure`.
    """
    images = _blank(len(np.asarray(maps)), *size)
    return measure(_any_class, images, maps, ("maxboxacc",), boxes=boxes)["maxboxacc"]


def _localisation(name: str, maps: jax.typing.ArrayLike, inside: jax.typing.ArrayLike) -> float:
    inside = np.asarray(inside)
    if inside.ndim != 3:
        raise ValueError(f"inside must be [N, H, W], not {list(inside.shape)}")
    images = _blank(*inside.shape)
    return measure(_any_class, images, maps, (name,), inside=inside)[name]["mean"]


def _blank(count: int, height: int, width: int) -> np.ndarray:
    """Images for metrics that do not look at them. They take no memory."""
    return np.broadcast_to(np.float32(0), (count, height, width, 3))


def _any_class(images: jax.Array) -> jax.Array:
    return jnp.ones((len(images), 1))


def _checked(
    images: jax.typing.ArrayLike,
    maps: jax.typing.ArrayLike,
    classes: jax.typing.ArrayLike | None,
    inside: jax.typing.ArrayLike | None,
    boxes: jax.typing.ArrayLike | None,
) -> dict[str, np.ndarray]:
    """The arrays that are given, by name, and the images' indices."""
    images, maps = np.asarray(images), np.asarray(maps)
    if images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        raise ValueError(f"images must be [N, H, W, 3], not {list(images.shape)}")
    count = len(images)
    if maps.ndim != 3 or len(maps) != count:
        raise ValueError(
            f"maps must be [N, h, w] with N = {count}, one per image, not {list(maps.shape)}"
        )
    arrays: dict[str, np.ndarray] = {"index": np.arange(count, dtype=np.int32)}
    for name, values in (("images", images), ("maps", maps)):
        within = values.min() >= 0 and values.max() <= 1 + 1e-6  # False for NaN
        if not np.issubdtype(values.dtype, np.floating) or not within:
            raise ValueError(f"{name} must be floats in [0, 1]")
        arrays[name] = values.astype(np.float32, copy=False)
    if classes is not None:
        given = np.asarray(classes)
        if given.shape != (count,) or given.dtype.kind not in "iu":
            raise ValueError(f"classes must be integers [N] with N = {count}")
        arrays["classes"] = given
    if inside is not None:
        given = np.asarray(inside)
        if given.shape != images.shape[:3] or given.dtype != bool:
            raise ValueError(f"inside must be bool {list(images.shape[:3])}, as the images")
        arrays["inside"] = given
    if boxes is not None:
        given = np.asarray(boxes, np.float32)
        if given.ndim != 3 or given.shape[::2] != (count, 4):
            raise ValueError(f"boxes must be [N, M, 4] with N = {count}")
        height, width = np.moveaxis(
            np.diff(given.reshape(-1, 2, 2).clip(0, 1), axis=1)[:, 0], -1, 0
        )
        if not ((height > 0) & (width > 0)).any():
            raise ValueError("boxes must be ymin, xmin, ymax and xmax as fractions of the image")
        inside = np.asarray(pixels_inside(jnp.asarray(given), images.shape[1:3]))
        arrays = {"inside": inside} | arrays | {"boxes": given}
    return arrays


def _of_standardised(
    predict: Predict, image: np.ndarray, preprocessing: Preprocessing
) -> tuple[Callable[[jax.Array], jax.Array], int]:
    """The function of standardised images, which can be compiled, and its number of classes."""
    traceable = _traceable(predict, image)
    answer = np.asarray(predict(jnp.asarray(image) if traceable else image), np.float32)
    if answer.ndim != 2 or len(answer) != 1:
        raise ValueError(
            f"predict must return probabilities [B, num_classes], not {list(answer.shape)} for one "
            "image"
        )
    if not (answer >= -1e-6).all() or answer.sum() > 1.01:  # bfloat16 rounds
        raise ValueError("predict must return probabilities: apply a softmax to logits")
    mean, std = np.array([preprocessing.mean, preprocessing.std], np.float32)

    def of_standardised(standardised: jax.Array) -> jax.Array:
        images = (standardised * std + mean).astype(jnp.float32)
        if traceable:
            return jnp.asarray(predict(images), jnp.float32)
        shape = jax.ShapeDtypeStruct((len(images), answer.shape[1]), jnp.float32)
        return jax.pure_callback(
            lambda images: np.asarray(predict(np.asarray(images)), np.float32), shape, images
        )

    return of_standardised, answer.shape[1]


def _traceable(predict: Predict, image: np.ndarray) -> bool:
    """Whether JAX can trace a function of images."""
    try:
        jax.eval_shape(predict, jax.ShapeDtypeStruct(image.shape, image.dtype))
    except Exception:  # noqa: BLE001  each framework says in its own way that it needs arrays
        return False
    return True

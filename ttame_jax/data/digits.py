"""The built-in data set `digits`: real handwritten digits on a cluttered colour canvas.

The digits are the 1797 of scikit-learn's `load_digits` (UCI, "Optical Recognition of Handwritten
Digits", test part; 8x8 pixels). Each picture shows one of them, enlarged, with a random colour,
size and position, on a smooth colour background with distracting strokes and arcs. The splits
share no handwritten digit. TFDS generates the data set in seconds, without TensorFlow.
"""

import io
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageDraw, ImageFilter

CANVAS = 64  # height and width of a picture in pixels
DIGIT_SIZES = (36, 48)  # smallest and largest side of an enlarged 8x8 original in pixels
_INK = 0.2  # smallest coverage of a pixel inside the digit's box

# split: (first original, last original + 1, number of pictures), in a shuffled order of originals
_SPLITS = {"train": (0, 1200, 6000), "validation": (1200, 1400, 500), "test": (1400, 1797, 1000)}
_SEED = 0


class Digits(tfds.core.GeneratorBasedBuilder):
    """Handwritten digits on a cluttered colour canvas, with their boxes."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(CANVAS, CANVAS, 3), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                    "box": tfds.features.BBoxFeature(),  # of the digit's ink
                    "original": tfds.features.Scalar(np.int64),  # index into load_digits
                    "id": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://scikit-learn.org/stable/datasets/toy_dataset.html",
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in _SPLITS}

    def _generate_examples(self, split: str):
        originals, labels = _load_originals()
        first, last, count = _SPLITS[split]
        order = np.random.default_rng(_SEED).permutation(len(originals))[first:last]
        for i in range(count):
            original = order[i % len(order)]
            rng = np.random.default_rng([_SEED, first, i])
            picture, box = draw(originals[original], rng)
            yield (
                i,
                {
                    "image": _png(picture),
                    "label": labels[original],
                    "box": tfds.features.BBox(*box),
                    "original": original,
                    "id": f"{split}_{i:05d}.png",
                },
            )


def draw(original: np.ndarray, rng: np.random.Generator) -> tuple[Image.Image, list[float]]:
    """Draws one handwritten digit on a new canvas.

    Args:
      original: the digit's ink, [8, 8] in [0, 1].
      rng: generator for colours, size, position and clutter.

    Returns:
      The RGB picture of `CANVAS` x `CANVAS` pixels, and the box of the digit's ink: ymin, xmin,
      ymax, xmax as fractions of the canvas.
    """
    # Light digits on a dark canvas, with strokes of medium brightness: enough clutter to distract,
    # but not so much that a small classifier takes long to train.
    picture = _background((0, 100), rng)
    _draw_strokes(picture, (60, 150), rng)

    side = int(rng.integers(*DIGIT_SIZES, endpoint=True))
    ink = _enlarge(original, side)
    rows, columns = (np.flatnonzero((ink > _INK).any(axis)) for axis in (1, 0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = ink.shape
    top = int(rng.integers(1, CANVAS - height))
    left = int(rng.integers(1, CANVAS - width))
    coverage = Image.fromarray((255 * ink).astype(np.uint8))
    picture.paste(_colour((170, 255), rng), (left, top, left + width, top + height), coverage)
    box = [edge / CANVAS for edge in (top, left, top + height, left + width)]
    return picture, box


def _load_originals() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the data set digits needs scikit-learn; run: pip install 'ttame-jax[demo]'"
        ) from error
    digits: Any = load_digits()
    return digits.images / 16, digits.target


def _enlarge(original: np.ndarray, side: int) -> np.ndarray:
    """Enlarges ink smoothly and sharpens its edges: [8, 8] -> [side, side] in [0, 1]."""
    smooth = Image.fromarray(original.astype(np.float32)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    return np.clip((np.asarray(smooth) - 0.15) / 0.45, 0, 1)


def _background(levels: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    coarse = rng.integers(*levels, (5, 5, 3), endpoint=True, dtype=np.uint8)
    return Image.fromarray(coarse).resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)


def _draw_strokes(picture: Image.Image, levels: tuple[int, int], rng: np.random.Generator):
    pen = ImageDraw.Draw(picture)
    for _ in range(rng.integers(4, 8)):
        x, y = rng.uniform(0, CANVAS, 2)
        colour, width = _colour(levels, rng), int(rng.integers(1, 4))
        if rng.random() < 0.5:
            dx, dy = rng.uniform(-24, 24, 2)
            pen.line((x, y, x + dx, y + dy), colour, width)
        else:
            radius, start = rng.uniform(6, 20), rng.uniform(0, 360)
            frame = (x - radius, y - radius, x + radius, y + radius)
            pen.arc(frame, start, start + rng.uniform(60, 150), colour, width)
    picture.paste(picture.filter(ImageFilter.GaussianBlur(0.5)))


def _colour(levels: tuple[int, int], rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(int(level) for level in rng.integers(*levels, 3, endpoint=True))


def _png(picture: Image.Image) -> io.BytesIO:
    """Encodes a picture; TFDS's own encoder needs TensorFlow."""
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    file.seek(0)
    return file

"""Small pictures, whole and damaged."""

import io

import numpy as np
from PIL import Image

from ttame_jax.data import Source


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encode(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


class Pictures(Source):
    """A source in memory; `damaged` images are JPEGs cut in half."""

    fingerprint = "pictures in memory"

    def __init__(self, size: int, damaged: tuple[int, ...] = ()):
        self._encoded = [encode(noise(14, 11, seed), "JPEG") for seed in range(size)]
        for index in damaged:
            self._encoded[index] = self._encoded[index][: len(self._encoded[index]) // 2]

    def __len__(self):
        return len(self._encoded)

    def __getitem__(self, index):
        return {"image": self._encoded[index], "label": index % 10}

    def name(self, index):
        return f"{index:03}.jpg"

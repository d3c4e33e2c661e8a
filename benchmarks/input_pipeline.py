"""Images per second and core of reading, decoding, resizing and batching, as JSON.

    python benchmarks/input_pipeline.py
    python benchmarks/input_pipeline.py --dataset imagenet2012 --data-dir DIR --workers 8

Stages are timed separately on one core in process time, which other load hardly affects. `loader`
is the whole pipeline over the workers in wall time. Without a data set, the images are crops of
scikit-learn's photographs with ImageNet's typical size, 500x375.
"""

import tempfile
import time
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import tyro
from common import Setting, cpu_cores, main, median_seconds
from PIL import Image, ImageOps

from ttame_jax.data import Source, load_source
from ttame_jax.data.loader import train_batches
from ttame_jax.data.transforms import DRAFT_MARGIN, decode, evaluation_image, random_crop

SIZE = (500, 375)
QUALITY = 97  # gives these photographs the file size of ImageNet's, 110,000 bytes


@dataclass(frozen=True)
class Options(Setting):
    dataset: str | None = None
    """A TFDS data set or folder:DIR; None makes images."""
    data_dir: str | None = None
    """Folder of the TFDS data sets."""
    split: str = "train"
    """Of the data set."""
    limit: int = 64
    """Number of different images."""
    workers: int = 0
    """Worker processes of the loader; 0 uses threads."""


def run(options: Options) -> dict:
    if options.dataset:
        return timed(load_source(options.dataset, options.split, options.data_dir), options)
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), options.limit)
        return timed(load_source(f"folder:{folder}", options.split), options)


def timed(source: Source, options: Options) -> dict:
    # Imported here because the loader's workers import this file.
    import jax
    from ours import device, select_device

    from ttame_jax import load_backbone

    select_device(options)
    preprocessing = load_backbone(options.backbone).preprocessing
    indices = range(min(options.limit, len(source)))
    encoded = [source[i]["image"] for i in indices]
    shortest = DRAFT_MARGIN * preprocessing.resize_size
    decoded = [decode(data, shortest) for data in encoded]
    rng = np.random.default_rng(0)
    batch = [random_crop(image, preprocessing, rng) for image in islice(cycle(decoded), 32)]
    stacked = np.stack(batch)

    def over(items, function):
        items = cycle(items)
        return lambda count: [function(next(items)) for _ in range(count)]

    seconds = median_seconds(
        {
            "read": over(indices, source.__getitem__),
            "decode": over(encoded, lambda data: decode(data, shortest)),
            "resize_and_crop": over(decoded, lambda image: random_crop(image, preprocessing, rng)),
            "evaluation": over(encoded, lambda data: evaluation_image(data, preprocessing)),
            "batch": over([batch], np.stack),
            "device_put": over([stacked], lambda b: jax.block_until_ready(jax.device_put(b))),
        },
        options.rounds,
        clock=time.process_time,
    )
    for name in ("batch", "device_put"):
        seconds[name] /= len(batch)
    evaluation = seconds.pop("evaluation")
    return {
        **device(),
        "images": len(encoded),
        "mean_bytes": sum(map(len, encoded)) / len(encoded),
        "images_per_second_per_core": 1 / sum(seconds.values()),
        "by_stage": {name: 1 / time for name, time in seconds.items()},
        "evaluation_images_per_second_per_core": 1 / (seconds["read"] + evaluation),
        "loader": loader(source, preprocessing, options),
    }


def loader(source: Source, preprocessing, options: Options) -> dict:
    """Images per second from Grain, over all its processes or threads."""
    batches = train_batches(
        source, preprocessing, options.batch_size, seed=0, workers=options.workers
    )

    def take(count: int):
        for _ in range(count):
            next(batches)

    seconds = median_seconds({"batch": take}, options.rounds)["batch"]
    batches.close()
    rate = options.batch_size / seconds
    return {"workers": options.workers, "cores": cpu_cores(), "images_per_second": rate}


def write_photographs(folder: Path, count: int) -> None:
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    photographs = load_sample_images().images
    for i in range(count):
        photograph = Image.fromarray(photographs[i % len(photographs)])
        left, top = (int(rng.integers(a - b, endpoint=True)) for a, b in zip(photograph.size, SIZE))
        picture = photograph.crop((left, top, left + SIZE[0], top + SIZE[1]))
        if rng.random() < 0.5:
            picture = ImageOps.mirror(picture)
        picture.save(folder / f"{i:04}.jpg", quality=QUALITY)


if __name__ == "__main__":
    main(run, tyro.cli(Options, description=__doc__))

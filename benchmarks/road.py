"""Seconds per image of ROAD's imputation, here and in pytorch-grad-cam, as JSON.

    python benchmarks/road.py --images ILSVRC2012_img_val.tar --limit 8

Both remove the same shares of the same images by the same maps, in both orders, one after the
other in one process; ranking pixels and drawing noise count, the classifier does not.
"""

import io
import json
import os
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).parents[1]))  # also without installing the project

from ttame_jax.convert.pytorch.torch_import import import_torchvision
from ttame_jax.metrics.imputation import noisy_linear_imputation, relative_residual
from ttame_jax.metrics.road import PROTOCOLS, remove_first
from ttame_jax.metrics.selection import pixel_count, relevance_rank
from ttame_jax.preprocessing import Preprocessing, to_float


@dataclass(frozen=True)
class Options:
    images: Path | None = None
    """A folder or tar file of images; two sample photographs of scikit-learn without it."""
    limit: int = 8
    """Number of images."""
    batch_size: int = 8
    """Images imputed at once (here; the package takes one at a time)."""
    image_size: int = 224
    grid: int = 13
    """Side of the random maps before they are enlarged to the image, as a method's maps are."""
    package: bool = True
    """Measure pytorch-grad-cam as well."""


def main(options: Options) -> None:
    images = load_images(options.images, options.limit, options.image_size)
    maps = random_maps(options)
    percentages = PROTOCOLS["paper"].percentages
    ours, package, residual = {}, {}, 0.0
    remover = package_remover() if options.package else None
    slices = [slice(i, i + options.batch_size) for i in range(0, len(images), options.batch_size)]

    def batches(ranks):
        for rows in slices:
            for order in ranks:  # MoRF, LeRF
                yield images[rows], order[rows]

    def rank_all():
        return [np.concatenate([rank(signed[rows]) for rows in slices]) for signed in (maps, -maps)]

    for batch in batches(rank_all()):  # compile
        remove(*batch, percentages[0])
    start = time.perf_counter()
    ranks = rank_all()
    ours["ranking"] = (time.perf_counter() - start) / len(images)
    for percentage in percentages:
        start = time.perf_counter()
        for batch in batches(ranks):
            remove(*batch, percentage)
        ours[str(percentage)] = (time.perf_counter() - start) / len(images)
        if remover:
            start = time.perf_counter()
            for image, relevance in zip(images, maps):
                remover(image, relevance, percentage)
            package[str(percentage)] = (time.perf_counter() - start) / len(images)
        residual = max(residual, *(worst_residual(*batch, percentage) for batch in batches(ranks)))

    result: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "images": len(images),
        "image_size": options.image_size,
        "batch_size": options.batch_size,
        "seconds_per_image": {**ours, "total": sum(ours.values())},
        "max_relative_residual": residual,
    }
    if package:
        result["package_seconds_per_image"] = {**package, "total": sum(package.values())}
        result["ratio"] = sum(package.values()) / sum(ours.values())
    print(json.dumps(result, indent=2))


rank = jax.jit(relevance_rank)
remove_compiled = jax.jit(remove_first)
impute = jax.jit(noisy_linear_imputation)


def remove(images: np.ndarray, ranks: np.ndarray, percentage: int) -> None:
    """What `road` does for one percentage of one order."""
    keys = jax.random.split(jax.random.key(0), len(images))
    count = pixel_count(percentage, ranks[0].size)
    remove_compiled(images, ranks, percentage, count, keys).block_until_ready()


def worst_residual(images: np.ndarray, ranks: np.ndarray, percentage: int) -> float:
    removed = jnp.asarray(ranks < pixel_count(percentage, ranks[0].size))
    return float(relative_residual(impute(images, removed), removed).max())


def package_remover():
    import_torchvision()
    import torch
    from pytorch_grad_cam.metrics.perturbation_confidence import (
        RemoveLeastRelevantFirst,
        RemoveMostRelevantFirst,
    )
    from pytorch_grad_cam.metrics.road import NoisyLinearImputer

    def run(image, relevance, percentage):
        image, relevance = (
            torch.from_numpy(image.transpose(2, 0, 1).copy()),
            torch.from_numpy(relevance),
        )
        for order in (RemoveMostRelevantFirst, RemoveLeastRelevantFirst):
            order(100 - percentage, NoisyLinearImputer())(image, relevance)

    return run


def random_maps(options: Options) -> np.ndarray:
    """Smooth maps in [0, 1], [N, S, S]: coarse random values, enlarged bilinearly."""
    rng = np.random.default_rng(0)
    size = (options.image_size, options.image_size)
    coarse = rng.random((options.limit, options.grid, options.grid), np.float32)
    grown = (Image.fromarray(values).resize(size, Image.Resampling.BILINEAR) for values in coarse)
    return np.stack([np.asarray(image) for image in grown])


def load_images(path: Path | None, count: int, side: int) -> np.ndarray:
    """Standardised images [N, S, S, 3]; originals too few are repeated, turned."""
    pictures = []
    for picture in originals(path):
        fitted = ImageOps.fit(picture.convert("RGB"), (side, side))
        pictures.append(to_float(np.asarray(fitted)))
        if len(pictures) == count:
            break
    if not pictures:
        raise SystemExit(f"no images in {path}")
    for i in range(count - len(pictures)):
        pictures.append(np.rot90(pictures[i]))
    return np.asarray(Preprocessing().standardise(jnp.stack(pictures)))


def originals(path: Path | None) -> Iterator[Image.Image]:
    if path is None:
        from sklearn.datasets import load_sample_images

        yield from map(Image.fromarray, load_sample_images().images)
    elif path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.suffix.lower() in {".jpg", ".jpeg", ".png"}:
                yield Image.open(file)
    else:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.isfile() and (content := tar.extractfile(member)):
                    yield Image.open(io.BytesIO(content.read()))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

"""Trains a ViT on a few thousand labelled photographs, with a CNN as its teacher; accuracy as JSON.

    python benchmarks/distil_vit.py --dataset folder:IMAGENETTE --output vit.safetensors

The patch tokens of the last three blocks also predict the teacher's feature maps (Li et al., ECCV
2022). These are computed once per photograph and cropped together with it, like ReLabel's label maps
(Yun et al., CVPR 2021). Photographs exchange rectangles of patches (CutMix, Yun et al., ICCV 2019).
Half of the patches are dropped (PatchDropout, Liu et al., WACV 2023) until the last part of the
training.
"""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

import common  # before JAX
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from ttame_jax.backbones import Backbone
from ttame_jax.backbones.vit import ViT
from ttame_jax.data import load_source
from ttame_jax.files import check_output_file, read_safetensors
from ttame_jax.losses import cross_entropy
from ttame_jax.preprocessing import Preprocessing, to_float
from ttame_jax.training.classifier import accuracy, decode, fit
from ttame_jax.weights import abstract_backbone, load_backbone, save_backbone
from ttame_jax.weights.transfer import fill, to_flax, to_torch

SQUARES = (0.75, 4 / 3)  # range of the aspect ratio of crops and of exchanged rectangles
COLOUR = 0.2  # largest relative change of a colour channel
KEPT = 0.5  # share of the patches
DROPPING = 0.85  # share of the steps in which patches are dropped


@dataclass(frozen=True)
class Options:
    """The photographs, the teacher and the ViT."""

    output: Path
    """File for the weights, which load_backbone and --weights read."""
    dataset: str = "imagenette"
    """A TFDS data set or folder:DIR."""
    split: str = "train"
    """Split to train on."""
    test_split: str = "validation"
    """Split of which the accuracy is printed."""
    data_dir: str | None = None
    """Folder of the prepared TFDS data sets."""
    teacher: str = "tf_efficientnet_lite0"
    """A CNN by name."""
    teacher_weights: str = "timm"
    """Its weights."""
    teacher_size: int = 256
    """Height and width of the photographs that the teacher sees, which are kept in memory."""
    image_size: int = 128
    """Height and width of the ViT's images."""
    patch_size: int = 16
    """Height and width of its patches."""
    test_size: int | None = None
    """Height and width of the ViT's images after the training. By default they stay the same."""
    crop_pct: float = 1.0
    """Side of the centre crop that it then sees, as a fraction of a photograph's shortest side."""
    start: Path | None = None
    """Weights of the same ViT for images of this or a smaller size. By default it starts from random
    parameters."""
    width: int = 128
    """Width of its tokens."""
    depth: int = 6
    """Number of its blocks."""
    num_heads: int = 4
    """Attention heads per block."""
    epochs: int = 100
    """Passes over the photographs."""
    batch_size: int = 64
    """Images per step."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    smallest_crop: float = 0.4
    """Smallest crop, as a share of the photograph's area."""
    mixed: float = 0.25
    """Share of the steps with CutMix."""
    seed: int = 0
    """Seed of the initial parameters, the order of the photographs and their augmentation."""

    def __post_init__(self):
        for name in ("crop_pct", "smallest_crop"):
            if not 0 < (value := getattr(self, name)) <= 1:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} must be above 0 and at most 1, not {value}")
        if not 0 <= self.mixed <= 1:
            raise ValueError(f"--mixed must be between 0 and 1, not {self.mixed}")


class Student(nnx.Module):
    """A ViT, and regressions of the teacher's features on the tokens of its last three blocks."""

    def __init__(self, backbone: ViT, channels: list[int], *, rngs: nnx.Rngs):
        self.backbone = backbone
        width = backbone.architecture.width
        self.regressions = nnx.List([nnx.Linear(width, size, rngs=rngs) for size in channels])

    def __call__(self, images: jax.Array, kept: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images [B, H, W, 3], indices of patches [n] -> logits [B, K], features [B, n, C]."""
        first = self.backbone.prefix_tokens
        (_, embed), *blocks, (_, head) = self.backbone.named_layers()
        (tokens,) = embed(images)
        state = (jnp.concatenate([tokens[:, :first], tokens[:, first:][:, kept]], axis=1),)
        outputs = {}
        for name, block in blocks:
            state = block(*state)
            outputs[name] = state[0][:, first:]
        read = [outputs[name] for name in self.backbone.feature_layers]
        features = [regress(tokens) for regress, tokens in zip(self.regressions, read)]
        return head(*state)[0], jnp.concatenate(features, axis=-1)


def run(options: Options) -> dict:
    check_output_file(options.output)
    source, test = (
        load_source(options.dataset, split, options.data_dir)
        for split in (options.split, options.test_split)
    )
    if not source.class_names:
        raise ValueError(f"{source} has no labels")
    test_size = options.test_size or options.image_size
    preprocessing = Preprocessing(test_size, int(test_size / options.crop_pct))
    sizes = {name: getattr(options, name) for name in ("patch_size", "width", "depth", "num_heads")}
    abstract_backbone("vit", preprocessing=preprocessing, **sizes)  # checks them
    backbone = load_backbone(
        "vit",
        seed=options.seed,
        num_classes=len(source.class_names),
        class_names=source.class_names,
        image_size=options.image_size,
        **sizes,
    )
    assert isinstance(backbone, ViT)
    if options.start:
        start_from(backbone, options.start)
    size = options.teacher_size
    teacher = load_backbone(options.teacher, options.teacher_weights, image_size=size)
    whole = dataclasses.replace(backbone.preprocessing, image_size=size, resize_size=size)
    images, labels = decode(source, whole)
    features = feature_maps(teacher, images, backbone.side)
    channels = [shape[-1] for shape in teacher.feature_shapes()]
    student = Student(backbone, channels, rngs=nnx.Rngs(options.seed))
    finished = fit(
        student,
        functools.partial(
            distillation_loss, smallest_crop=options.smallest_crop, mixed=options.mixed
        ),
        (images, labels, features),
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
        checkpoint=options.output.with_suffix(".checkpoint"),
    )
    if not finished:
        return {"stopped": "the same command resumes the training"}
    save_backbone(backbone, options.output)
    backbone = load_backbone("vit", options.output, preprocessing=preprocessing)
    save_backbone(backbone, options.output)
    return {"images": len(images), "test_images": len(test), "accuracy": accuracy(backbone, test)}


def start_from(backbone: Backbone, path: Path) -> None:
    """Fills a ViT, except its head, with the weights of one for images of this or a smaller size.

    The file is in timm's layout or one of `save_backbone`. A weight of a patch is shared by the pixels
    that cover the same part of a larger patch, and position embeddings are interpolated.
    """
    own, (tensors, metadata) = to_torch(backbone, "timm"), read_safetensors(path)
    if "config" in metadata:  # saved by save_backbone
        tensors = to_torch(load_backbone("vit", path), "timm")
    kernel = tensors["patch_embed.proj.weight"]
    factor = own["patch_embed.proj.weight"].shape[-1] // kernel.shape[-1]
    kernel = kernel.repeat(factor, axis=2).repeat(factor, axis=3) / factor**2
    head = {name: own[name] for name in ("head.weight", "head.bias")}
    tensors |= {"patch_embed.proj.weight": kernel, **head}
    fill(backbone, to_flax(backbone, tensors, str(path)))


def feature_maps(
    teacher: Backbone, images: np.ndarray, side: int, batch_size: int = 40
) -> np.ndarray:
    """The teacher's feature maps [N, side, side, C], each channel with mean 0 and variance 1."""
    graph, state = nnx.split(teacher)

    @jax.jit
    def resized(state, images):
        teacher = nnx.merge(graph, state)
        maps = teacher(teacher.preprocessing.standardise(to_float(images)))[1]
        maps = [jax.image.resize(x, (len(x), side, side, x.shape[-1]), "linear") for x in maps]
        return jnp.concatenate(maps, axis=-1).astype(jnp.float16)  # half the memory

    starts = range(0, len(images), batch_size)
    maps = np.concatenate([resized(state, images[i : i + batch_size]) for i in starts])
    mean = np.mean(maps, axis=(0, 1, 2), dtype=np.float32)
    std = np.std(maps, axis=(0, 1, 2), dtype=np.float32) + 1e-3
    return np.divide(np.subtract(maps, mean, dtype=np.float16), std, dtype=np.float16)


def distillation_loss(
    student: Student,
    batch: tuple[jax.Array, ...],
    progress: jax.Array,
    key: jax.Array,
    *,
    smallest_crop: float,
    mixed: float,
) -> jax.Array:
    """Cross-entropy of the labels plus the mean squared error of the teacher's features."""
    images, labels, features = batch
    backbone = student.backbone
    patches, side = backbone.architecture.patch_size, backbone.side
    crop_key, mix_key, some_key, drop_key = jax.random.split(key, 4)
    images, features = random_crops(
        crop_key, to_float(images), features, side * patches, side, smallest_crop
    )
    exchanged = random_rectangle(mix_key, side) & jax.random.bernoulli(some_key, mixed)
    features = jnp.where(exchanged[..., None], jnp.roll(features, 1, axis=0), features)
    pixels = exchanged.repeat(patches, axis=0).repeat(patches, axis=1)
    images = jnp.where(pixels[..., None], jnp.roll(images, 1, axis=0), images)
    images = backbone.preprocessing.standardise(images)
    features = features.reshape(len(features), side**2, -1)
    order = jax.random.permutation(drop_key, side**2)

    def of_patches(kept):
        logits, predicted = student(images, kept)
        own, other = (cross_entropy(logits, classes) for classes in (labels, jnp.roll(labels, 1)))
        entropy = own + exchanged.mean() * (other - own)
        return entropy.mean() + jnp.mean((predicted - features[:, kept]) ** 2)

    some = order[: max(1, round(KEPT * side**2))]
    return jax.lax.cond(progress < DROPPING, lambda: of_patches(some), lambda: of_patches(order))


def random_crops(
    key: jax.Array,
    images: jax.Array,
    features: jax.Array,
    size: int,
    side: int,
    smallest: float,
) -> tuple[jax.Array, jax.Array]:
    """Crops, flips and recolours images [B, H, W, 3] -> [B, size, size, 3].

    Feature maps [B, h, w, C] are cropped and flipped with them -> [B, side, side, C].
    """
    keys, count = jax.random.split(key, 5), len(images)
    areas = jax.random.uniform(keys[0], (count, 1), minval=smallest)
    ratios = jnp.exp(jax.random.uniform(keys[1], (count, 1), jnp.float32, *np.log(SQUARES)))
    sizes = jnp.minimum(jnp.sqrt(areas * jnp.concatenate([ratios, 1 / ratios], axis=1)), 1)
    starts = jax.random.uniform(keys[2], (count, 2)) * (1 - sizes)
    flips = jax.random.bernoulli(keys[3], shape=(count,))
    gains = jax.random.uniform(keys[4], (count, 1, 1, 3), jnp.float32, 1 - COLOUR, 1 + COLOUR)
    crops = jax.vmap(crop, (0, 0, 0, 0, None))
    images = jnp.clip(crops(images, starts, sizes, flips, size) * gains, 0, 1)
    return images, crops(features.astype(jnp.float32), starts, sizes, flips, side)


def crop(
    array: jax.Array, start: jax.Array, size: jax.Array, flip: jax.Array, side: int
) -> jax.Array:
    """Resizes a part of [H, W, C] to [side, side, C], and flips it from left to right if `flip`.

    Args:
      array: an image or a feature map.
      start: the part's upper left corner [2], as fractions of the height and width.
      size: its height and width [2], as fractions.
      flip: a boolean.
      side: height and width of the result.
    """
    extent = jnp.asarray(array.shape[:2], jnp.float32)
    scale = side / (extent * size)
    shape = (side, side, array.shape[2])
    part = jax.image.scale_and_translate(
        array, shape, (0, 1), scale, -start * extent * scale, "linear"
    )
    return jnp.where(flip, part[:, ::-1], part)


def random_rectangle(key: jax.Array, side: int) -> jax.Array:
    """A boolean mask [side, side] of a rectangle of random area and position."""
    keys = jax.random.split(key, 3)
    ratio = jnp.exp(jax.random.uniform(keys[0], (), jnp.float32, *np.log(SQUARES)) / 2)
    length = side * jnp.sqrt(jax.random.uniform(keys[1]))
    lengths = jnp.minimum(jnp.round(length * jnp.stack([ratio, 1 / ratio])), side)
    starts = jnp.floor(jax.random.uniform(keys[2], (2,)) * (side - lengths + 1))
    place = jnp.arange(side)[:, None]
    rows, columns = ((place >= starts) & (place < starts + lengths)).T
    return rows[:, None] & columns


if __name__ == "__main__":
    common.main(run, tyro.cli(Options, description=__doc__))

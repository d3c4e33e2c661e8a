"""Vision Transformer (Dosovitskiy et al., 2021, arXiv:2010.11929) with timm's plain refinements:
register tokens, no class token, LayerScale, CLIP's first LayerNorm."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ttame_jax.compilers import gelu, self_attention
from ttame_jax.files import Tensors
from ttame_jax.preprocessing import DIGITS, Preprocessing

from . import base
from .base import Backbone, State, chain
from .family import AuthorsCode, Call, Family, HuggingFace, Timm, Torchvision
from .layers import LayerNorm, classify
from .tensors import CONV, LINEAR, SAME, Entry, Table, layer_norm, renamed, weights


@dataclass(frozen=True, kw_only=True)
class Architecture(base.Architecture):
    """Sizes, and what timm's models differ in. The defaults are the original's (ViT-S)."""

    patch_size: int = 16
    width: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_width: int | None = None  # None: four times the width
    activation: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu"
    epsilon: float = 1e-6  # of every LayerNorm
    qkv_bias: bool = True
    patch_bias: bool = True
    class_token: bool = True
    registers: int = 0  # number of tokens between the class token and the patches
    embed_prefix: bool = True  # whether class token and registers have position embeddings
    pre_norm: bool = False  # a LayerNorm before the first block
    layer_scale: bool = False  # a learned factor per channel on each residual branch
    pool: Literal["token", "average"] = "token"  # what the head reads: class token or patches
    norm_after_pool: bool = False

    @property
    def hidden_width(self) -> int:
        """Width inside the MLP."""
        return self.mlp_width or 4 * self.width


class Attention(nnx.Module):
    """Multi-head self-attention, [B, N, D] -> [B, N, D]."""

    def __init__(self, width: int, num_heads: int, qkv_bias: bool = True, **options):
        self.qkv = nnx.Linear(width, 3 * width, use_bias=qkv_bias, **options)
        self.proj = nnx.Linear(width, width, **options)
        self.num_heads = num_heads

    def __call__(self, x: jax.Array) -> jax.Array:
        return self_attention(x, self.qkv, self.proj, self.num_heads)


ACTIVATIONS = {
    "gelu": gelu,
    "gelu_tanh": nnx.gelu,  # the approximation by a hyperbolic tangent
    "quick_gelu": lambda x: x * nnx.sigmoid(1.702 * x),
}


class MLP(nnx.Module):
    """Two linear layers with an activation between them, [B, N, D] -> [B, N, D]."""

    def __init__(self, architecture: Architecture, **options):
        inner = architecture.hidden_width
        self.fc1 = nnx.Linear(architecture.width, inner, **options)
        self.fc2 = nnx.Linear(inner, architecture.width, **options)
        self.activation = architecture.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class Block(nnx.Module):
    """Encoder block, [B, N, D] -> [B, N, D], in two steps: the first LayerNorm, and the rest."""

    def __init__(self, architecture: Architecture, **options):
        width, epsilon = architecture.width, architecture.epsilon
        self.norm1 = LayerNorm(width, epsilon=epsilon, **options)
        self.attn = Attention(width, architecture.num_heads, architecture.qkv_bias, **options)
        self.norm2 = LayerNorm(width, epsilon=epsilon, **options)
        self.mlp = MLP(architecture, **options)
        self.scale1, self.scale2 = (
            nnx.Param(jnp.ones(width)) if architecture.layer_scale else None for _ in range(2)
        )

    def normed(self, x: jax.Array) -> State:
        """Tokens -> (the first LayerNorm's output, tokens)."""
        return self.norm1(x), x

    def rest(self, normed: jax.Array, x: jax.Array) -> State:
        """The output of `normed` -> (the block's output,)."""
        x = x + scaled(self.attn(normed), self.scale1)
        return (x + scaled(self.mlp(self.norm2(x)), self.scale2),)


def scaled(x: jax.Array, scale: nnx.Param | None) -> jax.Array:
    """LayerScale: x [..., D] times a block's `scale1` or `scale2`, if it has one."""
    return x if scale is None else x * scale[...].astype(x.dtype)


class ViT(Backbone):
    """Feature maps: the patch tokens of the last three blocks, [B, side, side, width].

    `features="block"` reads the outputs of the blocks, as the paper says; `"norm"` the outputs of
    their first LayerNorm, on which the authors' published checkpoints were trained.

    Raises:
      ValueError: `patch_size` does not divide the image size, or `num_heads` the width.
    """

    masking = "standardised"
    any_size = False
    feature_kinds = ("block", "norm")
    tpu_pixels = 16 * 224 * 224  # 16 is the number of rows of a tile of bfloat16
    architecture: Architecture

    def __init__(self, name: str, architecture: Architecture, *, rngs: nnx.Rngs, **options: Any):
        super().__init__(name, architecture, **options)
        width, patch = architecture.width, architecture.patch_size
        size = self.preprocessing.image_size
        if size % patch or width % architecture.num_heads:
            raise ValueError(
                f"{name} needs an image_size that patch_size divides and a width that num_heads "
                f"divides, got {size} / {patch} and {width} / {architecture.num_heads}"
            )
        last = range(architecture.depth)[-3:]
        suffix = ".norm1" if self.features == "norm" else ""
        self.feature_layers = tuple(f"blocks.{i}{suffix}" for i in last)
        self.target_layer = f"blocks.{last[-1]}.norm1"
        self.side = size // patch
        self.prefix_tokens = architecture.class_token + architecture.registers
        layer_options: dict[str, Any] = {"dtype": self.dtype, "rngs": rngs}
        norm_options: dict[str, Any] = {**layer_options, "epsilon": architecture.epsilon}

        def tokens(count: int) -> nnx.Param:
            normal = nnx.initializers.normal(0.02)
            return nnx.Param(normal(rngs.params(), (1, count, width)))

        self.patch_embed = nnx.LinearGeneral(
            (patch, patch, 3),
            width,
            axis=(-3, -2, -1),
            use_bias=architecture.patch_bias,
            **layer_options,
        )
        self.cls_token = tokens(1) if architecture.class_token else None
        self.reg_token = tokens(architecture.registers) if architecture.registers else None
        self.pos_embed = tokens(self.embedded_prefix + self.side**2)
        # Small ViTs learn several times faster from sinusoidal positions than from noise.
        patches = sincos_positions(self.side, width)
        self.pos_embed[:, self.embedded_prefix :] = jnp.asarray(patches)
        self.pre_norm = LayerNorm(width, **norm_options) if architecture.pre_norm else None
        self.blocks = nnx.List(
            [Block(architecture, **layer_options) for _ in range(architecture.depth)]
        )
        self.norm = LayerNorm(width, **norm_options)
        self.head = nnx.Linear(width, self.num_classes, dtype=jnp.float32, rngs=rngs)

    @property
    def embedded_prefix(self) -> int:
        """Number of tokens before the patches that have a position embedding."""
        return self.prefix_tokens if self.architecture.embed_prefix else 0

    def named_layers(self):
        layers = chain([("embed", self.embed)])
        for i, block in enumerate(self.blocks):
            layers += [(f"blocks.{i}.norm1", block.normed), (f"blocks.{i}", block.rest)]
        return layers + chain([("head", self._classify)])

    def _classify(self, x, classes=None):
        return classify(self.head, self.pooled(x), classes)

    def patches(self, x: jax.Array) -> jax.Array:
        """Images [B, H, W, 3] -> patches [B, N, patch, patch, 3]."""
        batch, side, patch = x.shape[0], self.side, self.architecture.patch_size
        x = x.reshape(batch, side, patch, side, patch, 3).swapaxes(2, 3)
        return x.reshape(batch, side**2, patch, patch, 3)

    def add_positions(self, x: jax.Array) -> jax.Array:
        """Embedded patches [B, N, D] -> tokens [B, prefix + N, D] with position embeddings."""
        extra = [
            jnp.broadcast_to(token[...], (x.shape[0], *token.shape[1:])).astype(self.dtype)
            for token in (self.cls_token, self.reg_token)
            if token is not None
        ]
        positions = self.pos_embed[...].astype(self.dtype)
        if self.architecture.embed_prefix:
            return jnp.concatenate([*extra, x], axis=1) + positions
        return jnp.concatenate([*extra, x + positions], axis=1)

    def embed(self, x: jax.Array) -> jax.Array:
        """Images [B, H, W, 3] -> tokens [B, prefix + N, D]: class token, registers, patches."""
        x = self.add_positions(self._embed_patches(x))
        return x if self.pre_norm is None else self.pre_norm(x)

    def _embed_patches(self, x: jax.Array) -> jax.Array:
        """Images [B, H, W, 3] -> [B, N, D]."""
        # The convolution as a matrix product, whose gradient is many times faster. The columns of a
        # patch and its channels are one axis, which TPUs copy less often than one of three channels.
        batch, side, patch = x.shape[0], self.side, self.architecture.patch_size
        x = x.reshape(batch, side, patch, side, patch * 3)
        kernel = self.patch_embed.kernel[...].astype(x.dtype).reshape(patch, patch * 3, -1)
        y = jnp.einsum("brpcq,pqd->brcd", x, kernel).reshape(batch, side**2, -1)
        bias = self.patch_embed.bias
        return y if bias is None else y + bias[...].astype(x.dtype)

    def pooled(self, x: jax.Array) -> jax.Array:
        """Tokens [B, prefix + N, D] -> the input of the head, [B, D]."""
        if self.architecture.pool == "token":
            return self.norm(x[:, 0])
        patches = x[:, self.prefix_tokens :]
        if self.architecture.norm_after_pool:
            return self.norm(patches.mean(axis=1))
        return self.norm(patches).mean(axis=1)

    def feature_map(self, x: jax.Array) -> jax.Array:
        """[B, prefix + N, D] -> [B, sqrt N, sqrt N, D]: the patch tokens in their place."""
        return x[:, self.prefix_tokens :].reshape(x.shape[0], self.side, self.side, -1)

    def fit_tensor(self, path, tensor):
        if path != "pos_embed":
            return tensor
        return resample_pos_embed(tensor, self.side, self.embedded_prefix)


def sincos_positions(side: int, width: int) -> np.ndarray:
    """Sines and cosines of the rows and columns of a patch grid: [side^2, width]."""
    frequencies = 100.0 ** -np.linspace(0, 1, width // 4, endpoint=False)
    angles = np.arange(side)[:, None] * frequencies
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    grid = np.concatenate([np.repeat(waves, side, axis=0), np.tile(waves, (side, 1))], axis=1)
    return np.pad(grid, ((0, 0), (0, width - grid.shape[1]))).astype(np.float32)


def resample_pos_embed(pos_embed: Any, side: int, prefix: int = 1) -> Any:
    """Position embeddings [1, prefix + n^2, D] -> [1, prefix + side^2, D], for other patch counts.

    Antialiased bicubic interpolation of the patch grid; the embeddings before it are kept, as
    in timm's `resample_abs_pos_embed`. Anything that is not such a square grid stays as it is.
    """
    if pos_embed.ndim != 3 or len(pos_embed) != 1:
        return pos_embed
    count, width = pos_embed.shape[1] - prefix, pos_embed.shape[2]
    old_side = isqrt(max(count, 0))
    if old_side == side or old_side**2 != count or count < 1:
        return pos_embed
    with jax.default_matmul_precision("highest"):
        grid = jnp.asarray(pos_embed[:, prefix:]).reshape(1, old_side, old_side, width)
        grid = jax.image.resize(grid, (1, side, side, width), "cubic", antialias=True)
    return jnp.concatenate([pos_embed[:, :prefix], grid.reshape(1, side**2, width)], axis=1)


def _torchvision_tensors(backbone: ViT) -> Table:
    table = [
        Entry("class_token", "cls_token", SAME),
        Entry("encoder.pos_embedding", "pos_embed", SAME),
        *weights("conv_proj", "patch_embed", CONV),
    ]
    for i in range(backbone.architecture.depth):
        torch, flax = f"encoder.layers.encoder_layer_{i}", f"blocks.{i}"
        table += [
            *layer_norm(f"{torch}.ln_1", f"{flax}.norm1"),
            Entry(f"{torch}.self_attention.in_proj_weight", f"{flax}.attn.qkv.kernel", LINEAR),
            Entry(f"{torch}.self_attention.in_proj_bias", f"{flax}.attn.qkv.bias", SAME),
            *weights(f"{torch}.self_attention.out_proj", f"{flax}.attn.proj", LINEAR),
            *layer_norm(f"{torch}.ln_2", f"{flax}.norm2"),
            *weights(f"{torch}.mlp.0", f"{flax}.mlp.fc1", LINEAR),
            *weights(f"{torch}.mlp.3", f"{flax}.mlp.fc2", LINEAR),
        ]
    return table + layer_norm("encoder.ln", "norm") + weights("heads.head", "head", LINEAR)


def _torchvision_renamed(key: str) -> str:
    """Published files have the names of torchvision's first release: mlp.linear_1, mlp.linear_2."""
    return re.sub(
        r"(encoder_layer_\d+\.mlp)\.linear_([12])\.",
        lambda match: f"{match[1]}.{3 * int(match[2]) - 3}.",
        key,
    )


def _timm_tensors(backbone: ViT) -> Table:
    architecture = backbone.architecture
    table = [
        *[Entry("cls_token", "cls_token", SAME)] * architecture.class_token,
        *[Entry("reg_token", "reg_token", SAME)] * (architecture.registers > 0),
        Entry("pos_embed", "pos_embed", SAME),
        *weights("patch_embed.proj", "patch_embed", CONV, bias=architecture.patch_bias),
    ]
    if architecture.pre_norm:
        table += layer_norm("norm_pre", "pre_norm")
    for i in range(architecture.depth):
        block = f"blocks.{i}"
        for name in ("norm1", "norm2"):
            table += layer_norm(f"{block}.{name}", f"{block}.{name}")
        bias = architecture.qkv_bias
        table += weights(f"{block}.attn.qkv", f"{block}.attn.qkv", LINEAR, bias=bias)
        for name in ("attn.proj", "mlp.fc1", "mlp.fc2"):
            table += weights(f"{block}.{name}", f"{block}.{name}", LINEAR)
        if architecture.layer_scale:
            table += [Entry(f"{block}.ls{k}.gamma", f"{block}.scale{k}", SAME) for k in (1, 2)]
    norm = "fc_norm" if architecture.norm_after_pool else "norm"
    return table + layer_norm(norm, "norm") + weights("head", "head", LINEAR)


def _last_blocks(backbone: ViT, node: str) -> list[str]:
    """A node's name in each of the last three blocks; `node` has {} for the block's number."""
    return [node.format(i) for i in range(backbone.architecture.depth)[-3:]]


ENCODER_LAYER = "encoder.layers.encoder_layer_{}"


def _torchvision_nodes(backbone: ViT) -> list[str]:
    suffix = ".ln_1" if backbone.features == "norm" else ""
    return _last_blocks(backbone, ENCODER_LAYER + suffix)


def _timm_nodes(backbone: ViT) -> list[str]:
    return _last_blocks(backbone, "blocks.{}.norm1" if backbone.features == "norm" else "blocks.{}")


def _authors_nodes(backbone: ViT) -> list[str]:
    # In the traced graph the second sum of a block is its output.
    suffix = ".ln" if backbone.features == "norm" else ".add_1"
    return _last_blocks(backbone, ENCODER_LAYER + suffix)


def _is_original(architecture: Architecture) -> bool:
    """Whether it is the original ViT except for its sizes, which both libraries have."""
    original = Architecture()
    fields = ("activation", "epsilon", "pool", "embed_prefix")
    return all(getattr(architecture, name) == getattr(original, name) for name in fields)


def _sized(model: str, **fields: str) -> Callable[[ViT], Call | None]:
    """Builds a library's model with options that are fields of the architecture."""

    def build(backbone: ViT) -> Call | None:
        if not _is_original(backbone.architecture):
            return None
        return model, {option: getattr(backbone.architecture, f) for option, f in fields.items()}

    return build


# By timm's names.
POOLS = {"token": "token", "avg": "average"}
GELUS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu"}


def _refusals(module):
    if module.global_pool not in POOLS or module.pool_include_prefix:
        yield f"pools its tokens by {module.global_pool!r}"
    if module.pos_embed is None:
        yield "has no position embeddings"
    (size, _), (patch, _) = module.patch_embed.img_size, module.patch_embed.patch_size
    if size % patch:
        yield f"leaves out pixels: patches of {patch} do not divide {size}"


def _read(module) -> dict[str, Any]:
    block = module.blocks[0]
    return {
        "patch_size": module.patch_embed.patch_size[0],
        "width": module.embed_dim,
        "depth": len(module.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_width": block.mlp.fc1.out_features,
        "activation": GELUS[type(block.mlp.act).__name__],
        "epsilon": block.norm1.eps,
        "qkv_bias": block.attn.qkv.bias is not None,
        "patch_bias": module.patch_embed.proj.bias is not None,
        "class_token": module.cls_token is not None,
        "registers": module.num_reg_tokens,
        "embed_prefix": not module.no_embed_class,
        "pre_norm": type(module.norm_pre).__name__ == "LayerNorm",
        "layer_scale": type(block.ls1).__name__ == "LayerScale",
        "pool": POOLS[module.global_pool],
        "norm_after_pool": type(module.fc_norm).__name__ == "LayerNorm",
    }


HUGGINGFACE_NAMES = {
    r"^\w+\.embeddings\.cls_token$": "cls_token",
    r"^deit\.embeddings\.distillation_token$": "reg_token",
    r"^\w+\.embeddings\.position_embeddings$": "pos_embed",
    r"^\w+\.embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
    r"^\w+\.encoder\.layer\.(\d+)\.layernorm_before\.": r"blocks.\1.norm1.",
    r"^\w+\.encoder\.layer\.(\d+)\.layernorm_after\.": r"blocks.\1.norm2.",
    r"^\w+\.encoder\.layer\.(\d+)\.attention\.output\.dense\.": r"blocks.\1.attn.proj.",
    r"^\w+\.encoder\.layer\.(\d+)\.attention\.attention\.": r"blocks.\1.attn.",
    r"^\w+\.encoder\.layer\.(\d+)\.intermediate\.dense\.": r"blocks.\1.mlp.fc1.",
    r"^\w+\.encoder\.layer\.(\d+)\.output\.dense\.": r"blocks.\1.mlp.fc2.",
    r"^(vit|deit)\.layernorm\.": "norm.",
    r"^classifier\.": "head.",
}


def _huggingface_renamed(tensors: Tensors) -> Tensors:
    """Also joins the projections of queries, keys and values."""
    if not any(key.startswith(("vit.", "deit.")) for key in tensors):
        return tensors
    tensors = renamed(tensors, HUGGINGFACE_NAMES)
    joined = {k: v for k, v in tensors.items() if not re.search(r"attn\.(query|key|value)\.", k)}
    for key in tensors:
        names = [key.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if ".attn.query." in key and all(name in tensors for name in names):
            joined[key.replace("query", "qkv")] = np.concatenate([tensors[n] for n in names])
    return joined


def _huggingface_read(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "patch_size": config["patch_size"],
        "width": config["hidden_size"],
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "mlp_width": config["intermediate_size"],
        "epsilon": config["layer_norm_eps"],
        "qkv_bias": config.get("qkv_bias", True),
        "activation": config["hidden_act"],
        # A DeiT always has a distillation token. With one head it acts as a register.
        "registers": int(config["model_type"] == "deit"),
    }


def _huggingface_refusals(config: Mapping[str, Any]) -> Iterator[str]:
    if config["hidden_act"] not in ACTIVATIONS:
        yield f"has the activation {config['hidden_act']}"
    if any("WithTeacher" in name for name in config.get("architectures") or ()):
        yield "has a second head for its distillation token"


FAMILY = Family(
    backbone=ViT,
    architecture=Architecture,
    architectures={
        "vit_ti16": Architecture(width=192, num_heads=3),
        "vit_s16": Architecture(),
        "vit_b16": Architecture(width=768, num_heads=12),
        "vit_b32": Architecture(patch_size=32, width=768, num_heads=12),
        "vit_l16": Architecture(
            width=1024, depth=24, num_heads=16, preprocessing=Preprocessing(resize_size=242)
        ),
        "vit": Architecture(preprocessing=Preprocessing(resize_size=224)),
        "digits_vit": Architecture(
            patch_size=8, width=64, depth=4, num_heads=4, num_classes=10, preprocessing=DIGITS
        ),
    },
    free={"vit": ("patch_size", "width", "depth", "num_heads")},
    torchvision=Torchvision(
        models={"vit_b16": "vit_b_16", "vit_b32": "vit_b_32", "vit_l16": "vit_l_16"},
        tensors=_torchvision_tensors,
        feature_nodes=_torchvision_nodes,
        options=lambda backbone: {"image_size": backbone.preprocessing.image_size},
        build=_sized(
            "VisionTransformer",
            patch_size="patch_size",
            num_layers="depth",
            num_heads="num_heads",
            hidden_dim="width",
            mlp_dim="hidden_width",
        ),
        target_node=lambda backbone: _last_blocks(backbone, ENCODER_LAYER + ".ln_1")[-1],
        renamed=_torchvision_renamed,
    ),
    timm=Timm(
        models={
            "vit_ti16": "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
            "vit_s16": "vit_small_patch16_224.augreg_in21k_ft_in1k",
            "vit_b16": "vit_base_patch16_224.augreg2_in21k_ft_in1k",
            "vit_b32": "vit_base_patch32_224.augreg_in21k_ft_in1k",
            "vit_l16": "vit_large_patch16_224.augreg_in21k_ft_in1k",
        },
        tensors=_timm_tensors,
        feature_nodes=_timm_nodes,
        options=lambda backbone: {"img_size": backbone.preprocessing.image_size},
        build=_sized(
            "vit_small_patch16_224",
            patch_size="patch_size",
            embed_dim="width",
            depth="depth",
            num_heads="num_heads",
        ),
        module="VisionTransformer",
        files=("vision_transformer", "deit"),
        layers=frozenset(
            [
                "PatchEmbed",
                "Block",
                "Attention",
                "Mlp",
                "LayerNorm",
                "LayerScale",
                *GELUS,
                "Dropout",
                "DropPath",
            ]
        ),
        read=_read,
        refusals=_refusals,
        image_size=lambda module: module.patch_embed.img_size[0],
    ),
    huggingface=HuggingFace(
        model_types=("vit", "deit"),
        read=_huggingface_read,
        refusals=_huggingface_refusals,
        renamed=_huggingface_renamed,
    ),
    authors=AuthorsCode(nodes=_authors_nodes, models=("vit_b_16",), prefix="1."),
)

"""The attention mechanism: feature branches and fusion (T-TAME, Fig. 3).

Two identities make it cheap. A 1x1 convolution commutes with bilinear upsampling, since the
weights of every upsampled pixel sum to 1. Fusion therefore runs at each branch's own resolution,
and class maps are upsampled instead of channels. The map of one class needs one column of the
fusion kernel, so only the requested classes are computed.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ttame_jax.masking import min_max_scale, upsample


@dataclasses.dataclass(frozen=True)
class Variant:
    """An architecture of the attention mechanism (Table VI), or L-CAM-Img."""

    skip: bool = True
    batch_norm: bool = True
    activation: Literal["relu", "sigmoid"] = "relu"
    layers: int | None = None  # how many of the last feature maps it reads; None is all
    branches: bool = True  # False: the fusion reads the feature maps directly
    class_wide: bool = False  # branches have one channel per class, not per input channel


VARIANTS = {
    "ttame": Variant(),
    "no_skip": Variant(skip=False),
    "no_skip_reference": Variant(skip=False, class_wide=True),  # as in the authors' code
    "no_skip_no_batch_norm": Variant(skip=False, batch_norm=False),
    "sigmoid": Variant(activation="sigmoid"),
    "two_layers": Variant(layers=2),
    "one_layer": Variant(layers=1),
    "lcam": Variant(layers=1, branches=False),
}
if TYPE_CHECKING:
    VariantName = str
else:
    VariantName = Literal[tuple(VARIANTS)]


# Mean norm of the weights of a class when they start from the classifier's head. Feature maps of
# unit deviation then give class maps that use the range of the sigmoid without saturating it.
_START_NORM = 4.0


def conv1x1(inputs: int, outputs: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Linear:
    """A 1x1 convolution with bias on channels-last inputs, with PyTorch's initialisation."""
    bound = inputs**-0.5
    return nnx.Linear(
        inputs,
        outputs,
        kernel_init=nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
        bias_init=lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound),
        dtype=dtype,
        rngs=rngs,
    )


class BatchNorm(nnx.Module):
    """Batch normalisation over all axes but the last, with PyTorch's running statistics.

    Epsilon is 1e-5. A running average takes a tenth of the new value, which is the unbiased one
    for the variance (Flax's own BatchNorm keeps the biased one). Statistics are computed in
    float32, from the device's part of the batch, or from the whole batch if a mesh axis is named.
    """

    epsilon = 1e-5
    momentum = 0.1

    def __init__(self, channels: int):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.mean = nnx.BatchStat(jnp.zeros(channels))
        self.var = nnx.BatchStat(jnp.ones(channels))

    def __call__(self, x: jax.Array, train: bool, axis_name: str | None = None) -> jax.Array:
        if train:
            values = x.astype(jnp.float32)
            mean = _mean(values, axis_name)
            var = _mean(jnp.square(values - mean), axis_name)
            devices = jax.lax.axis_size(axis_name) if axis_name else 1
            count = devices * x.size // x.shape[-1]
            self._update(self.mean, mean)
            self._update(self.var, var * count / max(count - 1, 1))
        else:
            mean, var = self.mean[...], self.var[...]
        factor = self.scale[...] * jax.lax.rsqrt(var + self.epsilon)
        return x * factor.astype(x.dtype) + (self.bias[...] - mean * factor).astype(x.dtype)

    def _update(self, running: nnx.BatchStat, new: jax.Array) -> None:
        new = jax.lax.stop_gradient(new)
        running[...] = (1 - self.momentum) * running[...] + self.momentum * new


def _mean(values: jax.Array, axis_name: str | None) -> jax.Array:
    """Mean of every channel ``[..., C]``, also over the devices if their axis is named."""
    mean = values.mean(tuple(range(values.ndim - 1)))
    return jax.lax.pmean(mean, axis_name) if axis_name else mean


class FeatureBranch(nnx.Module):
    """Fig. 3(b) without its upsampling: ``ReLU(BN(Conv1x1(L)) + L)``, ``[B, H, W, width]``."""

    def __init__(
        self, channels: int, width: int, settings: Variant, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.settings = settings
        self.conv = conv1x1(channels, width, dtype, rngs)
        self.norm = BatchNorm(width) if settings.batch_norm else None

    def __call__(self, features: jax.Array, train: bool, axis_name: str | None = None) -> jax.Array:
        x = self.conv(features)
        if self.norm is not None:
            x = self.norm(x, train, axis_name)
        if self.settings.skip:
            x = x + features.astype(x.dtype)
        return jax.nn.sigmoid(x) if self.settings.activation == "sigmoid" else jax.nn.relu(x)


class AttentionMechanism(nnx.Module):
    """Computes class maps from feature maps (Fig. 3). The only part of T-TAME that is trained.

    Args:
      channels: number of channels of each feature map of the backbone, earliest first.
      num_classes: number of classes of the backbone.
      variant: a name in ``VARIANTS``; the paper's proposed architecture by default.
      dtype: of the computation; parameters and class maps are float32.
      scale_features: whether each feature map is divided by a number of its own, `feature_scale`,
        which is 1 until it is set.
      sigmoid_maps: whether class maps pass a sigmoid before they are scaled to explanation maps, as some
        loss recipes train them (`ttame_jax.losses.Recipe.scaled`).
      rngs: for the initial parameters.

    Raises:
      ValueError: unknown variant, or one whose weights could not take over the scale.
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        *,
        variant: VariantName = "ttame",
        dtype: jnp.dtype = jnp.float32,
        scale_features: bool = False,
        sigmoid_maps: bool = False,
        rngs: nnx.Rngs,
    ):
        if variant not in VARIANTS:
            raise ValueError(f"unknown variant {variant!r}: use one of {', '.join(VARIANTS)}")
        self.variant = variant
        settings = VARIANTS[variant]
        if scale_features and settings.activation != "relu":
            raise ValueError(
                f"--scale-features cannot be combined with --variant {variant}: only with ReLU can "
                "the scale become part of the weights; choose other variants"
            )
        self.first_layer = len(channels) - (settings.layers or len(channels))
        self.channels = tuple(channels[self.first_layer :])
        self.widths = (num_classes,) * len(self.channels) if settings.class_wide else self.channels
        self.dtype = dtype
        self.sigmoid_maps = sigmoid_maps
        count = len(self.channels)
        self.feature_scale = nnx.BatchStat(jnp.ones(count)) if scale_features else None
        self.branches = nnx.List(
            [
                FeatureBranch(channels, width, settings, dtype, rngs)
                for channels, width in zip(self.channels, self.widths)
            ]
            if settings.branches
            else []
        )
        self.fusion = conv1x1(sum(self.widths), num_classes, dtype, rngs)

    def __call__(
        self,
        features: Sequence[jax.Array],
        classes: jax.Array | None = None,
        *,
        train: bool = False,
        axis_name: str | None = None,
    ) -> jax.Array:
        """Class maps before the activation.

        Args:
          features: ``[B, H_i, W_i, C_i]`` each, as the backbone returns them.
          classes: ``[K]``, the same for every image, or ``[B, K]``; None is all classes in order.
          train: whether to normalise with batch statistics and update the running ones.
          axis_name: the mesh axis over which those statistics are computed; None is each device
            by itself.

        Returns:
          ``[B, K, H_e, W_e]`` float32, with the spatial size of the largest feature map used.
        """
        maps = features[self.first_layer :]
        if self.feature_scale is not None:
            scales = self.feature_scale[...]
            maps = [(m / scale).astype(m.dtype) for m, scale in zip(maps, scales)]
        size = (max(m.shape[1] for m in maps), max(m.shape[2] for m in maps))
        if self.branches:
            maps = [branch(m, train, axis_name) for branch, m in zip(self.branches, maps)]

        # pyrefly: ignore[unsupported-operation]  # the bias, which is optional in Flax
        kernel, bias = self.fusion.kernel[...], self.fusion.bias[...]  # [sum C, Cls], [Cls]
        if classes is not None:
            kernel, bias = kernel[:, classes], bias[classes]
        kernel_axes = "cbk" if kernel.ndim == 3 else "ck"
        total, start = bias[..., None, None], 0
        for m, width in zip(maps, self.widths):
            fused = jnp.einsum(
                f"bhwc,{kernel_axes}->bhwk",
                m.astype(self.dtype),
                kernel[start : start + width].astype(self.dtype),
                preferred_element_type=jnp.float32,
            )
            total = total + upsample(jnp.moveaxis(fused, -1, 1), size)
            start += width
        return total

    def explanation_maps(self, class_maps: jax.Array) -> jax.Array:
        """Scales class maps ``[..., H, W]`` to the explanation maps in [0, 1] that are shown.

        Each is min-max scaled, by default before any sigmoid (paper, section III-D).
        """
        return min_max_scale(jax.nn.sigmoid(class_maps) if self.sigmoid_maps else class_maps)

    def fold_feature_scale(self) -> None:
        """Makes the feature scale part of the weights. The class maps remain the same, up to rounding.

        The convolution of a branch takes the scale s over. With a skip connection the branch is
        divided by s in the fusion instead, and its BatchNorm has s times the scale and bias:
        ReLU(x / s) = ReLU(x) / s.
        """
        if self.feature_scale is None:
            return
        skip, scales = VARIANTS[self.variant].skip, self.feature_scale[...]
        for branch, scale in zip(self.branches, scales):
            branch.conv.kernel[...] /= scale
            if skip:
                branch.norm.scale[...] *= scale
                branch.norm.bias[...] *= scale
        if skip:
            self.fusion.kernel[...] /= jnp.repeat(scales, np.array(self.widths))[:, None]
        self.feature_scale = None

    def start_from_head(self, class_weights: jax.Array) -> None:
        """Initialises the class maps to those of CAM, from the weights of the classifier's head.

        Branches start as ``ReLU(L)`` because the scales of their BatchNorms are zero (as for the
        residual branches of He et al., arXiv:1812.01187). Earlier feature maps start with zero
        weights.

        Args:
          class_weights: ``[C, Cls]`` for the last feature map (``Backbone.class_weights``).

        Raises:
          ValueError: the branches of the variant cannot start as the identity.
        """
        for branch in self.branches:
            settings = branch.settings
            if not settings.skip or not settings.batch_norm or settings.activation != "relu":
                raise ValueError(
                    f"--start head needs skip connections, BatchNorm and ReLU, which the variant "
                    f"{self.variant!r} lacks: use --start random"
                )
            branch.norm.scale[...] = jnp.zeros_like(branch.norm.scale[...])
        norm = jnp.linalg.norm(class_weights, axis=0).mean()
        last = class_weights * (_START_NORM / norm)
        earlier = sum(self.channels[:-1])
        self.fusion.kernel[...] = jnp.pad(last, ((earlier, 0), (0, 0)))
        # pyrefly: ignore[unsupported-operation]  # the bias, which is optional in Flax
        self.fusion.bias[...] = jnp.zeros_like(self.fusion.bias[...])

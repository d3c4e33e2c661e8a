"""The two halves of a run's model, as its configuration says."""

import jax.numpy as jnp
from flax import nnx

from ttame_jax.attention import AttentionMechanism
from ttame_jax.backbones import Backbone, load_backbone
from ttame_jax.training.config import TrainConfig


def build_backbone(config: TrainConfig) -> Backbone:
    """The run's frozen classifier."""
    return load_backbone(
        config.backbone,
        config.weights,
        dtype=jnp.dtype(config.precision),
        **config.backbone_config,
    )


def build_attention(config: TrainConfig, backbone: Backbone) -> AttentionMechanism:
    """The run's attention mechanism before training.

    Raises:
      ValueError: for ``start="head"`` where the classifier's head does not read feature maps.
    """
    attention = AttentionMechanism(
        [channels for _, _, channels in backbone.feature_shapes()],
        backbone.num_classes,
        variant=config.variant,
        dtype=jnp.dtype(config.precision),
        rngs=nnx.Rngs(config.seed),
    )
    if config.start == "head":
        if backbone.class_weights is None:
            raise ValueError(
                f"--start head needs a classifier that averages its last feature map, which "
                f"{backbone.name} does not: use --start random"
            )
        attention.start_from_head(backbone.class_weights)
    return attention

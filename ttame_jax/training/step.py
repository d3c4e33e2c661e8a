"""The compiled training step, data-parallel over one device mesh."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ttame_jax.attention import AttentionMechanism
from ttame_jax.backbones import Backbone
from ttame_jax.compilers import compiler_options, in_groups
from ttame_jax.losses import (
    RECIPES,
    LossConfig,
    complement,
    cross_entropy,
    disagreement,
    total_loss,
)
from ttame_jax.masking import mask_images, upsample
from ttame_jax.mesh import AXIS
from ttame_jax.preprocessing import Masking, to_float
from ttame_jax.training.relevance import classify_with_relevance


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Everything that a step updates."""

    step: jax.Array  # int32, the number of finished steps
    params: nnx.State  # of the attention mechanism
    batch_stats: nnx.State  # its BatchNorms' running statistics, and the scale of its feature maps
    opt_state: optax.OptState


def initial_state(
    attention: AttentionMechanism, optimizer: optax.GradientTransformation
) -> TrainState:
    """The state before the first step."""
    _, params, batch_stats = nnx.split(attention, nnx.Param, nnx.BatchStat)
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params))


def make_train_step(
    backbone: Backbone,
    attention: AttentionMechanism,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    masking: Masking,
    loss_config: LossConfig,
    *,
    synchronise: bool = False,
) -> jax.stages.Wrapped:
    """Compiles a step of T-TAME's training (section III-D).

    By default each device uses its own part of the batch, as under ``jax.pmap``: Psi holds the maps
    of the model truths of its images, and BatchNorm uses their features. With `synchronise` both
    use the whole batch, and the result does not depend on the number of devices. In both cases
    losses, gradients and running statistics are averaged over the devices. Each device has the
    same number of images and all recipes are means over images, so this is the batch's loss.

    The same optimizer and modules of the same structure give the same step, which is traced once.

    Returns:
      ``step(state, backbone_state, images) -> (state, metrics)``; ``images`` uint8
      ``[B, H, W, 3]`` sharded on the batch, ``backbone_state`` from ``nnx.split(backbone)``,
      ``metrics`` scalars (loss, cross_entropy, area, variation, and those of `EXTRA_TERMS` that
      have a weight).
      The state is donated.
    """
    graphs = nnx.graphdef(backbone), nnx.graphdef(attention)
    return _compiled(*graphs, optimizer, mesh, masking, loss_config, synchronise)


@functools.lru_cache(maxsize=8)
def _compiled(
    backbone_graph: nnx.GraphDef,
    attention_graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    masking: Masking,
    loss_config: LossConfig,
    synchronise: bool,
) -> jax.stages.Wrapped:
    recipe = RECIPES[loss_config.recipe]

    def loss_fn(params, batch_stats, backbone_state, images):
        classify = nnx.merge(backbone_graph, backbone_state)
        mechanism = nnx.merge(attention_graph, params, batch_stats, copy=True)
        relevance = None
        if loss_config.weight("relevance"):
            layers = classify.feature_layers[mechanism.first_layer :]
            logits, features, relevance = classify_with_relevance(classify, images, layers)
        else:
            logits, features = classify(classify.preprocessing.standardise(images))
        classes = jnp.argmax(logits, axis=-1)  # the model truth [b]
        shown, first = classes, 0  # the classes in Psi, and the index of this device's first image
        if synchronise:
            shown = jax.lax.all_gather(classes, AXIS, tiled=True)  # [B]
            first = jax.lax.axis_index(AXIS) * len(classes)
        maps = mechanism(features, shown, train=True, axis_name=AXIS if synchronise else None)
        # Psi [b, b, h, w], synchronised [b, B, h, w]
        maps = mechanism.explanation_maps(maps) if recipe.scaled else jax.nn.sigmoid(maps)
        own = jax.lax.dynamic_slice_in_dim(maps, first, len(classes), axis=1)
        own = jnp.einsum("bbhw->bhw", own)
        masks = upsample(own, images.shape[1:3])
        judge = functools.partial(_judge_masked, classify, images, classes, masking)
        extra = {}
        if loss_config.weight("complement"):
            extra["complement"] = judge(1 - masks, complement)
        if relevance is not None:
            extra["relevance"] = disagreement(own, relevance)
        loss, terms = total_loss(maps, judge(masks, cross_entropy), loss_config, extra)
        return loss, ({"loss": loss, **terms}, nnx.state(mechanism, nnx.BatchStat))

    def local_step(state: TrainState, backbone_state, images):
        images = to_float(images)
        # Marked as varying over devices, so that the gradient is the device's own and is reduced
        # over devices once, in the mean below.
        params, batch_stats = jax.lax.pcast((state.params, state.batch_stats), AXIS, to="varying")
        gradient = jax.grad(loss_fn, has_aux=True)
        grads, aux = gradient(params, batch_stats, backbone_state, images)
        grads, (metrics, batch_stats) = jax.lax.pmean((grads, aux), AXIS)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # pyrefly: ignore[bad-argument-type]  # Optax returns parameters of the type that it is given
        return TrainState(state.step + 1, params, batch_stats, opt_state), metrics

    step = jax.shard_map(local_step, mesh=mesh, in_specs=(P(), P(), P(AXIS)), out_specs=(P(), P()))
    return jax.jit(step, donate_argnums=0, compiler_options=compiler_options(mesh))


def _judge_masked(
    backbone: Backbone,
    images: jax.Array,
    classes: jax.Array,
    masking: Masking,
    masks: jax.Array,
    term: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """A term [B] of the loss, of images [B, H, W, 3] under masks [B, H, W] and their classes [B].

    The gradients of the masks are computed along with the values, so the classifier's activations
    are kept for only one group of images at a time.
    """

    def of_group(images, masks, classes):
        def of_masks(masks):
            masked = mask_images(images, masks, backbone.preprocessing, masking)
            return term(backbone(masked)[0], classes)

        values, pull = jax.vjp(of_masks, masks)
        return values, *pull(jnp.ones_like(values))

    arrays = images, jax.lax.stop_gradient(masks), classes
    values, gradients = in_groups(of_group, *arrays, tpu_pixels=backbone.tpu_pixels)
    return _with_gradients(masks, values, gradients)


@jax.custom_vjp
def _with_gradients(masks, values, gradients):
    """Returns values [B] of masks [B, ...] and gives them the gradients [B, ...]."""
    del masks, gradients
    return values


_with_gradients.defvjp(
    lambda masks, values, gradients: (values, gradients),
    lambda gradients, scales: (jax.vmap(jnp.multiply)(scales, gradients), None, None),
)

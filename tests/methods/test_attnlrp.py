"""AttnLRP: relevance that is propagated layer by layer, as the paper has it, gives the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vits import AVERAGING, PLAIN, REFINED, build, one_image

from ttame_jax.backbones.vit import ACTIVATIONS
from ttame_jax.masking import min_max_scale
from ttame_jax.methods import AttnLRP, compute_maps, load_method
from ttame_jax.weights import load_backbone

CLASSES = np.array([[0, 3]])

pytestmark = pytest.mark.usefixtures("float64")


@functools.cache
def found_relevance(architecture, **options):
    return jax.jit(AttnLRP(build(architecture), **options).relevance)(one_image(), CLASSES)


class Explicit:
    """Relevance of one image and class. Each layer is run and returns how it hands on relevance."""

    def __init__(self, backbone, recipe, gamma, patch_gamma):
        self.backbone, self.paper = backbone, recipe == "paper"
        self.gamma, self.patch_gamma = gamma, patch_gamma

    def dense(self, x, layer, gamma=0.0):
        kernel = np.asarray(layer.kernel[...], np.float64).reshape(x.shape[-1], -1)
        bias = 0.0 if layer.bias is None else np.asarray(layer.bias[...], np.float64)
        return self.linear(x, kernel, bias + np.zeros(kernel.shape[1]), gamma)

    def linear(self, x, kernel, bias, gamma=0.0):
        """kernel [D, E], or [N, D, E] of each token."""
        parts = x[..., None] * kernel  # [N, D, E]
        y = parts.sum(-2) + bias
        favoured = parts * np.where(parts * y[..., None, :] > 0, 1 + gamma, 1)
        of_bias = bias * np.where(bias * y > 0, 1 + gamma, 1)
        shares = favoured / (favoured.sum(-2) + of_bias)[..., None, :]
        return y, lambda relevance: (shares * relevance[..., None, :]).sum(-1)

    def norm(self, x, layer):
        scale, bias = (np.asarray(p[...], np.float64) for p in (layer.scale, layer.bias))
        deviation = np.sqrt(x.var(-1) + layer.epsilon)[..., None, None]
        centre = np.eye(x.shape[-1]) - 1 / x.shape[-1]
        return self.linear(x, centre * scale / deviation, bias)

    def matmul(self, u, v):
        parts = u[..., :, :, None] * v[..., None, :, :]
        y = parts.sum(-2)

        def back(relevance):
            shares = parts / y[..., :, None, :] * relevance[..., :, None, :] / 2
            return shares.sum(-1), shares.sum(-3)

        return y, back

    def attention(self, x, attn):
        """x [N, 3 D]."""
        heads = x.reshape(len(x), 3, attn.num_heads, -1).transpose(1, 2, 0, 3)
        query, key, value = heads
        scores, of_scores = self.matmul(query, key.transpose(0, 2, 1))
        scores = scores / np.sqrt(query.shape[-1])
        weights = np.asarray(jax.nn.softmax(scores))
        mixed, of_mixed = self.matmul(weights, value)

        def back(relevance):
            relevance = relevance.reshape(len(x), attn.num_heads, -1).transpose(1, 0, 2)
            of_weights, of_value = of_mixed(relevance)
            total = of_weights.sum(-1, keepdims=True)
            of_query, of_key = of_scores(scores * (of_weights - weights * total))
            of_key = of_key.transpose(0, 2, 1)
            if not self.paper:
                of_query, of_key, of_value = 0 * of_query, 0 * of_key, 2 * of_value
            parts = np.stack([of_query, of_key, of_value])
            return parts.transpose(2, 0, 1, 3).reshape(x.shape)

        return mixed.transpose(1, 0, 2).reshape(len(x), -1), back

    def block(self, x, block):
        def residual(x, branch, back, scale):
            branch = branch if scale is None else branch * np.asarray(scale[...])
            y = x + branch
            return y, lambda relevance: relevance * x / y + back(relevance * branch / y)

        def chain(*backs):
            def back(relevance):
                for step in reversed(backs):
                    relevance = step(relevance)
                return relevance

            return back

        normed, back1 = self.norm(x, block.norm1)
        qkv, back2 = self.dense(normed, block.attn.qkv)
        mixed, back3 = self.attention(qkv, block.attn)
        branch, back4 = self.dense(mixed, block.attn.proj)
        x, first = residual(x, branch, chain(back1, back2, back3, back4), block.scale1)
        normed, back1 = self.norm(x, block.norm2)
        inner, back2 = self.dense(normed, block.mlp.fc1, self.gamma)
        hidden = np.asarray(ACTIVATIONS[block.mlp.activation](inner))
        branch, back3 = self.dense(hidden, block.mlp.fc2, self.gamma)
        x, second = residual(x, branch, chain(back1, back2, back3), block.scale2)
        return x, chain(first, second)

    def __call__(self, image, target):
        backbone, prefix = self.backbone, self.backbone.prefix_tokens
        patches = np.asarray(backbone.patches(image[None])[0])
        embedded, of_embedded = self.dense(
            patches.reshape(len(patches), -1), backbone.patch_embed, self.patch_gamma
        )
        x = positioned = np.asarray(backbone.add_positions(embedded[None])[0])
        backs = []
        if backbone.pre_norm is not None:
            x, back = self.norm(x, backbone.pre_norm)
            backs.append(back)
        for block in backbone.blocks:
            x, back = self.block(x, block)
            backs.append(back)
        tokens = slice(0, 1) if backbone.architecture.pool == "token" else slice(prefix, None)
        normed, of_normed = self.norm(x[tokens], backbone.norm)
        logits, of_logits = self.dense(normed.mean(0), backbone.head, self.gamma)
        relevance = of_logits(logits * (np.arange(len(logits)) == target))
        relevance = of_normed(relevance * normed / normed.sum(0))
        relevance = np.pad(
            relevance, ((0, len(x) - 1) if len(relevance) == 1 else (prefix, 0), (0, 0))
        )
        for back in reversed(backs):
            relevance = back(relevance)
        relevance = of_embedded((relevance / positioned)[prefix:] * embedded)
        return relevance.reshape(patches.shape)


@pytest.mark.parametrize(
    ("architecture", "recipe", "gamma", "patch_gamma"),
    [
        (PLAIN, "paper", 0.0, 0.0),
        (PLAIN, "reference", 0.1, 0.25),
        (REFINED, "paper", 0.1, 0.25),
        (AVERAGING, "paper", 1.0, 100.0),
    ],
)
def test_relevance_equals_that_of_the_rules_layer_by_layer(
    architecture, recipe, gamma, patch_gamma
):
    backbone = build(architecture)
    options = {"recipe": recipe, "gamma": gamma, "patch_gamma": patch_gamma}
    found = found_relevance(architecture, **options)
    image = np.asarray(backbone.preprocessing.standardise(one_image()))[0]
    for relevance, target in zip(found[0], CLASSES[0]):
        expected = Explicit(backbone, **options)(image, target)
        patches = backbone.patches(relevance[None])[0]
        np.testing.assert_allclose(patches, expected, atol=1e-5 * np.abs(expected).max())


def test_the_map_is_the_positive_relevance_of_the_patches_of_each_image():
    images = jnp.concatenate([one_image()[:, ::-1], one_image()])
    options = {"recipe": "paper", "gamma": 0.1, "patch_gamma": 0.25}
    maps = compute_maps(AttnLRP(build(REFINED), **options), images, np.array([[4, 1], *CLASSES]))
    assert maps.dtype == jnp.float32
    relevance = found_relevance(REFINED, **options)[0]
    patches = relevance.reshape(2, 4, 8, 4, 8, 3).sum((2, 4, 5))
    np.testing.assert_allclose(maps[1], min_max_scale(np.maximum(patches, 0)), atol=1e-6)


@pytest.mark.slow
def test_a_backbone_in_bfloat16_is_explained():
    backbone = load_backbone("digits_vit", dtype="bfloat16")
    size = backbone.preprocessing.image_size
    maps = compute_maps(AttnLRP(backbone), jnp.ones((1, size, size, 3), "float32") / 2, CLASSES)
    assert maps.dtype == jnp.float32
    assert np.isfinite(maps).all()


def test_wrong_options_are_refused():
    backbone = build(PLAIN)
    with pytest.raises(ValueError, match="patch_gamma of attnlrp are 0 or more, not -1 and 0.25"):
        load_method("attnlrp", backbone, gamma=-1)
    with pytest.raises(ValueError, match="recipes of attnlrp are 'paper' and 'reference'"):
        load_method("attnlrp", backbone, recipe="mine")


@pytest.mark.parametrize("name", ["attnlrp", "gradcam"])
def test_images_of_another_size_are_refused(name):
    method = load_method(name, build(REFINED))
    size = method.backbone.preprocessing.image_size
    images = jnp.zeros((1, size // 2, 2 * size, 3))  # as many values as the classifier takes
    with pytest.raises(ValueError, match=f"was built for {size}x{size} pixels, got"):
        compute_maps(method, images, CLASSES)
    with pytest.raises(ValueError, match=f"was built for {size}x{size} pixels, got"):
        method.backbone.split()[0](images)

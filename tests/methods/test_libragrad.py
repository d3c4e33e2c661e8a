"""LibraGrad: PyTorch's gradients, and FullGrad-completeness."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from vits import AVERAGING, PLAIN, REFINED, build, one_image

from ttame_jax.masking import min_max_scale
from ttame_jax.methods import LibraGrad, compute_maps
from ttame_jax.weights import load_backbone

CLASSES = np.array([[0, 3]])

pytestmark = pytest.mark.usefixtures("float64")


@functools.cache
def attributions(architecture):
    return jax.jit(LibraGrad(build(architecture)).attributions)(one_image(), CLASSES)


def torch_attributions(backbone, tokens, target):
    """Input times gradient of one image's tokens in each block, and of all biases in the blocks.

    Every token has biases of its own, whose gradients PyTorch computes.
    """
    torch = pytest.importorskip("torch")
    functional, biases = torch.nn.functional, []

    def tensor(array):
        return torch.tensor(np.asarray(array), dtype=torch.float64)

    def bias(layer, like):
        array = np.zeros(like.shape[-1]) if layer.bias is None else layer.bias[...]
        biases.append(tensor(array).expand(like.shape).clone().requires_grad_())
        return biases[-1]

    def dense(layer, x):
        y = x @ tensor(layer.kernel[...])
        return y + bias(layer, y)

    def norm(layer, x):
        deviation = (x.var(-1, unbiased=False, keepdim=True) + layer.epsilon).sqrt().detach()
        return (x - x.mean(-1, keepdim=True)) / deviation * tensor(layer.scale[...]) + bias(
            layer, x
        )

    def branch(scale, x):
        return x if scale is None else x * tensor(scale[...])

    def heads(x, count):
        return x.reshape(len(x), count, -1).transpose(0, 1)

    def activation(name, x):
        quick = name == "quick_gelu"
        gate = torch.sigmoid(1.702 * x) if quick else functional.gelu(x) / x
        return x * gate.detach()

    x, inputs = tensor(tokens).requires_grad_(), []
    for block in backbone.blocks:
        x = x.clone()
        x.retain_grad()
        inputs.append(x)
        attn, mlp = block.attn, block.mlp
        qkv = dense(attn.qkv, norm(block.norm1, x)).chunk(3, -1)
        query, key, value = (heads(part, attn.num_heads) for part in qkv)
        weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1).detach()
        mixed = (weights @ value).transpose(0, 1).reshape(x.shape)
        x = x + branch(block.scale1, dense(attn.proj, mixed))
        hidden = activation(mlp.activation, dense(mlp.fc1, norm(block.norm2, x)))
        x = x + branch(block.scale2, dense(mlp.fc2, hidden))
    count = len(biases)
    token = backbone.architecture.pool == "token"
    last = x[:1] if token else x[backbone.prefix_tokens :]
    dense(backbone.head, norm(backbone.norm, last).mean(0))[target].backward()
    of_inputs = np.stack([(x * x.grad).sum(-1).detach().numpy() for x in inputs])
    of_biases = sum((b * b.grad).sum(-1).detach().numpy() for b in biases[:count])
    return of_inputs, of_biases


@pytest.mark.parametrize("architecture", [PLAIN, REFINED, AVERAGING])
def test_attributions_equal_those_of_pytorch(architecture):
    backbone = build(architecture)
    tokens = backbone.embed(backbone.preprocessing.standardise(one_image()))[0]
    for k, target in enumerate(CLASSES[0]):
        expected = torch_attributions(backbone, tokens, target)
        for x, y in zip(attributions(architecture), expected):
            np.testing.assert_allclose(x[0, k], y, atol=1e-6 * np.abs(y).max())


@pytest.mark.parametrize("architecture", [PLAIN, AVERAGING])
def test_inputs_and_biases_add_up_to_the_logit(architecture):
    """FullGrad-completeness, Definition 1 and Corollary 3."""
    backbone = build(architecture)
    inputs, biases = attributions(architecture)
    logits, _ = nnx.jit(lambda backbone, x: backbone(x))(
        backbone, backbone.preprocessing.standardise(one_image())
    )
    rest = backbone.norm.bias[...] @ backbone.head.kernel[...] + backbone.head.bias[...]
    total = inputs[0, :, 0].sum(-1) + biases[0].sum(-1)
    np.testing.assert_allclose(total, (logits[0] - rest)[CLASSES[0]], rtol=1e-4)


def test_the_map_is_the_positive_sum_at_the_patches_of_each_image():
    images = jnp.concatenate([one_image()[:, ::-1], one_image()])
    maps = compute_maps(LibraGrad(build(REFINED)), images, np.array([[4, 1], *CLASSES]))
    assert maps.dtype == jnp.float32
    inputs, biases = attributions(REFINED)
    rows = (inputs.sum(2) + biases)[0, :, 4:].reshape(2, 4, 4)  # after class token and registers
    np.testing.assert_allclose(maps[1], min_max_scale(np.maximum(rows, 0)), atol=1e-6)


@pytest.mark.slow
def test_a_backbone_in_bfloat16_is_explained():
    backbone = load_backbone("digits_vit", dtype="bfloat16")
    size = backbone.preprocessing.image_size
    maps = compute_maps(LibraGrad(backbone), jnp.ones((1, size, size, 3), "float32") / 2, CLASSES)
    assert maps.dtype == jnp.float32
    assert np.isfinite(maps).all()

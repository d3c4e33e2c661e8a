import jax
import numpy as np
import pytest
import torch

from ttame_jax.backbones.layers import convolve, max_pool


@pytest.mark.parametrize(
    ("size", "window", "stride", "padding", "torch_options"),
    [
        (11, 3, 2, (1, 1), {"padding": 1}),
        (10, 3, 2, (0, 1), {"ceil_mode": True}),
        (11, 3, 2, (0, 1), {"ceil_mode": True}),
        (9, 2, 2, (0, 0), {}),
    ],
)
@pytest.mark.parametrize("rectified", [False, True])
def test_max_pool_and_its_gradient_equal_pytorchs(
    size, window, stride, padding, torch_options, rectified
):
    """Rectified values tie at 0: the first of them takes the gradient."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, size, size + 3, 4)).astype(np.float32)
    if rectified:
        x = np.maximum(x - 0.7, 0)
    tensor = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    expected = torch.nn.functional.max_pool2d(tensor, window, stride, **torch_options)
    weights = rng.normal(size=expected.shape).astype(np.float32)
    (expected * torch.tensor(weights)).sum().backward()

    y, pullback = jax.vjp(lambda x: max_pool(x, window, stride, padding), x)
    (gradient,) = pullback(weights.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(y, expected.detach().numpy().transpose(0, 2, 3, 1))
    np.testing.assert_allclose(gradient, tensor.grad.numpy().transpose(0, 2, 3, 1), atol=1e-6)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size,kernel,padding", [(9, 3, 1), (8, 3, 1), (11, 7, 3), (8, 5, 0)])
def test_convolutions_have_the_gradients_jax_gives_them(stride, size, kernel, padding):
    x = jax.random.normal(jax.random.key(0), (2, size, size + 1, 3))
    weights = jax.random.normal(jax.random.key(1), (kernel, kernel, 3, 4))
    strides, pads = (stride, stride), [(padding, padding)] * 2

    def plain(x, weights):
        return jax.lax.conv_general_dilated(
            x, weights, strides, pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    y, pull = jax.vjp(lambda *inputs: convolve(*inputs, strides, padding), x, weights)
    expected, expected_pull = jax.vjp(plain, x, weights)
    np.testing.assert_array_equal(y, expected)
    gradient = jax.random.normal(jax.random.key(2), y.shape)
    for a, b in zip(pull(gradient), expected_pull(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

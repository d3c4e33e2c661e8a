import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vits import AVERAGING, PLAIN, REFINED, build

from ttame_jax.methods.attnlrp import halved_attention
from ttame_jax.methods.vit_rules import classify, embed, fixed_attention, linear, run_block

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize(
    ("architecture", "attention", "gamma"),
    [
        (PLAIN, halved_attention, 0.5),
        (REFINED, fixed_attention, 0.0),
        (AVERAGING, halved_attention, 0.0),
        (dataclasses.replace(AVERAGING, norm_after_pool=True), fixed_attention, 0.5),
    ],
)
def test_rules_do_not_change_the_logits(architecture, attention, gamma):
    backbone = build(architecture)
    image = jax.random.normal(jax.random.key(1), (32, 32, 3))

    @jax.jit
    def both():
        x = embed(backbone, image, gamma)
        for block in backbone.blocks:
            x = run_block(block, x, attention, gamma)
        return classify(backbone, x, gamma), backbone(image[None])[0][0]

    np.testing.assert_allclose(*both(), atol=1e-5)  # the backbone's logits are float32


def test_gamma_favours_what_has_the_sign_of_the_output():
    # 2 * 1 and -1 * -2 make 4; 2 * -3 and -1 * 1 and the bias make -6, of which 1 is positive.
    x, kernel, bias = jnp.array([2.0, -1.0]), jnp.array([[1.0, -3.0], [-2.0, 1.0]]), [0.0, 1.0]
    y, backward = jax.vjp(lambda x: linear(x, kernel, jnp.array(bias), 1.0), x)
    np.testing.assert_allclose(y, [4, -6])
    of_first, of_second = (backward(jnp.eye(2)[i])[0] * x for i in range(2))
    np.testing.assert_allclose(of_first, [2, 2])
    np.testing.assert_allclose(of_second, -6 * np.array([-12, -2]) / -13, rtol=1e-6)


def test_an_output_of_zero_has_no_gradient_and_no_nan():
    gradient = jax.grad(lambda x: linear(x, jnp.zeros((2, 3)), None, 1.0).sum())(jnp.ones(2))
    np.testing.assert_array_equal(gradient, [0, 0])

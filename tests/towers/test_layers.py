"""Layers: what the towers share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twotower.towers.layers import dense, l2_normalize

pytestmark = pytest.mark.slow


def test_vectors_of_norm_one_and_a_zero_vector_without_a_gradient():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0], [1e-3, 0.0]])
    np.testing.assert_allclose(l2_normalize(x), [[0.6, 0.8], [0.0, 0.0], [1.0, 0.0]], rtol=1e-6)
    gradient = jax.grad(lambda x: (l2_normalize(x) * jnp.array([[1.0, 2.0]])).sum())(x)
    np.testing.assert_array_equal(gradient[1], [0.0, 0.0])
    assert np.isfinite(gradient).all() and gradient[0].any()


@pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="other devices have the arithmetic itself"
)
def test_a_dense_layer_in_bfloat16_on_a_cpu_rounds_the_operands_alone():
    rng = np.random.default_rng(0)
    x, g = (
        jnp.asarray(rng.normal(size=(3, 20, 12)), jnp.float32),
        jnp.asarray(rng.normal(size=(3, 20, 6)), jnp.float32),
    )
    layer = dense(6, jnp.bfloat16)
    params = layer.init(jax.random.key(0), x)
    value, pull = jax.vjp(layer.apply, params, x)
    kernel = params["params"]["kernel"]
    rounded = lambda x: np.asarray(x.astype(jnp.bfloat16), np.float64)  # noqa: E731
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, rounded(x) @ rounded(kernel), rtol=1e-5, atol=1e-5)
    assert np.abs(value - np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)).max() > 1e-4
    grads, of_x = pull(g)
    np.testing.assert_allclose(of_x, rounded(g) @ rounded(kernel).T, rtol=1e-5, atol=1e-5)
    exact = np.einsum("abf,abg->fg", np.asarray(x, np.float64), np.asarray(g, np.float64))
    np.testing.assert_allclose(grads["params"]["kernel"], exact, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grads["params"]["bias"], g.sum((0, 1)), rtol=1e-5)

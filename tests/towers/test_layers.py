"""Layers: what the towers share."""

import jax
import jax.numpy as jnp
import numpy as np

from twotower.towers.layers import l2_normalize


def test_vectors_of_norm_one_and_a_zero_vector_without_a_gradient():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0], [1e-3, 0.0]])
    np.testing.assert_allclose(l2_normalize(x), [[0.6, 0.8], [0.0, 0.0], [1.0, 0.0]], rtol=1e-6)
    gradient = jax.grad(lambda x: (l2_normalize(x) * jnp.array([[1.0, 2.0]])).sum())(x)
    np.testing.assert_array_equal(gradient[1], [0.0, 0.0])
    assert np.isfinite(gradient).all() and gradient[0].any()

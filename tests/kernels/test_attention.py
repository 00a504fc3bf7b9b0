"""Attention by blocks against the plain form, and rotary positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twotower.kernels.attention import attend, reference_attention, rotate

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [7, 120])
def test_blocks_equal_the_plain_form_in_value_and_gradient(length, causal):
    """Shorter than a block, and of several blocks the last of which is shorter."""
    keys = jax.random.split(jax.random.key(0), 3)
    vectors = [jax.random.normal(key, (2, length, 2, 4)) for key in keys]
    segment = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 4, (2, length))), jnp.int32)

    def loss(form, *vectors):
        return jnp.sin(form(*vectors, segment, causal=causal)).sum()

    found = jax.jit(lambda *x: jax.value_and_grad(lambda y: loss(attend, *y))(x))(*vectors)
    plain = jax.jit(lambda *x: jax.value_and_grad(lambda y: loss(reference_attention, *y))(x))
    for got, expected in zip(jax.tree.leaves(found), jax.tree.leaves(plain(*vectors))):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_products_of_rotated_vectors_depend_on_distances_alone():
    x, y = jax.random.normal(jax.random.key(0), (2, 1, 3, 2, 8))
    position = jnp.array([[0, 3, 9]])
    near, far = (
        jnp.einsum("bshd,bthd->bhst", rotate(x, position + k), rotate(y, position + k))
        for k in (0, 57)
    )
    np.testing.assert_allclose(near, far, atol=1e-4)
    rotated = rotate(x, position)
    norms = jnp.linalg.norm(x, axis=-1)
    np.testing.assert_allclose(jnp.linalg.norm(rotated, axis=-1), norms, rtol=1e-5)
    np.testing.assert_array_equal(rotated[:, 0], x[:, 0])

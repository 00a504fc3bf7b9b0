"""Binary cross-entropy by hand and at the extremes."""

import jax
import jax.numpy as jnp
import numpy as np

from twotower.objectives.pointwise import binary_cross_entropy


def test_values_by_hand():
    """Odds of 3: probability 3/4."""
    scores, labels = jnp.log(jnp.array([3.0, 3.0, 3.0])), jnp.array([1.0, 0.0, 0.5])
    got = binary_cross_entropy(scores, labels, pos_weight=2.0)
    np.testing.assert_allclose(
        got, [2 * np.log(4 / 3), np.log(4), np.log(4 / 3) + np.log(4) / 2], rtol=1e-6
    )


def test_a_weight_of_two_is_every_positive_twice():
    scores, labels = jnp.array([0.3, -1.2, 2.0]), jnp.array([1.0, 1.0, 0.0])
    twice = binary_cross_entropy(jnp.r_[scores, scores[:2]], jnp.r_[labels, labels[:2]])
    np.testing.assert_allclose(
        binary_cross_entropy(scores, labels, pos_weight=2.0).sum(), twice.sum(), rtol=1e-6
    )


def test_extreme_scores_stay_finite():
    scores, labels = jnp.array([1e30, -1e30, 1e30, -1e30]), jnp.array([1.0, 0.0, 0.0, 1.0])
    losses, gradient = (
        binary_cross_entropy(scores, labels),
        jax.grad(lambda s: binary_cross_entropy(s, labels).sum())(scores),
    )
    np.testing.assert_array_equal(losses[:2], 0.0)
    np.testing.assert_allclose(gradient, [0, 0, 1, -1])
    assert np.isfinite(losses).all()

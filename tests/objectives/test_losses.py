"""Losses: values by hand, masks, extremes, and what the correction is for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.objectives.cases import ITEMS, OBJECTIVE
from twotower.config import ObjectiveConfig
from twotower.objectives.losses import (
    LOSSES,
    binary_cross_entropy,
    bind_constants,
    corrected_softmax,
    gbce,
    softmax,
)

LOG = np.log


def per_query(name, positive, negatives, where, objective=OBJECTIVE, num_items=ITEMS):
    return bind_constants(LOSSES[name], objective, num_items).per_query(
        positive, negatives, where=where
    )


@functools.partial(jax.jit, static_argnums=0)
def losses_and_gradients(name, positive, negatives, where):
    """The losses [B], and the gradients of their sum by the positives and negatives."""

    def total(positive, negatives):
        losses = per_query(name, positive, negatives, where)
        return losses.sum(), losses

    gradients, losses = jax.grad(total, (0, 1), has_aux=True)(positive, negatives)
    return losses, gradients


# Odds of 2 for the positive, 3 and 5 for the negatives, 100 for what is masked; or similarities of
# .8, .9 and .2.
ODDS = (LOG([2.0]), LOG([[3.0, 100.0, 5.0]]))
COSINES = (np.array([0.8]), np.array([[0.9, 7.0, 0.2]]))


@pytest.mark.parametrize(
    ("name", "logits", "expected"),
    [
        ("softmax", ODDS, LOG((2 + 3 + 5) / 2)),
        ("corrected_softmax", ODDS, (1 - 2 / 10) * LOG((3 + 5) / 2)),
        ("bsl", ODDS, LOG((3 + 5) / 2)),
        # n = 2 of N - 1 = 4: alpha = 1/2, beta = 1 - 0.6 / 2.
        ("gbce", ODDS, (0.7 * LOG(3 / 2) + LOG(4) + LOG(6)) / 3),
        ("sigmoid", ODDS, LOG(3 / 2) + LOG(4) + LOG(6)),
        ("bpr", ODDS, (LOG(1 + 3 / 2) + LOG(1 + 5 / 2)) / 2),
        ("hinge", COSINES, (0.5 - 0.8 + 0.9) / 2),
        ("triplet", COSINES, 0.5 - 0.8 + 0.9),
        ("cosine_contrastive", COSINES, 0.2 + 2 * (0.9 - 0.5) / 2),
    ],
)
def test_values_by_hand(name, logits, expected):
    objective = ObjectiveConfig(margin=0.5, calibration=0.6, negative_weight=2.0)
    positive, negatives = (jnp.asarray(x, jnp.float32) for x in logits)
    where = jnp.array([[True, False, True]])
    got = per_query(name, positive, negatives, where, objective, num_items=5)
    np.testing.assert_allclose(got, [expected], rtol=1e-6)


@pytest.fixture
def logits():
    rng = np.random.default_rng(3)
    # Six or seven allowed of each, so that a slice has one of two shapes.
    where = np.ones((6, 9), bool)
    for b in range(6):
        where[b, rng.choice(np.arange(1, 9), 2 + b % 2, replace=False)] = False
    return (
        jnp.asarray(rng.normal(size=6), jnp.float32),
        jnp.asarray(rng.normal(size=(6, 9)), jnp.float32),
        jnp.asarray(where),
    )


@pytest.mark.parametrize("name", LOSSES)
def test_masked_equals_sliced(name, logits):
    """Each query alone, with its allowed negatives."""
    positive, negatives, where = logits
    filled = jnp.where(where, negatives, jnp.inf)  # whatever stands there is not looked at
    got, gradients = losses_and_gradients(name, positive, filled, where)
    for b in range(len(positive)):
        kept = np.flatnonzero(where[b])
        everything = jnp.ones((1, kept.size), bool)
        sliced = losses_and_gradients(
            name, positive[b : b + 1], negatives[b : b + 1, kept], everything
        )
        np.testing.assert_allclose(got[b : b + 1], sliced[0], rtol=1e-5)
        np.testing.assert_allclose(gradients[0][b : b + 1], sliced[1][0], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(
            gradients[1][b : b + 1, kept], sliced[1][1], rtol=1e-4, atol=1e-6
        )
    assert not np.asarray(gradients[1])[~np.asarray(where)].any()


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_negatives_does_not_matter(name, logits):
    positive, negatives, where = logits
    order = np.random.default_rng(0).permutation(negatives.shape[1])
    losses, _ = losses_and_gradients(name, positive, negatives, where)
    moved, _ = losses_and_gradients(name, positive, negatives[:, order], where[:, order])
    np.testing.assert_allclose(losses, moved, rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_a_query_without_negatives_costs_nothing_and_moves_nothing(name, logits):
    positive, negatives, where = logits
    where = where.at[2].set(False)
    losses, (by_positive, by_negatives) = losses_and_gradients(name, positive, negatives, where)
    assert losses[2] == 0 and by_positive[2] == 0 and not by_negatives[2].any()
    assert np.isfinite(losses).all() and (losses[np.arange(6) != 2] > 0).any()


@pytest.mark.parametrize("extreme", [1e4, 1e30])
@pytest.mark.parametrize("name", LOSSES)
def test_extreme_logits_stay_finite(name, extreme, logits):
    _, negatives, where = logits
    for positive in (extreme, -extreme):
        values = jnp.full(6, positive, jnp.float32)
        found = losses_and_gradients(name, values, negatives * extreme / 10, where)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))


def test_calibration_of_zero_is_binary_cross_entropy(logits):
    positive, negatives, where = logits
    got = gbce(positive, negatives, where=where, calibration=0.0, num_items=10**6)
    expected = (-jax.nn.log_sigmoid(positive) - (jax.nn.log_sigmoid(-negatives) * where).sum(1)) / (
        1 + where.sum(1)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_calibration_of_one_counts_the_positive_as_rarely_as_the_negatives_are_drawn(logits):
    """The positive's slope is what it would be in the cross-entropy of all items, times the share
    that was drawn."""
    positive, negatives, _ = logits
    everything = jnp.ones(negatives.shape, bool)
    slope = jax.grad(
        lambda p: gbce(p, negatives, where=everything, calibration=1.0, num_items=91).sum()
    )(positive)
    np.testing.assert_allclose(slope, -(9 / 90) * jax.nn.sigmoid(-positive) / (9 + 1), rtol=1e-5)


def _mean_gradients(positive_is_sampled: bool):
    """Mean gradient by the scores of 20 items, of a batch of 64 drawn by popularity, and the full
    softmax's."""
    rng, draws, trials = np.random.default_rng(5), 64, 3000
    share = np.r_[0.3, rng.dirichlet(np.ones(19)) * 0.7]
    scores = jnp.asarray(rng.normal(size=20), jnp.float32)
    log_count = jnp.asarray(np.log(draws * share), jnp.float32)
    samples = jnp.asarray(rng.choice(20, size=(trials, draws), p=share), jnp.int32)

    def sampled(scores, ids):
        negatives = (scores[ids] - log_count[ids])[None]
        positive = scores[:1] - (log_count[:1] if positive_is_sampled else 0.0)
        return (softmax if positive_is_sampled else corrected_softmax)(
            positive, negatives, where=(ids != 0)[None]
        )[0]

    full = jax.grad(lambda s: jax.nn.logsumexp(s) - s[0])(scores)
    return jax.jit(jax.vmap(jax.grad(sampled), (None, 0)))(scores, samples).mean(0), full


def test_the_corrected_softmax_approaches_the_full_one_where_the_classic_does_not():
    """Of a popular positive, which the classic form divides by its expected count of 19."""
    classic, full = _mean_gradients(True)
    corrected, _ = _mean_gradients(False)
    errors = [float(jnp.abs(gradient - full).max()) for gradient in (corrected, classic)]
    assert errors[0] < 0.02 and errors[1] > 0.08, errors


def test_binary_cross_entropy_by_hand():
    """Odds of 3: probability 3/4."""
    scores, labels = jnp.log(jnp.array([3.0, 3.0, 3.0])), jnp.array([1.0, 0.0, 0.5])
    got = binary_cross_entropy(scores, labels, pos_weight=2.0)
    np.testing.assert_allclose(
        got, [2 * np.log(4 / 3), np.log(4), np.log(4 / 3) + np.log(4) / 2], rtol=1e-6
    )


def test_a_pos_weight_of_two_is_every_positive_twice():
    scores, labels = jnp.array([0.3, -1.2, 2.0]), jnp.array([1.0, 1.0, 0.0])
    twice = binary_cross_entropy(jnp.r_[scores, scores[:2]], jnp.r_[labels, labels[:2]])
    np.testing.assert_allclose(
        binary_cross_entropy(scores, labels, pos_weight=2.0).sum(), twice.sum(), rtol=1e-6
    )


def test_extreme_scores_of_rows_stay_finite():
    scores, labels = jnp.array([1e30, -1e30, 1e30, -1e30]), jnp.array([1.0, 0.0, 0.0, 1.0])
    losses = binary_cross_entropy(scores, labels)
    gradient = jax.grad(lambda s: binary_cross_entropy(s, labels).sum())(scores)
    np.testing.assert_array_equal(losses[:2], 0.0)
    np.testing.assert_allclose(gradient, [0, 0, 1, -1])
    assert np.isfinite(losses).all()

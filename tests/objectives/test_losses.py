"""The losses of a positive and its negatives: values by hand, masks, extremes, and what the
correction is for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.objectives.cases import ITEMS, OBJECTIVE
from twotower.config import ObjectiveConfig
from twotower.objectives import LOSSES
from twotower.objectives.losses import corrected_softmax, gbce, softmax

LOG = np.log


def of(name, positive, negatives, where, objective=OBJECTIVE, num_items=ITEMS):
    loss = LOSSES[name]
    return loss.of(positive, negatives, where=where, **loss.constants(objective, num_items))


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
    got = of(name, positive, negatives, jnp.array([[True, False, True]]), objective, num_items=5)
    np.testing.assert_allclose(got, [expected], rtol=1e-6)


@pytest.fixture
def logits():
    rng = np.random.default_rng(3)
    where = rng.random((6, 9)) < 0.6
    where[:, 0] = True
    return (
        jnp.asarray(rng.normal(size=6), jnp.float32),
        jnp.asarray(rng.normal(size=(6, 9)), jnp.float32),
        jnp.asarray(where),
    )


def _gradients(name, positive, negatives, where):
    return jax.grad(lambda p, n: of(name, p, n, where).sum(), (0, 1))(positive, negatives)


@pytest.mark.parametrize("name", LOSSES)
def test_masked_equals_sliced(name, logits):
    positive, negatives, where = logits
    filled = jnp.where(where, negatives, jnp.inf)  # whatever stands there is not looked at
    got, gradients = of(name, positive, filled, where), _gradients(name, positive, filled, where)
    for b in range(len(positive)):
        kept = np.flatnonzero(where[b])
        sliced = positive[b : b + 1], negatives[b : b + 1, kept], jnp.ones((1, kept.size), bool)
        np.testing.assert_allclose(got[b : b + 1], of(name, *sliced), rtol=1e-5)
        for mine, theirs in zip(
            (gradients[0][b : b + 1], gradients[1][b : b + 1, kept]), _gradients(name, *sliced)
        ):
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)
    assert not np.asarray(gradients[1])[~np.asarray(where)].any()


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_negatives_does_not_matter(name, logits):
    positive, negatives, where = logits
    order = np.random.default_rng(0).permutation(negatives.shape[1])
    np.testing.assert_allclose(
        of(name, positive, negatives, where),
        of(name, positive, negatives[:, order], where[:, order]),
        rtol=1e-5,
    )


@pytest.mark.parametrize("name", LOSSES)
def test_a_query_without_negatives_costs_nothing_and_moves_nothing(name, logits):
    positive, negatives, where = logits
    where = where.at[2].set(False)
    got, (by_positive, by_negatives) = (
        of(name, positive, negatives, where),
        _gradients(name, positive, negatives, where),
    )
    assert got[2] == 0 and by_positive[2] == 0 and not by_negatives[2].any()
    assert np.isfinite(got).all() and (got[np.arange(6) != 2] > 0).any()


@pytest.mark.parametrize("extreme", [1e4, 1e30])
@pytest.mark.parametrize("name", LOSSES)
def test_extreme_logits_stay_finite(name, extreme, logits):
    _, negatives, where = logits
    for positive in (extreme, -extreme):
        args = jnp.full(6, positive, jnp.float32), negatives * extreme / 10, where
        assert np.isfinite(of(name, *args)).all()
        assert all(np.isfinite(g).all() for g in _gradients(name, *args))


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
    drawn = jnp.asarray(rng.choice(20, size=(trials, draws), p=share), jnp.int32)

    def sampled(scores, ids):
        negatives = (scores[ids] - log_count[ids])[None]
        positive = scores[:1] - (log_count[:1] if positive_is_sampled else 0.0)
        return (softmax if positive_is_sampled else corrected_softmax)(
            positive, negatives, where=(ids != 0)[None]
        )[0]

    full = jax.grad(lambda s: jax.nn.logsumexp(s) - s[0])(scores)
    return jax.jit(jax.vmap(jax.grad(sampled), (None, 0)))(scores, drawn).mean(0), full


def test_the_corrected_softmax_approaches_the_full_one_where_the_classic_does_not():
    """Of a popular positive, which the classic form divides by its expected count of 19."""
    classic, full = _mean_gradients(True)
    corrected, _ = _mean_gradients(False)
    errors = [float(jnp.abs(gradient - full).max()) for gradient in (corrected, classic)]
    assert errors[0] < 0.02 and errors[1] > 0.08, errors

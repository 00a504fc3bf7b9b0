"""The loss: order of correction, masks, and the gradient that the correction is for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twotower.objectives.frequency import log_expected_count
from twotower.objectives.negatives import Candidates, in_batch
from twotower.objectives.softmax import softmax

B, D = 12, 6


@pytest.fixture
def vectors():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(B, D)), jnp.float32), jnp.asarray(rng.normal(size=(B, D)), jnp.float32)


def _loss(queries, items, candidates, *, owners=None, temperature=0.5, **options):
    owners = jnp.arange(len(queries), dtype=jnp.int32) if owners is None else owners
    positives = jnp.arange(len(queries), dtype=jnp.int32)
    return softmax(
        queries, items, inverse_temperature=jnp.float32(1 / temperature), owners=owners, positives=positives,
        candidates=candidates, **options,
    )  # fmt: skip


def _candidates(ids, owners=None, log_count=None):
    ids = jnp.asarray(ids, jnp.int32)
    owners = jnp.arange(len(ids), dtype=jnp.int32) if owners is None else jnp.asarray(owners, jnp.int32)
    return Candidates(ids, owners, jnp.zeros(len(ids)) if log_count is None else jnp.asarray(log_count, jnp.float32))


def _oracle(queries, items, ids, owners, log_count, temperature):
    """Plain Python, one query at a time."""
    losses = []
    for b in range(len(queries)):
        logit = [float(np.dot(queries[b], v)) / temperature - log_count[c] for c, v in enumerate(items)]
        kept = [c for c in range(len(items)) if c == b or (ids[c] != ids[b] and owners[c] != owners[b] and ids[c] >= 0)]
        losses.append(np.log(sum(np.exp(logit[c]) for c in kept)) - logit[b])
    return losses


def test_equals_the_definition_with_every_mask_on(vectors):
    rng = np.random.default_rng(1)
    ids, owners = rng.integers(0, 5, B), rng.integers(0, 6, B)
    items = jnp.concatenate([vectors[1], vectors[0] + 1])
    all_ids = np.concatenate([ids, rng.integers(0, 5, B - 2), [-1, -1]])
    all_owners = np.concatenate([owners, np.full(B, -1)])
    log_count = rng.normal(size=2 * B)
    got = _loss(
        vectors[0], items, _candidates(all_ids, all_owners, log_count), owners=jnp.asarray(owners, jnp.int32), temperature=0.2
    )
    np.testing.assert_allclose(got, _oracle(*vectors[:1], items, all_ids, all_owners, log_count, 0.2), rtol=2e-5)


def test_the_correction_is_subtracted_after_the_temperature(vectors):
    """At T = 0.05, expected counts 1e-2 and 1e-6 are log(1e4) = 9.2 nats apart, and the rarer one is raised."""
    queries, items = jnp.zeros((2, D)), jnp.ones((2, D))
    loss = _loss(queries, items, _candidates([1, 2], log_count=np.log([1e-2, 1e-6])), temperature=0.05)
    np.testing.assert_allclose(loss[0] - loss[1], np.log(1e4), rtol=1e-5)


def test_accidental_hits_have_probability_zero(vectors):
    ids = np.arange(B)
    ids[3] = ids[0]
    gradient = jax.grad(lambda v: _loss(vectors[0], v, _candidates(ids))[0])(vectors[1])
    np.testing.assert_array_equal(gradient[3], np.zeros(D))
    assert (np.abs(gradient[4]) > 0).any()


def test_other_positives_of_the_user_are_no_negatives(vectors):
    owners = jnp.arange(B, dtype=jnp.int32).at[3].set(0)

    def gradient(mask):
        candidates = _candidates(np.arange(B), owners)
        return jax.grad(lambda v: _loss(vectors[0], v, candidates, owners=owners, mask_same_user=mask)[0])(vectors[1])

    assert not gradient(True)[3].any()
    assert gradient(False)[3].any()


def test_candidates_of_nobody_are_negatives_of_a_query_of_nobody(vectors):
    """-1 says that there is no owner; two of them are not the same user."""
    nobody = jnp.full(B, -1, jnp.int32)
    got = _loss(*vectors, _candidates(np.arange(B), nobody), owners=nobody)
    np.testing.assert_allclose(got, _loss(*vectors, _candidates(np.arange(B)), mask_same_user=False), rtol=1e-6)


def test_padding_equals_slicing(vectors):
    padded = jnp.concatenate([vectors[1], jnp.full((3, D), 50.0)])
    ids = np.concatenate([np.arange(B), [-1, -1, -1]])
    np.testing.assert_allclose(
        _loss(vectors[0], padded, _candidates(ids, np.arange(B + 3))), _loss(*vectors, _candidates(np.arange(B))), rtol=1e-6
    )


def test_a_query_with_nothing_but_its_positive_costs_nothing(vectors):
    loss, gradient = jax.value_and_grad(lambda q: _loss(q, vectors[1], _candidates(np.full(B, 7))).sum())(vectors[0])
    assert loss == 0 and not np.isnan(gradient).any()


def test_corrected_popular_negatives_give_the_full_softmax_gradient():
    """Sampled by popularity and corrected, the expected gradient approaches that of all items; uncorrected it does not."""
    rng = np.random.default_rng(2)
    catalogue, counts = 50, np.r_[np.full(5, 200.0), np.full(45, 2.0)]
    items = jnp.asarray(rng.normal(size=(catalogue, D)) * 0.5, jnp.float32)
    query, draws, trials = jnp.asarray(rng.normal(size=(1, D)), jnp.float32), 2000, 40
    log_count = np.log(draws * counts / counts.sum())

    def gradient(ids, correction):
        candidates = _candidates(ids, np.full(len(ids), -1), correction)
        return jax.grad(lambda v: _loss(query, v[jnp.asarray(ids)], candidates, temperature=1.0).sum())(items)

    full = gradient(np.arange(catalogue), np.zeros(catalogue))

    def mean_gradient(correct):
        total = 0.0
        for _ in range(trials):
            ids = np.r_[0, rng.choice(catalogue, draws, p=counts / counts.sum())].astype(np.int32)
            # The positive's own duplicates are masked, so it counts once: its expected count is 1.
            correction = np.r_[0.0, log_count[ids[1:]]] if correct else np.zeros(draws + 1)
            total = total + gradient(ids, correction)
        return total / trials

    assert float(jnp.abs(mean_gradient(True) - full).max()) < 0.02
    assert float(jnp.abs(mean_gradient(False) - full).max()) > 0.1


def test_expected_counts_are_those_of_uniformly_drawn_rows():
    counts, rng = np.array([100.0, 10.0, 1.0, 0.0]), np.random.default_rng(0)
    expected = np.exp(log_expected_count(jnp.asarray(counts, jnp.float32), jnp.float32(counts.sum()), jnp.arange(4), 32))
    rows = np.repeat(np.arange(4), counts.astype(int))
    drawn = np.mean([np.bincount(rng.choice(rows, 32), minlength=4) for _ in range(20_000)], axis=0)
    np.testing.assert_allclose(expected[:3], drawn[:3], rtol=0.05)
    # An item never seen has one pseudo-count: finite, and never more likely than one seen once.
    assert expected[3] == expected[2] > 0


def test_in_batch_without_counts_corrects_nothing():
    candidates = in_batch(jnp.arange(3, dtype=jnp.int32), jnp.arange(3, dtype=jnp.int32), None)
    assert not candidates.log_expected_count.any()

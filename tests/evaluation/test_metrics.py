"""Metrics against plain Python on lists, and masking against slicing."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from twotower.evaluation import metrics


def oracle(ranked, right):
    """All metrics of one list of items, as the textbooks say it."""
    gains = [item in right for item in ranked]
    ideal = min(len(right), len(ranked))
    first = next((rank for rank, hit in enumerate(gains, 1) if hit), None)
    precisions = [sum(gains[:rank]) / rank for rank, hit in enumerate(gains, 1) if hit]
    return {
        "recall": len(right & set(ranked)) / len(right),
        "precision": len(right & set(ranked)) / len(ranked),
        "hit_rate": float(bool(right & set(ranked))),
        "ndcg": sum(hit / math.log2(rank + 1) for rank, hit in enumerate(gains, 1))
        / sum(1 / math.log2(rank + 1) for rank in range(1, ideal + 1)),
        "mrr": 1 / first if first else 0.0,
        "map": sum(precisions) / ideal,
    }


@pytest.fixture
def lists():
    rng = np.random.default_rng(0)
    ranked = [rng.permutation(30)[:12].tolist() for _ in range(200)]
    right = [set(rng.permutation(30)[: rng.integers(1, 25)].tolist()) for _ in range(200)]
    right[0], right[1] = set(ranked[0][:5]), {99}  # all found at the top, and none found
    return ranked, right


def hits_of(ranked, right):
    return jnp.array([[i in r for i in items] for items, r in zip(ranked, right)]), jnp.array(
        [len(r) for r in right]
    )


@pytest.mark.parametrize("name", metrics.ACCURACY)
def test_equals_plain_python(lists, name):
    ranked, right = lists
    expected = [oracle(items, r)[name] for items, r in zip(ranked, right)]
    np.testing.assert_allclose(metrics.ACCURACY[name](*hits_of(ranked, right)), expected, rtol=1e-5)


@pytest.mark.parametrize("name", metrics.ACCURACY)
def test_masking_equals_slicing(lists, name):
    hits, right = hits_of(*lists)
    metric = metrics.ACCURACY[name]
    top = jnp.broadcast_to(jnp.arange(12) < 5, hits.shape)
    np.testing.assert_array_equal(metric(hits, right, where=top), metric(hits[:, :5], right))
    odd = jnp.broadcast_to(jnp.arange(12) % 2 == 1, hits.shape)
    np.testing.assert_allclose(
        metric(hits, right, where=odd), metric(hits[:, 1::2], right), rtol=1e-6
    )


@pytest.mark.parametrize("name", metrics.ACCURACY)
def test_a_perfect_list_is_one_and_an_empty_one_zero(name):
    # Precision of a perfect list is 1 only where there is something to fill it with.
    metric, right = metrics.ACCURACY[name], jnp.array([7])
    np.testing.assert_allclose(metric(jnp.ones((1, 7), bool), right), 1.0, rtol=1e-6)
    assert metric(jnp.zeros((1, 7), bool), right) == 0.0
    assert metric(jnp.zeros((1, 7), bool), jnp.array([0])) == 0.0


def test_ndcg_and_map_are_normalised_by_what_fits_in_the_list():
    hits, right = jnp.ones((1, 3), bool), jnp.array([10])
    np.testing.assert_allclose(metrics.ndcg(hits, right), 1.0, rtol=1e-6)
    np.testing.assert_allclose(metrics.average_precision(hits, right), 1.0, rtol=1e-6)
    np.testing.assert_allclose(metrics.recall(hits, right), 0.3, rtol=1e-6)


def test_novelty_is_the_mean_self_information():
    counts = jnp.array([[7, 0, 3], [1, 1, 1]])
    where = jnp.array([[True, True, False], [True, True, True]])
    expected = [np.mean([-math.log2(8 / 40), -math.log2(1 / 40)]), -math.log2(2 / 40)]
    np.testing.assert_allclose(metrics.novelty(counts, 30, 10, where=where), expected, rtol=1e-6)


def test_never_trained_counts_only_real_items():
    counts = jnp.array([[0, 5, 0], [0, 0, 0]])
    where = jnp.array([[True, True, False], [False, False, False]])
    assert metrics.never_trained(counts, where=where).tolist() == [0.5, 0.0]


def test_coverage():
    assert metrics.coverage(jnp.array([True, False, False, True])) == 0.5

"""Rates of batches, expected counts and histograms against their definitions."""

import dataclasses

import numpy as np
import pytest

from twotower.config import NegativesConfig
from twotower.core.arrays import Ragged
from twotower.evaluation.audits import health
from twotower.pipeline.batches import InteractionRows
from twotower.training.candidates import NegativeSampling


def rows_of(users, items):
    return InteractionRows(
        user=np.array(users, np.int32),
        item=np.array(items, np.int32),
        weight=np.ones(len(users), np.float32),
        timestamp=None,
        context={},
    )


@pytest.mark.parametrize("masks_same_user", [True, False])
def test_rates_of_a_batch_of_the_whole_log_are_counted_by_hand(masks_same_user):
    """A batch of all rows is the same whatever is drawn: users 0 0 1 1 2, items a b a c d."""
    train = rows_of([0, 0, 1, 1, 2], [0, 1, 0, 2, 3])
    seen = Ragged.from_pairs(train.user, train.item, num_rows=3)
    rates = health.batch_rates(train, seen, size=9, masks_same_user=masks_same_user)
    assert rates["size"] == 5 and rates["duplicate_rate"] == pytest.approx(1 / 5)
    pairs = [(q, c) for q in range(5) for c in range(5) if q != c]
    is_masked = {
        (q, c): train.item[q] == train.item[c]
        or (masks_same_user and train.user[q] == train.user[c])
        for q, c in pairs
    }
    negatives = [pair for pair in pairs if not is_masked[pair]]
    false = [(q, c) for q, c in negatives if train.item[c] in seen[train.user[q]]]
    assert false
    assert rates["masked_rate"] == pytest.approx(sum(is_masked.values()) / 20)
    assert rates["false_negative_rate"] == pytest.approx(len(false) / len(negatives))


def test_expected_counts_are_those_that_draws_have():
    counts = np.array([0, 1, 9, 30, 60])
    config = NegativesConfig(uniform=20, popularity=30, alpha=0.5)
    sampling = NegativeSampling(config, batch_size=50, items=5, corrected=True)
    found = health.expected_counts(sampling, counts)
    powers = np.sqrt(counts) / np.sqrt(counts).sum()
    expected = 50 * counts / 100 + 20 / 5 + 30 * powers
    assert found["deciles"] == pytest.approx(expected.tolist())
    assert (found["least"], found["greatest"]) == pytest.approx((4.0, expected[-1]))
    every = dataclasses.replace(
        sampling, config=NegativesConfig(catalogue=True, in_batch=False, uniform=0)
    )
    assert health.expected_counts(every, counts)["deciles"] == [1.0] * 5


def test_lengths_are_told_by_popularity():
    counts = np.arange(200)[::-1]
    items = np.eye(4)[np.arange(200) % 4] * (1 + counts[:, None])
    found = health.vector_health({"users": np.eye(4), "items": items}, counts)
    deciles = found["norms"]["deciles"]
    assert [decile["rows"] for decile in deciles] == list(range(19, 200, 20))
    for number, decile in enumerate(deciles):
        lengths = np.arange(20 * number + 1, 20 * number + 21)
        assert decile["median"] == pytest.approx(np.median(lengths))
        assert decile["low"] < decile["median"] < decile["high"]
    assert found["effective_rank"] == pytest.approx({"users": 4, "items": 4, "dim": 4}, rel=0.01)


def test_the_histogram_of_hubs_counts_each_item_once():
    exposures = np.array([0, 0, 1, 2, 3, 4, 7, 8, 100])
    found = health.hub_histogram(exposures, 10)
    assert found["lists"] == [0, 1, 2, 4, 8, 16, 32, 64]
    assert found["items"] == [2, 1, 2, 2, 1, 0, 0, 1]
    assert health.hub_histogram(np.zeros(3, int), 10)["items"] == [3]

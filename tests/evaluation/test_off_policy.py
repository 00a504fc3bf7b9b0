"""Estimates from the logs of policies that explored, against what is known to be true."""

import numpy as np
import pyarrow as pa
import pytest

from twotower.core.errors import ConfigError
from twotower.evaluation.off_policy import Estimate, estimate_policies, format_estimates, snips

ITEMS = 6


def simulate(rng, lists, explore, rates):
    """Lists of two positions: the best item of the first policy, or one drawn from those left."""
    count = 2 * lists
    chosen = np.zeros(count, int)
    propensity = np.zeros(count)
    is_best = np.zeros(count, bool)
    for row in range(count):
        left = [item for item in range(ITEMS) if row % 2 == 0 or item != chosen[row - 1]]
        place = int(rng.integers(len(left))) if rng.random() < explore else 0
        chosen[row] = left[place]
        propensity[row] = explore / len(left) + (1 - explore) * (place == 0)
        is_best[row] = place == 0
    # The whole list is liked or not, so that its positions depend on each other.
    liked = np.repeat(rng.random(lists), 2)
    rewards = (liked < rates[chosen]).astype(float)
    return chosen, propensity, is_best, rewards


def test_estimates_are_near_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    rates = np.array([0.3, 0.2, 0.5, 0.1, 0.4, 0.0])
    inside = 0
    values = []
    # The other policy shows item 2 at the first position, and what the log shows at the second.
    lists = 400
    for _ in range(60):
        chosen, logged, _, rewards = simulate(rng, lists, 0.6, rates)
        is_first = np.arange(2 * lists) % 2 == 0
        rows = np.flatnonzero(is_first)
        target = (chosen[rows] == 2).astype(float)
        found = snips(rewards[rows], logged[rows], target)
        values.append(found.value)
        inside += found.low <= rates[2] <= found.high
    assert np.mean(values) == pytest.approx(rates[2], abs=0.02)
    assert inside >= 51


def test_the_mean_of_the_log_is_biased_where_the_estimate_is_not():
    rng = np.random.default_rng(1)
    rates = np.array([0.1, 0.1, 0.1, 0.6, 0.6, 0.6])
    chosen, logged, is_best, rewards = simulate(rng, 6_000, 0.5, rates)
    lists = np.arange(len(chosen)) // 2
    greedy = snips(rewards, logged, is_best.astype(float), lists)
    assert abs(rewards.mean() - 0.1) > 0.1
    # The best that is left is item 0, or 1 after it: both of the same rate.
    assert greedy.value == pytest.approx(0.1, abs=0.02) and not greedy.refusal()
    alone = snips(rewards, logged, is_best.astype(float))
    # Positions of one list say less than as many of their own.
    assert greedy.high - greedy.low > alone.high - alone.low
    assert alone.overlap == pytest.approx(1.0, abs=0.05)


def test_weights_that_are_equal_make_the_mean_and_count_every_row():
    rewards = np.random.default_rng(2).random(50)
    same = np.full(50, 0.25)
    found = snips(rewards, same, same)
    assert found.value == pytest.approx(rewards.mean())
    assert found.effective == pytest.approx(50) and found.overlap == pytest.approx(1)
    # A factor of all weights changes nothing: they are normalised.
    assert snips(rewards, same, same / 2).value == pytest.approx(found.value)
    one = np.zeros(50)
    one[3] = 1
    assert snips(rewards, same, one).effective == pytest.approx(1)


def test_what_the_log_never_shows_is_refused():
    rng = np.random.default_rng(3)
    rates = np.full(ITEMS, 0.2)
    chosen, logged, _, rewards = simulate(rng, 3_000, 0.0, rates)
    # Without exploration only the first two items are ever shown.
    other = snips(rewards, logged, (chosen == 1).astype(float))
    assert other.overlap == pytest.approx(0.5) and "overlap 0.50 is below 0.8" in other.refusal()
    nothing = snips(rewards, logged, (chosen == 5).astype(float))
    assert nothing.overlap == 0 and "overlap 0.00" in nothing.refusal()
    few = snips(rewards[:900], logged[:900], logged[:900])
    assert "900 effective samples of 900 are below 1,000" in few.refusal()
    assert "overlap" not in few.refusal()


@pytest.mark.parametrize("logged, target", [(0.0, 1.0), (1.2, 1.0), (0.5, -0.1), (np.nan, 1.0)])
def test_what_is_no_probability_is_refused(logged, target):
    with pytest.raises(ConfigError, match="must be a probability"):
        snips(np.ones(2), np.array([0.5, logged]), np.array([0.5, target]))


def test_policies_of_a_log_are_printed_with_their_refusals():
    count = 1_500
    rng = np.random.default_rng(4)
    best = rng.random(count) < 0.9
    labelled = pa.table(
        {
            "recommendation_id": [f"r{n // 10}" for n in range(count)],
            "propensity": np.where(best, 0.91, 0.01),
            "best": best,
            "label": (rng.random(count) < 0.2).astype(np.int8),
        }
    )
    found = estimate_policies(labelled)
    assert list(found) == ["as logged", "without exploration"]
    text = format_estimates({**found, "mine": Estimate(0.1, 0.0, 0.2, 0.5, 30.0, 100)})
    assert "| refused" not in text and "mine: overlap 0.50" in text
    assert f"{found['as logged'].value:.5f}" in text

"""Intervals by resampling users: how often they hold the truth, and what pairs them."""

import numpy as np
import pytest

from twotower.evaluation import all_lists, metrics
from twotower.evaluation.all_lists import Resampling, Users, repeated_share
from twotower.evaluation.intervals import (
    interval,
    interval_table,
    paired_intervals,
    resampled_means,
)


@pytest.mark.slow
def test_intervals_hold_the_true_mean_as_often_as_they_say():
    """1,000 logs of 200 users; a user has one to three queries that are alike."""
    rng = np.random.default_rng(0)
    held = 0
    for draw in range(1_000):
        queries = rng.integers(1, 4, 200)
        users = np.repeat(np.arange(200), queries)
        # Of each user's own rate, whose mean is .3: queries of a user are not independent.
        rate = rng.beta(3, 7, 200)
        values = (rng.random(len(users)) < rate[users]).astype(float)[:, None]
        low, high = interval(resampled_means(values, users, resamples=300, seed=draw))
        held += low[0] <= 0.3 <= high[0]
    # Three standard deviations of a binomial of 1,000 either side of 95 %.
    assert abs(held - 950) <= 21 + 10, held


def test_a_mean_of_users_has_the_interval_of_its_standard_error():
    rng = np.random.default_rng(1)
    values = rng.normal(size=(5_000, 2))
    low, high = interval(resampled_means(values, np.arange(5_000)))
    error = 1.96 / np.sqrt(5_000)
    np.testing.assert_allclose((high - low) / 2, [error, error], rtol=0.1)
    np.testing.assert_allclose((high + low) / 2, values.mean(0), atol=error / 5)


def test_queries_of_one_user_stay_together():
    """One user with all queries has no spread; as many users with one each have."""
    values = np.arange(6.0)[:, None]
    assert np.ptp(resampled_means(values, np.zeros(6, int))[:, 0]) in (0.0, 2.5)
    assert np.ptp(resampled_means(values, np.arange(6))[:, 0]) > 2.5


def test_queries_that_are_not_averaged_change_nothing():
    rng = np.random.default_rng(2)
    values = rng.random((100, 1))
    where = np.arange(100) % 2 == 0
    users = np.arange(100)
    changed = np.where(where[:, None], values, 99.0)
    found = interval_table({"recall@10": values[:, 0]}, users, where)
    assert found == interval_table({"recall@10": changed[:, 0]}, users, where)
    assert found["recall@10"][0] < values[where].mean() < found["recall@10"][1]
    assert interval_table({"recall@10": values[:, 0]}, users, np.zeros(100, bool)) == {}


def test_a_resample_that_counts_nobody_is_left_out():
    """Of two users one in seven resamples counts neither; a mean of 0 would be of nobody."""
    means = resampled_means(np.full((3, 1), 0.5), np.array([0, 1, 1]))
    assert 800 < len(means) < 950 and means.tolist() == [[0.5]] * len(means)
    assert interval_table({"x": np.full(1, 0.8)}, np.zeros(1, int), np.ones(1, bool)) == {
        "x": [pytest.approx(0.8)] * 2
    }


def test_all_rankings_are_weighed_by_one_draw_of_counts():
    """So the difference of two means is resampled as the mean of their differences is."""
    rng = np.random.default_rng(3)
    users = rng.integers(0, 60, 200)
    where = rng.random(200) < 0.9
    hard = rng.random(200)
    values = {
        name: {"recall@10": hard + 0.1 * rng.random(200), "ndcg@10": rng.random(200)}
        for name in ("model", "ease", "als")
    }
    intervals, differences = paired_intervals(values, users, where, first="model")
    assert list(intervals) == ["model", "ease", "als"] and list(differences) == ["ease", "als"]
    for name, figures in values.items():
        assert intervals[name] == interval_table(figures, users, where)
    for name, ends in differences.items():
        less = {key: values["model"][key] - column for key, column in values[name].items()}
        expected = interval_table(less, users, where)
        for key, found in ends.items():
            assert found == pytest.approx(expected[key], abs=1e-5)
        # What both find hard cancels out.
        low, high = ends["recall@10"]
        own_low, own_high = intervals[name]["recall@10"]
        assert high - low < 0.5 * (own_high - own_low)
    assert paired_intervals(values, users, np.zeros(200, bool), first="model") == ({}, {})


def lists_of(rng, users, items, k):
    """Lists by popularity and one of two tastes, int [users, k]."""
    scores = rng.gumbel(size=(users, items)) - np.log(np.arange(items) + 1)
    scores += (rng.random((users, 1)) < 0.5) * (np.arange(items) % 2)
    return np.argsort(-scores, axis=1)[:, :k]


def corpus_figures(lists, users, items, k):
    """Coverage, Gini and share of repeated lists, and columns whose means they are."""
    exposures = np.bincount(lists.ravel(), minlength=items)
    hashes = np.random.default_rng(0).integers(0, 2**64, items, dtype=np.uint64)[lists].sum(1)
    numbers = Users(users, np.ones(len(lists), bool))
    resampling = Resampling(numbers, [k], items)
    for start in range(0, len(lists), 70):
        block = slice(start, min(start + 70, len(lists)))
        resampling.add(block, lists[block])
    share, repeated = repeated_share(numbers, hashes)
    figures = [metrics.coverage(exposures > 0), metrics.gini(exposures), share]
    changes = resampling.changes(k, exposures, figures[1])
    pairs = zip(figures, [*changes.values(), repeated])
    return figures, np.stack([numbers.pseudo_values(*pair) for pair in pairs], 1)


def test_a_figure_of_all_lists_falls_by_what_it_is_without_each_user():
    rng = np.random.default_rng(0)
    users = rng.integers(0, 40, 80)
    lists = lists_of(rng, 80, 60, 2)
    figures, columns = corpus_figures(lists, users, 60, 2)
    np.testing.assert_allclose(columns.mean(0), figures)
    names = np.unique(users)
    without = np.array(
        [corpus_figures(lists[users != u], users[users != u], 60, 2)[0] for u in names]
    )
    falls = figures - without
    # Of the numbers of a user's queries, only the sum counts.
    moved = np.stack([(columns[users == u] - figures).sum(0) for u in names]) / len(users)
    np.testing.assert_allclose(moved[:, [0, 2]], (falls - falls.mean(0))[:, [0, 2]], atol=1e-12)
    # But for two items of a list that as many lists hold.
    np.testing.assert_allclose(moved[:, 1], falls[:, 1] - falls[:, 1].mean(), atol=2e-3)
    assert np.ptp(falls, axis=0).min() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(("users", "items", "k"), [(200, 300, 10), (200, 60, 2)])
def test_intervals_of_figures_of_all_lists_hold_the_mean_of_other_users(users, items, k):
    """100 logs; of coverage and repeated lists they are too wide, never too narrow."""
    rng = np.random.default_rng(1)
    found = []
    ends = []
    for draw in range(100):
        lists = lists_of(rng, users, items, k)
        figures, columns = corpus_figures(lists, np.arange(users), items, k)
        found.append(figures)
        ends.append(interval(resampled_means(columns, np.arange(users), resamples=200, seed=draw)))
    truth = np.mean(found, 0)
    held = np.mean([(low <= truth) & (truth <= high) for low, high in ends], 0)
    # Three standard deviations of a binomial of 100 below 95 %.
    assert (held >= 0.885).all(), held
    # The percentiles of coverage itself would lie below it: a third of the users is left out.
    drawn = np.unique(lists[rng.integers(0, users, users)])
    assert len(drawn) / items < truth[0] - 0.02


def test_of_very_many_lists_some_users_stand_for_all(monkeypatch):
    rng = np.random.default_rng(2)
    lists = lists_of(rng, 2_000, 100, 5)
    widths = []
    for most in (all_lists.MAX_ENTRIES, 2_500):
        monkeypatch.setattr(all_lists, "MAX_ENTRIES", most)
        _, columns = corpus_figures(lists, np.arange(2_000), 100, 5)
        low, high = interval(resampled_means(columns, np.arange(2_000)))
        widths.append(high - low)
    assert (columns[:, 1] == columns[1, 1]).sum() == 1_500
    np.testing.assert_allclose(widths[0], widths[1], rtol=0.15)

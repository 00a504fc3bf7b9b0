"""Baselines: their order, and that the tie rule does not touch them."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from jaxtyping import config as shape_checks

from twotower.core.arrays import Ragged
from twotower.evaluation.baselines import popularity
from twotower.evaluation.baselines.make import make_baselines
from twotower.evaluation.evaluate import evaluate
from twotower.evaluation.queries import Queries
from twotower.pipeline.batches import InteractionRows

DAY = 24 * 3600


def rows(items, days=None):
    count = len(items)
    timestamp = None if days is None else np.array(days, np.int64) * DAY
    return InteractionRows(
        np.zeros(count, np.int32),
        np.array(items, np.int32),
        np.ones(count, np.float32),
        timestamp,
        {},
    )


def ranking(scores_of, query=0):
    scores = np.asarray(scores_of(slice(query, query + 1)))[0]
    assert len(np.unique(scores)) == len(scores), "ties would be punished"
    return np.argsort(-scores).tolist()


def test_popularity_is_by_count_then_latest():
    train = rows([4, 4, 4, 2, 1, 1, 2, 0], days=range(8))
    order = ranking(popularity.order_scores(popularity.popularity_order(train, 6)))
    assert order[:4] == [4, 2, 1, 0] and set(order[4:]) == {3, 5}


def test_without_timestamps_the_latest_is_the_last_in_the_file():
    order = popularity.popularity_order(rows([2, 1, 1, 2, 0]), 3)
    assert order.tolist() == [2, 1, 0]


def test_never_sold_items_are_shuffled_by_the_seed_alone():
    train = rows([0])
    one, same, other = (popularity.popularity_order(train, 500, seed=s) for s in (1, 1, 2))
    assert one.tolist() == same.tolist() != other.tolist()
    # Were they left in the order of the file, a right answer early in the file would be found for
    # nothing.
    assert abs(np.corrcoef(np.arange(499), one[1:])[0, 1]) < 0.2


def fake(train, num_items, truth=None):
    parts = {"train": train, "validation": rows([])}
    items = pa.table({"item_id": [f"{item}" for item in range(num_items)]})
    return SimpleNamespace(positives=parts.__getitem__, items=items, users=range(10), truth=truth)


def some_queries(num_queries, num_items):
    right = Ragged.from_pairs(
        np.arange(num_queries), np.arange(num_queries) % num_items, num_rows=num_queries
    )
    return Queries(
        user=np.arange(num_queries),
        relevant=right,
        missing=np.zeros(num_queries, np.int32),
        seen=Ragged.empty(num_queries),
        counts=np.ones(num_items, np.int64),
    )


def make(prepared, queries):
    """Without the run-time check of types, for this test: `prepared` is a stand-in."""
    shape_checks.update("jaxtyping_disable", True)
    return make_baselines(prepared, queries)


def test_last_week_counts_only_the_last_seven_days_of_training():
    train = rows([0, 0, 0, 0, 1, 2, 2], days=[0, 1, 2, 3, 20, 21, 26])
    found = make(fake(train, 4), some_queries(2, 4))
    assert ranking(found["popularity"])[:2] == [0, 2]
    assert ranking(found["popularity_last_week"])[:2] == [2, 1]
    assert "popularity_last_week" not in make(fake(rows([0, 1]), 4), some_queries(2, 4))


def test_last_week_is_seven_days_and_not_six_or_eight():
    train = rows([0, 0, 0, 1, 1, 2], days=[19, 19, 19, 20, 20, 26])
    assert ranking(make(fake(train, 3), some_queries(2, 3))["popularity_last_week"]) == [1, 2, 0]


def test_top_quantile_is_a_random_order_of_the_most_popular():
    order = np.random.default_rng(0).permutation(50)
    scores = popularity.top_quantile_scores(order, share=0.1)
    first = ranking(scores, 0)
    second = ranking(scores, 1)
    assert set(first[:5]) == set(second[:5]) == set(order[:5].tolist())
    assert first != second


def test_random_lists_do_not_depend_on_the_blocks():
    scores = popularity.random_scores(30)
    whole = np.asarray(scores(slice(0, 8)))
    np.testing.assert_array_equal(whole[3:6], scores(slice(3, 6)))
    assert len(np.unique(whole)) == whole.size


def test_random_recall_is_k_over_n():
    queries = some_queries(4_000, 50)
    assert evaluate(popularity.random_scores(50), queries, (10,), mask_seen=True)[
        "recall@10"
    ] == pytest.approx(0.2, abs=0.02)


def test_true_preferences_rank_by_the_generator(problem_size=6):
    rng = np.random.default_rng(0)
    users = rng.normal(size=(6, 3)).astype(np.float32)
    items = rng.normal(size=(9, 3)).astype(np.float32)
    truth = SimpleNamespace(user_factors=users, item_factors=items)
    scores = make(fake(rows([0]), 9, truth), some_queries(6, 9))["true_preferences"]
    assert ranking(scores, 4) == np.argsort(-(items @ users[4])).tolist()

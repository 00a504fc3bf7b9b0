"""Item-kNN and EASE against their formulas written out densely, and what they are fitted on and
asked with."""

import logging

import numpy as np
import pytest

from twotower.config import from_dict
from twotower.core.arrays import Ragged
from twotower.evaluation.baselines import item_to_item
from twotower.evaluation.baselines.make import make_baselines
from twotower.evaluation.baselines.popularity import order_scores, popularity_order
from twotower.evaluation.evaluate import evaluate
from twotower.evaluation.queries import Queries, make_queries
from twotower.pipeline.batches import InteractionRows
from twotower.pipeline.prepare import prepare
from twotower.retrieval.user_items import items_of_users

pytestmark = pytest.mark.slow

USERS = 60
ITEMS = 40


def random_log(seed=0):
    """Rows with duplicates; users 0 to 4 and items 0 to 3 have none."""
    rng = np.random.default_rng(seed)
    user = rng.integers(5, USERS, 900).astype(np.int32)
    item = (4 + 36 * rng.random(900) ** 2).astype(np.int32)
    assert len(np.unique(user * ITEMS + item)) < 800
    return InteractionRows(user, item, np.ones(900, np.float32), None, {})


def lists_of(rows):
    return items_of_users([rows], num_users=USERS)


def matrix(lists, num_items=ITEMS):
    """Binary, users by items."""
    x = np.zeros((len(lists), num_items))
    x[lists.rows, lists.values] = 1
    return x


def asked(seen, right=None, num_items=ITEMS):
    """One query a user, with one right answer."""
    right = np.zeros(len(seen), int) if right is None else right
    answers = Ragged.from_pairs(np.arange(len(seen)), right, num_rows=len(seen))
    return Queries(
        user=np.arange(len(seen), dtype=np.int32),
        relevant=answers,
        missing=np.zeros(len(seen), np.int32),
        seen=seen,
        counts=np.bincount(seen.values, minlength=num_items),
    )


def naive_cosines(x):
    both = x.T @ x
    count = x.sum(0)
    cosine = np.divide(
        both, np.sqrt(np.outer(count, count)), where=both > 0, out=np.zeros_like(both)
    )
    np.fill_diagonal(cosine, 0)
    return cosine


def naive_ease(x, ridge):
    precision = np.linalg.inv(x.T @ x + ridge * np.eye(x.shape[1]))
    weights = precision / -np.diag(precision)
    np.fill_diagonal(weights, 0)
    return weights


def test_the_nearest_items_are_those_of_greatest_cosine_without_the_item_itself():
    x = matrix(lists_of(random_log()))
    near, similarity = item_to_item.nearest_items(lists_of(random_log()), ITEMS, 7)
    expected = naive_cosines(x)
    for item in range(ITEMS):
        np.testing.assert_allclose(similarity[item], np.sort(expected[item])[::-1][:7], rtol=1e-6)
        real = similarity[item] > 0
        np.testing.assert_allclose(
            expected[item, near[item, real]], similarity[item, real], rtol=1e-6
        )
        assert len(set(near[item, real])) == real.sum() and item not in near[item, real]
        assert real.any() == (item >= 4)


def test_of_equally_near_items_the_more_popular_is_kept():
    # Item 0 shares a quarter of what could be with 1 (1 of 1 x 16) and with 2 (2 of 4 x 16).
    zero = [(user, 0) for user in range(16)]
    pairs = np.array([*zero, (0, 1), (1, 2), (2, 2), (16, 2), (17, 2)])
    train = Ragged.from_pairs(pairs[:, 0], pairs[:, 1], num_rows=18)
    near, similarity = item_to_item.nearest_items(train, 3, 2)
    assert similarity[0].tolist() == [0.25, 0.25] and near[0].tolist() == [2, 1]


def test_item_knn_adds_up_the_cosines_of_the_items_that_were_seen():
    train = lists_of(random_log())
    near, similarity = item_to_item.nearest_items(train, ITEMS, 6)
    pruned = np.zeros((ITEMS, ITEMS))
    np.maximum.at(pruned, (np.arange(ITEMS)[:, None], near), similarity)
    seen = lists_of(random_log(seed=1))
    scores = item_to_item.NeighbourModel(near, similarity)(asked(seen))
    np.testing.assert_allclose(scores(slice(0, USERS)), matrix(seen) @ pruned, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(scores(slice(20, 31)), scores(slice(0, USERS))[20:31])


@pytest.mark.parametrize("ridge", [0.5, 20.0])
def test_ease_is_its_closed_form(ridge):
    train = lists_of(random_log())
    seen = lists_of(random_log(seed=1))
    gram = item_to_item.gram_matrix(train, ITEMS)
    np.testing.assert_array_equal(gram, matrix(train).T @ matrix(train))
    weights = np.asarray(item_to_item.ease(gram, ridge))
    expected = naive_ease(matrix(train), ridge)
    np.testing.assert_allclose(weights, expected, atol=1e-5)
    assert not np.diag(weights).any() and np.abs(weights - weights.T).max() > 0.01
    scores = item_to_item.LinearModel(weights)(asked(seen))
    np.testing.assert_allclose(scores(slice(3, 50)), (matrix(seen) @ expected)[3:50], atol=1e-4)


def test_a_user_without_history_finds_nothing_and_new_items_are_not_found():
    train = lists_of(random_log())
    queries = asked(train, right=np.full(USERS, 20)).take(np.arange(5))
    for scores in item_to_item.make_item_to_item(train, queries, None).values():
        assert not np.asarray(scores(slice(0, 5))).any()
        assert evaluate(scores, queries, (10, ITEMS - 1), mask_seen=True)["recall@39"] == 0
    for scores in item_to_item.make_item_to_item(train, asked(train), None).values():
        everyone = scores(slice(0, USERS))
        assert np.isfinite(everyone).all() and not everyone[:, :4].any() and everyone[5:, 4:].any()


def communities(num_items=60, users=300, own=10):
    """Each user takes `own` of the 20 items of its third and the right answer is one more of
    them."""
    rng = np.random.default_rng(0)
    taken = [rng.permutation(20)[: own + 1] + 20 * rng.integers(0, 3) for _ in range(users)]
    seen = np.concatenate([items[:own] for items in taken])
    train = Ragged.from_pairs(np.repeat(np.arange(users), own), seen, num_rows=users)
    return train, asked(train, np.array([items[own] for items in taken]), num_items)


def test_both_find_what_popularity_cannot():
    train, queries = communities()
    rows = InteractionRows(
        train.rows.astype(np.int32), train.values, np.ones(len(train.values), np.float32), None, {}
    )
    popularity = evaluate(order_scores(popularity_order(rows, 60)), queries, (10,), mask_seen=True)[
        "recall@10"
    ]
    made = item_to_item.make_item_to_item(train, queries, queries)
    assert set(made) == {"item_knn", "ease"}
    for scores in made.values():
        assert evaluate(scores, queries, (10,), mask_seen=True)["recall@10"] > 0.9 > 2 * popularity


def test_the_values_with_the_best_ndcg_on_validation_are_taken(monkeypatch):
    """Of the neighbours the best of all; of the ridges the last before one that is no better."""
    train = lists_of(random_log())
    tuning = asked(lists_of(random_log()), right=np.random.default_rng(5).integers(4, 40, USERS))
    monkeypatch.setattr(item_to_item, "NEIGHBOURS", (8, 1, 16))
    monkeypatch.setattr(item_to_item, "RIDGES", (1000.0, 100.0, 10.0, 30.0))

    def measure(scores):
        return evaluate(scores, tuning, (10,), mask_seen=True)["ndcg@10"]

    near, similarity = item_to_item.nearest_items(train, ITEMS, 16)
    eight, one, sixteen = (
        measure(item_to_item.NeighbourModel(near[:, :n], similarity[:, :n])(tuning))
        for n in item_to_item.NEIGHBOURS
    )
    assert one < eight < sixteen
    made = item_to_item.make_item_to_item(train, tuning, tuning)
    assert measure(made["item_knn"]) == sixteen
    ridges = [
        measure(item_to_item.LinearModel(naive_ease(matrix(train), r))(tuning))
        for r in item_to_item.RIDGES
    ]
    assert ridges[0] < ridges[1] > ridges[2] and ridges[3] > ridges[1]
    assert measure(made["ease"]) == pytest.approx(ridges[1], abs=1e-6)


def test_a_model_that_is_left_out_is_not_fitted(monkeypatch):
    train = lists_of(random_log())
    monkeypatch.setattr(item_to_item, "ease", None)
    made = item_to_item.make_item_to_item(train, asked(train), None, without=["ease"])
    assert set(made) == {"item_knn"}


def test_blocks_of_items_do_not_change_the_models(monkeypatch):
    train = lists_of(random_log())
    whole = item_to_item.nearest_items(train, ITEMS, 7)
    gram = item_to_item.gram_matrix(train, ITEMS)
    # Seven items at a time.
    monkeypatch.setattr(item_to_item, "BLOCK_BYTES", 8 * ITEMS * 7)
    for found, expected in zip(item_to_item.nearest_items(train, ITEMS, 7), whole):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(item_to_item.gram_matrix(train, ITEMS), gram)


def test_a_log_that_is_too_large_is_left_out_and_said(monkeypatch, caplog):
    train = lists_of(random_log())
    with caplog.at_level(logging.WARNING, logger="absl"):
        monkeypatch.setattr(item_to_item, "MAX_EASE_ITEMS", ITEMS - 1)
        assert set(item_to_item.make_item_to_item(train, asked(train), None)) == {"item_knn"}
        assert "40 items are more than 39" in caplog.text
        monkeypatch.setattr(item_to_item, "MAX_ITEM_PAIRS", 1_000)
        assert item_to_item.make_item_to_item(train, asked(train), None) == {}
        assert "item_knn and ease are left out" in caplog.text


@pytest.mark.parametrize(
    "split, parts", [("validation", ["train"]), ("test", ["train", "validation"])]
)
@pytest.mark.parametrize("kind", ["user", "interaction"])
def test_they_are_fitted_on_training_and_asked_with_all_that_was_earlier(
    tmp_path, monkeypatch, split, parts, kind
):
    rng = np.random.default_rng(2)
    lines = [f"u{rng.integers(12)},i{rng.integers(9)},{time}" for time in range(120)]
    (tmp_path / "log.csv").write_text("\n".join(["user_id,item_id,timestamp", *lines]))
    prepared = prepare(
        from_dict(
            {
                "data": {
                    "source": "csv",
                    "interactions": {"path": str(tmp_path / "log.csv")},
                    "accept": ("old_times",),
                },
                "evaluation": {"query": kind},
                "split": {"kind": "time", "validation": 0.2, "test": 0.2},
            }
        )
    )
    monkeypatch.setattr(item_to_item, "RIDGES", (3.0,))
    monkeypatch.setattr(item_to_item, "NEIGHBOURS", (8,))
    queries = make_queries(prepared, split, kind)
    scores = make_baselines(prepared, queries)
    x, history = np.zeros((2, len(prepared.users), len(prepared.items)))
    x[prepared.train.user, prepared.train.item] = 1
    for part in parts:
        rows = getattr(prepared, part)
        history[rows.user, rows.item] = 1
    for name, weights in (("item_knn", naive_cosines(x)), ("ease", naive_ease(x, 3.0))):
        found = scores[name](slice(0, len(queries)))
        np.testing.assert_allclose(found, (history @ weights)[queries.user], atol=1e-5)

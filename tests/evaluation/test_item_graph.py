"""The item-transition graph against a loop over all users, and walks against dense matrices."""

import numpy as np
import pytest

from twotower.core.arrays import Ragged
from twotower.evaluation.baselines import item_graph
from twotower.evaluation.baselines.item_graph import (
    BACKWARD,
    WINDOW,
    make_item_graph,
    transition_shares,
)
from twotower.evaluation.baselines.tuning import FitCache
from twotower.evaluation.queries import Queries

ITEMS = 30


@pytest.fixture(scope="module")
def sequences():
    """40 lists of up to 12 items; the first is empty, items 0 to 2 are in none."""
    rng = np.random.default_rng(0)
    lists = [rng.permutation(np.arange(3, ITEMS))[: rng.integers(0, 13)] for _ in range(40)]
    lists[0] = lists[0][:0]
    offsets = np.concatenate([[0], np.cumsum([len(items) for items in lists])])
    return Ragged(offsets, np.concatenate(lists).astype(np.int32))


def naive_shares(sequences):
    total = np.zeros((ITEMS, ITEMS))
    for items in sequences:
        for position, earlier in enumerate(items):
            for distance, later in enumerate(items[position + 1 :][:WINDOW], 1):
                total[earlier, later] += 1 / distance
                total[later, earlier] += BACKWARD / distance
    lengths = total.sum(1, keepdims=True)
    return np.divide(total, lengths, out=np.zeros_like(total), where=lengths > 0)


def test_shares_of_transitions_equal_a_loop_over_users(sequences):
    found = transition_shares(sequences, ITEMS).toarray()
    np.testing.assert_allclose(found, naive_shares(sequences), atol=1e-12)


def asked(sequences):
    return Queries(
        user=np.arange(len(sequences), dtype=np.int32),
        relevant=Ragged.from_pairs(np.arange(40), np.arange(40) % ITEMS, num_rows=40),
        missing=np.zeros(len(sequences), np.int32),
        seen=sequences,
        counts=np.bincount(sequences.values, minlength=ITEMS),
    )


@pytest.mark.parametrize("max_squared", [0, 4_096], ids=["walked", "squared"])
@pytest.mark.parametrize("walk", item_graph.WALKS, ids=str)
def test_a_walk_starts_at_the_last_items_and_takes_two_steps(
    sequences, walk, max_squared, monkeypatch
):
    monkeypatch.setattr(item_graph, "WALKS", (walk,))
    monkeypatch.setattr(item_graph, "MAX_SQUARED_ITEMS", max_squared)
    queries = asked(sequences)
    scores = make_item_graph(sequences, queries, None)[0](slice(0, 40))
    steps = naive_shares(sequences)
    for user, items in enumerate(sequences):
        start = np.zeros(ITEMS)
        for back, item in enumerate(items[::-1][: walk.items]):
            start[item] = walk.decay**back
        reached = start @ (steps + walk.second * steps @ steps)
        expected = reached / np.maximum(queries.counts, 1) ** 0.2
        np.testing.assert_allclose(scores[user], expected, rtol=1e-5, atol=1e-9)
    assert not scores[0].any()


def test_the_next_item_of_a_chain_is_first():
    """Everybody goes from each item to the one after it."""
    chain = Ragged.from_pairs(np.repeat(np.arange(5), 6), np.tile(np.arange(6), 5), num_rows=5)
    short = Ragged.from_pairs(np.zeros(3, int), np.arange(3), num_rows=1)
    queries = Queries(
        user=np.zeros(1, np.int32),
        relevant=Ragged.from_pairs(np.zeros(1, int), np.array([3]), num_rows=1),
        missing=np.zeros(1, np.int32),
        seen=short,
        counts=np.bincount(chain.values),
    )
    scores = make_item_graph(chain, queries, None)[0](slice(0, 1))[0]
    assert np.argmax(np.where(np.isin(np.arange(6), [0, 1, 2]), -1, scores)) == 3


def test_a_graph_that_was_kept_scores_as_the_one_that_was_made(sequences, tmp_path):
    queries = asked(sequences)
    cache = FitCache(tmp_path, "data")
    made, choice = make_item_graph(sequences, queries, queries, cache=cache)
    # Other sequences: what is read is what was kept.
    kept, same_choice = make_item_graph(Ragged.empty(40), queries, queries, cache=cache)
    np.testing.assert_array_equal(kept(slice(0, 40)), made(slice(0, 40)))
    assert same_choice == choice and choice.tried == len(item_graph.WALKS)

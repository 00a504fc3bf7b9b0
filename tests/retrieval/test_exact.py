"""Exact search against a stable NumPy sort."""

import numpy as np
import pytest

from twotower.retrieval.csr import Csr
from twotower.retrieval.exact import ExactIndex, QueryError, top_k


def oracle(queries, items, k, exclude=None):
    """Stable sort of all scores, less the excluded; -1 and -inf after the last."""
    scores, rows = [], []
    for q, query in enumerate(queries):
        banned = set() if exclude is None else set(exclude[q].tolist())
        values = items @ query
        order = [n for n in np.argsort(-values, kind="stable") if n not in banned][:k]
        rows.append(order + [-1] * (k - len(order)))
        scores.append([values[n] for n in order] + [-np.inf] * (k - len(order)))
    return np.array(scores, np.float32), np.array(rows, np.int32)


@pytest.fixture
def vectors():
    # Small integers: sums are exact in any order, and ties are plenty.
    rng = np.random.default_rng(1)
    return rng.integers(-2, 3, (37, 5)).astype(np.float32), rng.integers(-2, 3, (301, 5)).astype(np.float32)


@pytest.mark.parametrize("k", [1, 10, 301, 400])
@pytest.mark.parametrize("item_block", [7, 64, 1000])
def test_equals_a_stable_sort(vectors, k, item_block):
    queries, items = vectors
    scores, rows = ExactIndex(items, item_block=item_block).search(queries, k)
    expected_scores, expected_rows = oracle(queries, items, k)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(scores, expected_scores)


@pytest.mark.parametrize("item_block", [7, 1000])
def test_excluded_items_never_come_back(vectors, item_block):
    queries, items = vectors
    rng = np.random.default_rng(2)
    # From nobody excluded to all but two: fewer than k remain for the last queries.
    lists = [rng.permutation(301)[: min(299, 8 * q)] for q in range(len(queries))]
    exclude = Csr.from_pairs(np.repeat(np.arange(37), [len(x) for x in lists]), np.concatenate(lists), num_rows=37)
    scores, rows = ExactIndex(items, item_block=item_block).search(queries, 50, exclude=exclude)
    expected_scores, expected_rows = oracle(queries, items, 50, exclude)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(scores, expected_scores)
    assert (rows[-1] == -1).sum() > 0


def test_many_query_blocks_equal_one(vectors, monkeypatch):
    queries, items = vectors
    whole = top_k(queries, items, 9)
    monkeypatch.setattr("twotower.retrieval.exact.BLOCK_BYTES", 4 * 65_536 * 5)
    for one, many in zip(whole, top_k(queries, items, 9)):
        np.testing.assert_array_equal(one, many)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_query_that_is_not_finite_is_refused(vectors, value):
    queries, items = vectors
    queries[3, 1] = value
    with pytest.raises(QueryError, match="query vector 3 is not finite"):
        top_k(queries, items, 5)


def test_a_zero_query_is_refused_only_where_vectors_are_normalised(vectors):
    queries, items = vectors
    queries[4] = 0
    with pytest.raises(QueryError, match="query vector 4 is zero"):
        top_k(queries, items, 5, normalized=True)
    assert top_k(queries, items, 5)[1][4].tolist() == [0, 1, 2, 3, 4]


def test_bad_items_wrong_width_and_k_are_refused(vectors):
    queries, items = vectors
    with pytest.raises(QueryError, match="4 wide; the items are 5 wide"):
        top_k(queries[:, :4], items, 5)
    with pytest.raises(ValueError, match="k=0"):
        top_k(queries, items, 0)
    with pytest.raises(ValueError, match="exclude holds 1 lists for 37 queries"):
        top_k(queries, items, 5, exclude=Csr.empty(1))
    items[7, 0] = np.nan
    with pytest.raises(QueryError, match="item vector 7 is not finite"):
        top_k(queries, items, 5)


def test_no_queries_give_no_lists(vectors):
    scores, rows = top_k(np.zeros((0, 5)), vectors[1], 3)
    assert scores.shape == rows.shape == (0, 3)

"""Search under conditions against a sort of what is allowed: full lists, nothing forbidden,
whatever the index finds."""

import numpy as np
import pytest

from tests.index.test_exact import oracle
from twotower.config import RetrievalConfig
from twotower.core.errors import QueryError
from twotower.core.ragged import Ragged
from twotower.index.build import build_index
from twotower.index.exact import ExactIndex
from twotower.index.recall import list_recall
from twotower.index.search import AllowedRows, brute_force_search, search_filtered


@pytest.fixture(scope="module")
def vectors():
    """Small integers: sums are exact in any order, and ties are plenty."""
    rng = np.random.default_rng(1)
    return rng.integers(-2, 3, (19, 5)).astype(np.float32), rng.integers(-2, 3, (400, 5)).astype(
        np.float32
    )


def some_excluded(count, num_items, most):
    rng = np.random.default_rng(2)
    lists = [rng.permutation(num_items)[: most * q // count] for q in range(count)]
    return Ragged.from_pairs(
        np.repeat(np.arange(count), [len(x) for x in lists]), np.concatenate(lists), num_rows=count
    )


def forbidden(exclude, mask):
    """Lists of all that must not come back."""
    lists = [np.union1d(row, np.flatnonzero(~mask)) for row in exclude]
    return Ragged.from_pairs(
        np.repeat(np.arange(len(lists)), [len(x) for x in lists]),
        np.concatenate(lists),
        num_rows=len(lists),
    )


@pytest.mark.parametrize("row_block", [7, 1000])
@pytest.mark.parametrize("k", [1, 10, 500])
def test_exact_among_equals_a_stable_sort_of_what_is_left(vectors, k, row_block, monkeypatch):
    monkeypatch.setattr("twotower.index.search.ROW_BLOCK", row_block)
    monkeypatch.setattr("twotower.index.search.MAX_BLOCK_SCORES", 5 * row_block)
    queries, items = vectors
    exclude = some_excluded(19, 400, 390)
    mask = np.random.default_rng(3).random(400) < 0.3
    for among, banned in ((None, exclude), (np.flatnonzero(mask), forbidden(exclude, mask))):
        scores, rows = brute_force_search(items, among, queries, k, exclude)
        expected_scores, expected_rows = oracle(queries, items, k, banned)
        np.testing.assert_array_equal(rows, expected_rows)
        np.testing.assert_array_equal(scores, expected_scores)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 1.0])
def test_exact_search_of_what_is_allowed(vectors, share):
    queries, items = vectors
    mask, exclude = np.random.default_rng(4).random(400) < share, some_excluded(19, 400, 300)
    scores, rows = search_filtered(
        ExactIndex(items), items, queries, 20, exclude, allowed=AllowedRows.from_mask(mask)
    )
    expected = oracle(queries, items, 20, forbidden(exclude, mask))
    np.testing.assert_array_equal(rows, expected[1])
    np.testing.assert_array_equal(scores, expected[0])


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def approximate():
    pytest.importorskip("scann.scann_ops.py.scann_ops_pybind", reason="scann has no wheel here")
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(40, 16))
    items = unit(centres[rng.integers(0, 40, 3_000)] + 0.5 * rng.normal(size=(3_000, 16)))
    users = unit(centres[rng.integers(0, 40, 300)] + 0.5 * rng.normal(size=(300, 16)))
    config = RetrievalConfig(index="scann_tree", target_recall=0.95)
    return build_index(items, config, normalized=True, queries=users), items, users


@pytest.mark.parametrize("share", [0.001, 0.02, 0.2, 0.7])
def test_an_approximate_index_finds_its_share_of_what_is_allowed(approximate, share):
    """Whether the allowed items are few (compared one by one), many (more is fetched), or where the
    user never looks."""
    index, items, users = approximate
    rng = np.random.default_rng(5)
    anywhere = rng.random(len(items)) < share
    far = np.zeros(len(items), bool)  # what these users like least
    far[np.argsort(users.mean(0) @ items.T)[: max(3, int(share * len(items)))]] = True
    exclude = some_excluded(len(users), len(items), 60)
    for mask in (anywhere, far):
        scores, rows = search_filtered(
            index, items, users, 10, exclude, allowed=AllowedRows.from_mask(mask)
        )
        truth = oracle(users, items, 10, forbidden(exclude, mask))[1]
        assert ((rows >= 0) == (truth >= 0)).all()
        assert (
            mask[rows[rows >= 0]].all()
            and not exclude.contains(np.arange(len(users))[:, None], rows).any()
        )
        assert list_recall(np.where(rows < 0, -2, rows), truth) >= 0.95 * (truth >= 0).mean()
        assert (np.diff(scores[rows[:, -1] >= 0], axis=1) <= 0).all()


def test_few_allowed_items_are_not_looked_for_among_all(approximate, monkeypatch):
    index, items, users = approximate
    monkeypatch.setattr(index, "search", lambda *_: pytest.fail("the index was searched"))
    few = np.zeros(len(items), bool)
    few[[5, 17, 80]] = True
    assert set(
        search_filtered(index, items, users[:1], 3, allowed=AllowedRows.from_mask(few))[1][
            0
        ].tolist()
    ) == {5, 17, 80}
    with pytest.raises(QueryError, match="query vector 0 is zero"):
        search_filtered(index, items, users[:1] * 0, 3, allowed=AllowedRows.from_mask(few))

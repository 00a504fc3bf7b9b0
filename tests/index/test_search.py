"""Filtered search against a sort of what is allowed: full lists, nothing forbidden, whatever the
index finds."""

import numpy as np
import pytest

from tests.index.fakes import ShallowIndex, UnconditionalIndex
from tests.index.oracles import (
    assert_same_lists,
    clustered_vectors,
    integer_vectors,
    rising_exclusions,
    stable_sort,
)
from twotower.config import RetrievalConfig
from twotower.core.arrays import Ragged
from twotower.core.errors import QueryError
from twotower.index.build import build_index
from twotower.index.exact import ExactIndex
from twotower.index.recall import list_recall
from twotower.index.search import AllowedRows, brute_force_search, search_filtered

QUERIES = integer_vectors(19, seed=1)
ITEMS = integer_vectors(400, seed=3)


@pytest.mark.parametrize("row_block", [7, 1000])
@pytest.mark.parametrize("k", [1, 10, 500])
def test_brute_force_equals_a_stable_sort_of_what_is_left(k, row_block, monkeypatch):
    monkeypatch.setattr("twotower.index.search.ROW_BLOCK", row_block)
    monkeypatch.setattr("twotower.index.search.MAX_BLOCK_SCORES", 5 * row_block)
    exclude = rising_exclusions(19, 400, most=390)
    found = brute_force_search(ITEMS, None, QUERIES, k, exclude)
    assert_same_lists(found, stable_sort(QUERIES, ITEMS, k, exclude))
    mask = np.random.default_rng(3).random(400) < 0.3
    found = brute_force_search(ITEMS, np.flatnonzero(mask), QUERIES, k, exclude)
    assert_same_lists(found, stable_sort(QUERIES, ITEMS, k, exclude, mask))


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_brute_force_refuses_scores_that_overflow():
    items = np.full((40, 2), 3e38, np.float32)
    with pytest.raises(QueryError, match="overflow float32 to NaN"):
        brute_force_search(items, None, np.array([[1e3, -1e3]]), 3)


def test_an_extra_coordinate_adds_to_the_scores():
    coordinate = integer_vectors(400, seed=4, dim=1)[:, 0]
    queries = integer_vectors(19, seed=1, dim=6)
    found = brute_force_search(ITEMS, None, queries, 10, extra_coordinate=coordinate)
    assert_same_lists(found, stable_sort(queries, np.column_stack([ITEMS, coordinate]), 10))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 1.0])
def test_exact_search_of_what_is_allowed(share):
    mask = np.random.default_rng(4).random(400) < share
    exclude = rising_exclusions(19, 400, most=300)
    expected = stable_sort(QUERIES, ITEMS, 20, exclude, mask)
    for allowed in (AllowedRows.from_mask(mask), AllowedRows.from_rows(np.flatnonzero(mask))):
        found = search_filtered(ExactIndex(ITEMS), ITEMS, QUERIES, 20, exclude, allowed=allowed)
        assert_same_lists(found, expected)


@pytest.mark.parametrize("num_items", [0, 12])
@pytest.mark.parametrize("num_allowed", [0, 2])
def test_few_items_of_an_index_without_conditions(num_items, num_allowed):
    """So few that all are fetched: those that are not allowed are dropped all the same."""
    items = ITEMS[:num_items]
    mask = np.arange(num_items) < num_allowed
    found = search_filtered(
        UnconditionalIndex(items), items, QUERIES, 5, allowed=AllowedRows.from_mask(mask)
    )
    assert_same_lists(found, stable_sort(QUERIES, items, 5, allowed=mask))


@pytest.mark.parametrize("most", [0, 6, 300])
@pytest.mark.parametrize("k", [1, 10, 300, 500])
def test_one_user_is_answered_as_among_many(most, k):
    """By ways of its own: those first found are all there, a loop, and NumPy for a long list."""
    index = UnconditionalIndex(ITEMS)
    exclude = rising_exclusions(19, 400, most=most)
    # Some of them by a loop, too.
    found = search_filtered(index, ITEMS, QUERIES, k, exclude)
    assert_same_lists(found, stable_sort(QUERIES, ITEMS, k, exclude))
    for user in range(19):
        one = exclude.take(np.array([user]))
        # With the best of all excluded, too.
        best = np.argsort(-(QUERIES[user] @ ITEMS.T), kind="stable")[:2].astype(np.int32)
        for lists in (one, Ragged.one(np.unique(np.append(one.values, best)).astype(np.int32))):
            found = search_filtered(index, ITEMS, QUERIES[user : user + 1], k, lists)
            expected = stable_sort(QUERIES[user : user + 1], ITEMS, k, lists)
            assert_same_lists(found, expected)


@pytest.fixture(scope="module")
def approximate():
    """A tree over 3,000 items, its vectors, and user vectors."""
    pytest.importorskip("scann.scann_ops.py.scann_ops_pybind", reason="scann has no wheel here")
    users, items = clustered_vectors(300, 3_000)
    config = RetrievalConfig(index="scann_tree", target_recall=0.95)
    return build_index(items, config, normalized=True, queries=users), items, users


@pytest.mark.parametrize("most", [0, 5, 60])
@pytest.mark.parametrize("share", [None, 0.6])
def test_each_of_several_gets_the_list_that_it_gets_alone(most, share):
    """Whatever is left out for the others: more of it means more effort, and another list."""
    index = ShallowIndex(ITEMS)
    rng = np.random.default_rng(6)
    # Some with equally many, some with none.
    lengths = rng.integers(0, most + 1, 19)
    lists = [rng.choice(400, length, replace=False) for length in lengths.tolist()]
    exclude = Ragged(np.cumsum([0, *lengths]), np.concatenate(lists).astype(np.int32))
    allowed = AllowedRows.from_mask(rng.random(400) < share) if share else None
    found = search_filtered(index, ITEMS, QUERIES, 10, exclude, allowed=allowed, each_as_alone=True)
    differs = 0
    among_all = search_filtered(index, ITEMS, QUERIES, 10, exclude, allowed=allowed)
    for query in range(19):
        one = exclude.take(np.array([query]))
        alone = search_filtered(index, ITEMS, QUERIES[query : query + 1], 10, one, allowed=allowed)
        assert_same_lists((found[0][query : query + 1], found[1][query : query + 1]), alone)
        differs += (among_all[1][query] != alone[1][0]).any()
    assert (differs > 0) == (most > 0)


@pytest.mark.parametrize("share", [0.001, 0.02, 0.2, 0.7])
def test_an_approximate_index_finds_its_share_of_what_is_allowed(approximate, share):
    """Few allowed items, which are compared one by one; many, for which more is fetched; and items
    where the user never looks."""
    index, items, users = approximate
    anywhere = np.random.default_rng(5).random(len(items)) < share
    least_liked = np.argsort(users.mean(0) @ items.T)[: max(3, int(share * len(items)))]
    far = np.zeros(len(items), bool)
    far[least_liked] = True
    exclude = rising_exclusions(len(users), len(items), most=60)
    for mask in (anywhere, far):
        allowed = AllowedRows.from_mask(mask)
        scores, rows = search_filtered(index, items, users, 10, exclude, allowed=allowed)
        _, truth = stable_sort(users, items, 10, exclude, mask)
        np.testing.assert_array_equal(rows >= 0, truth >= 0)
        assert mask[rows[rows >= 0]].all()
        assert not exclude.contains(np.arange(len(users))[:, None], rows).any()
        assert list_recall(rows, truth) >= 0.95 * (truth >= 0).mean()
        assert (np.diff(scores[rows[:, -1] >= 0], axis=1) <= 0).all()


def test_few_allowed_items_are_not_looked_for_among_all(approximate, monkeypatch):
    index, items, users = approximate
    monkeypatch.setattr(index, "search", lambda *_: pytest.fail("the index was searched"))
    allowed = AllowedRows.from_rows(np.array([5, 17, 80]))
    _, rows = search_filtered(index, items, users[:1], 3, allowed=allowed)
    assert set(rows[0].tolist()) == {5, 17, 80}
    with pytest.raises(QueryError, match="query vector 0 is zero"):
        search_filtered(index, items, users[:1] * 0, 3, allowed=allowed)

"""Exact search against a stable NumPy sort."""

import jax
import numpy as np
import pytest

from tests.index.oracles import assert_same_lists, integer_vectors, rising_exclusions, stable_sort
from twotower.core.arrays import Ragged
from twotower.core.errors import QueryError
from twotower.index import exact, exact_programs
from twotower.index.exact import ExactIndex, top_k
from twotower.kernels import top_k as kernel
from twotower.kernels.top_k import RunningTopK

SCORES = exact_programs._scores
QUERIES = integer_vectors(37, seed=1)
ITEMS = integer_vectors(301, seed=3)


@pytest.fixture
def queries():
    """Queries that a test may change."""
    return QUERIES.copy()


@pytest.mark.parametrize("k", [1, 10, 301, 400])
@pytest.mark.parametrize(
    "backend, item_block", [("cpu", 7), ("cpu", 64), ("cpu", 1000), ("gpu", 64), ("gpu", 1000)]
)
def test_equals_a_stable_sort(backend, k, item_block, monkeypatch):
    """Selecting as on a CPU and as on an accelerator."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    index = ExactIndex(ITEMS, item_block=item_block)
    assert_same_lists(index.search(QUERIES, k), stable_sort(QUERIES, ITEMS, k))


@pytest.mark.parametrize("backend, item_block", [("cpu", 7), ("cpu", 1000), ("gpu", 64)])
def test_excluded_items_never_come_back(backend, item_block, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    # From nobody excluded to all but a few: fewer than k remain for the last queries.
    exclude = rising_exclusions(37, 301, most=305)
    index = ExactIndex(ITEMS, item_block=item_block)
    scores, rows = index.search(QUERIES, 50, exclude=exclude)
    assert_same_lists((scores, rows), stable_sort(QUERIES, ITEMS, 50, exclude))
    assert (rows[-1] == -1).sum() > 0


def test_many_query_blocks_equal_one(monkeypatch):
    whole = top_k(QUERIES, ITEMS, 9)
    sizes = []
    monkeypatch.setattr(exact, "HOST_BLOCK_BYTES", 4 * len(ITEMS) * 5)
    monkeypatch.setattr(
        exact, "RunningTopK", lambda count, k: sizes.append(count) or RunningTopK(count, k)
    )
    assert_same_lists(top_k(QUERIES, ITEMS, 9), whole)
    assert sizes == [5] * 7 + [2]


@pytest.mark.parametrize("item_block", [32, 96, 4_000])
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_a_collapsed_model_gives_the_first_rows_in_order(value, item_block, monkeypatch):
    """All scores alike: every group reaches the threshold, and only the first K may be kept."""
    monkeypatch.setattr(kernel, "MAX_CANDIDATES_PER_RANK", 1)
    items = np.full((3_211, 2), value, np.float32)
    items[3_210] = 9.0
    queries = np.ones((5, 2), np.float32)
    scores, rows = ExactIndex(items, item_block=item_block).search(queries, 7)
    assert rows.tolist() == [[3_210, 0, 1, 2, 3, 4, 5]] * 5
    assert scores.tolist() == [[18.0, *[2 * value] * 6]] * 5
    _, rows = ExactIndex(items[:3_210], item_block=item_block).search(queries, 7)
    assert rows.tolist() == [[0, 1, 2, 3, 4, 5, 6]] * 5


@pytest.mark.parametrize("order", [1, -1])
def test_scores_that_only_rise_or_fall_along_the_corpus(order, monkeypatch):
    """Each block beats the one before, so that the lists so far grow and must be cut; or none
    does."""
    monkeypatch.setattr(kernel, "MAX_CANDIDATES_PER_RANK", 2)
    items = np.arange(1_000, dtype=np.float32)[::order, None] // 3  # three of each score
    queries = np.ones((3, 1), np.float32)
    found = ExactIndex(items, item_block=64).search(queries, 10)
    assert_same_lists(found, stable_sort(queries, items, 10))


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_scores_that_overflow_are_ranked_where_infinite(backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    items = np.zeros((200, 2), np.float32)
    items[150] = (3e38, 3e38)
    items[9] = (1.0, -2.0)
    scores, rows = ExactIndex(items).search(np.array([[1e3, 0.0]], np.float32), 3)
    assert rows.tolist() == [[150, 9, 0]]
    assert scores.tolist() == [[np.inf, 1e3, 0.0]]


@pytest.mark.parametrize("nan", [np.nan, -np.nan])
@pytest.mark.parametrize("backend, count", [("cpu", 201), ("gpu", 203)])
def test_scores_that_are_nan_are_refused(backend, count, nan, monkeypatch):
    """Of either sign: products of finite vectors give either, or infinity, as the processor happens
    to add them up."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(exact_programs, "block_search", exact_programs.block_search.__wrapped__)
    monkeypatch.setattr(
        exact_programs, "_scores", lambda queries, *rest: SCORES(queries, *rest).at[1, 150].set(nan)
    )
    jax.clear_caches()
    with pytest.raises(QueryError, match="overflow float32 to NaN"):
        ExactIndex(np.ones((count, 2))).search(np.ones((3, 2), np.float32), 3)
    jax.clear_caches()


@pytest.mark.parametrize("backend, approximate", [("cpu", 0), ("gpu", 0), ("tpu", 1)])
def test_only_a_tpu_selects_approximately_and_only_when_asked(backend, approximate, monkeypatch):
    calls = []
    select = jax.lax.approx_max_k

    def count_and_select(x, k, **options):
        calls.append(options)
        return select(x, k, **options)

    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax.lax, "approx_max_k", count_and_select)
    scores, _ = ExactIndex(ITEMS, recall_target=0.85).search(QUERIES, 6)
    # The CPU that runs this test selects exactly all the same.
    np.testing.assert_array_equal(scores, stable_sort(QUERIES, ITEMS, 6)[0])
    assert calls == [{"recall_target": 0.85}] * approximate
    ExactIndex(ITEMS).search(QUERIES, 11)
    assert len(calls) == approximate


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_query_that_is_not_finite_is_refused(queries, value):
    queries[3, 1] = value
    with pytest.raises(QueryError, match="query vector 3 is not finite"):
        top_k(queries, ITEMS, 5)


def test_a_zero_query_is_refused_only_where_vectors_are_normalised(queries):
    queries[4] = 0
    with pytest.raises(QueryError, match="query vector 4 is zero"):
        top_k(queries, ITEMS, 5, normalized=True)
    assert top_k(queries, ITEMS, 5)[1][4].tolist() == [0, 1, 2, 3, 4]


def test_arguments_that_cannot_be_searched_with_are_refused():
    with pytest.raises(QueryError, match="4 wide; the items are 5 wide"):
        top_k(QUERIES[:, :4], ITEMS, 5)
    with pytest.raises(ValueError, match="k=0"):
        top_k(QUERIES, ITEMS, 0)
    with pytest.raises(ValueError, match="exclude holds 1 lists for 37 queries"):
        top_k(QUERIES, ITEMS, 5, exclude=Ragged.empty(1))
    with pytest.raises(ValueError, match="recall_target=0"):
        ExactIndex(ITEMS, recall_target=0)
    items = ITEMS.copy()
    items[7, 0] = np.nan
    with pytest.raises(QueryError, match="item vector 7 is not finite"):
        top_k(QUERIES, items, 5)


def test_no_queries_give_no_lists():
    scores, rows = top_k(np.zeros((0, 5)), ITEMS, 3)
    assert scores.shape == rows.shape == (0, 3)

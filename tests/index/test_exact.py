"""Exact search against a stable NumPy sort."""

import jax
import numpy as np
import pytest

from twotower.core.errors import QueryError
from twotower.core.ragged import Ragged
from twotower.index import exact
from twotower.index.exact import ExactIndex, top_k
from twotower.kernels import top_k as kernel
from twotower.kernels.top_k import RunningTopK

SCORES = exact._scores


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
    return rng.integers(-2, 3, (37, 5)).astype(np.float32), rng.integers(-2, 3, (301, 5)).astype(
        np.float32
    )


@pytest.mark.parametrize("k", [1, 10, 301, 400])
@pytest.mark.parametrize(
    "backend, item_block", [("cpu", 7), ("cpu", 64), ("cpu", 1000), ("gpu", 64), ("gpu", 1000)]
)
def test_equals_a_stable_sort(vectors, backend, k, item_block, monkeypatch):
    """Selecting as on a CPU and as on an accelerator."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    queries, items = vectors
    scores, rows = ExactIndex(items, item_block=item_block).search(queries, k)
    expected_scores, expected_rows = oracle(queries, items, k)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(scores, expected_scores)


@pytest.mark.parametrize("backend, item_block", [("cpu", 7), ("cpu", 1000), ("gpu", 64)])
def test_excluded_items_never_come_back(vectors, backend, item_block, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    queries, items = vectors
    rng = np.random.default_rng(2)
    # From nobody excluded to all but two: fewer than k remain for the last queries.
    lists = [rng.permutation(301)[: min(299, 8 * q)] for q in range(len(queries))]
    exclude = Ragged.from_pairs(
        np.repeat(np.arange(37), [len(x) for x in lists]), np.concatenate(lists), num_rows=37
    )
    scores, rows = ExactIndex(items, item_block=item_block).search(queries, 50, exclude=exclude)
    expected_scores, expected_rows = oracle(queries, items, 50, exclude)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(scores, expected_scores)
    assert (rows[-1] == -1).sum() > 0


def test_many_query_blocks_equal_one(vectors, monkeypatch):
    queries, items = vectors
    whole = top_k(queries, items, 9)
    sizes = []
    monkeypatch.setattr(exact, "HOST_BLOCK_BYTES", 4 * len(items) * 5)
    monkeypatch.setattr(
        exact, "RunningTopK", lambda count, k: sizes.append(count) or RunningTopK(count, k)
    )
    for one, many in zip(whole, top_k(queries, items, 9)):
        np.testing.assert_array_equal(one, many)
    assert sizes == [5] * 7 + [2]


@pytest.mark.parametrize("item_block", [32, 96, 4_000])
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_a_collapsed_model_gives_the_first_rows_in_order(value, item_block, monkeypatch):
    """All scores alike: every group reaches the least, and only the first K equals may be kept."""
    monkeypatch.setattr(kernel, "MAX_KEPT", 1)
    items, queries = np.full((3_211, 2), value, np.float32), np.ones((5, 2), np.float32)
    items[3_210] = 9.0
    scores, rows = ExactIndex(items, item_block=item_block).search(queries, 7)
    assert rows.tolist() == [[3_210, 0, 1, 2, 3, 4, 5]] * 5
    assert scores.tolist() == [[18.0, *[2 * value] * 6]] * 5
    assert (
        ExactIndex(items[:3_210], item_block=item_block).search(queries, 7)[1].tolist()
        == [[0, 1, 2, 3, 4, 5, 6]] * 5
    )


@pytest.mark.parametrize("order", [1, -1])
def test_scores_that_only_rise_or_fall_along_the_corpus(order, monkeypatch):
    """Each block beats the one before, so that the lists so far grow and must be cut; or none
    does."""
    monkeypatch.setattr(kernel, "MAX_KEPT", 2)
    items = np.arange(1_000, dtype=np.float32)[::order, None] // 3  # three of each score
    for one, other in zip(
        ExactIndex(items, item_block=64).search(np.ones((3, 1)), 10),
        oracle(np.ones((3, 1)), items, 10),
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_scores_that_overflow_are_ranked_where_infinite(backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    items = np.zeros((200, 2), np.float32)
    items[150], items[9] = (3e38, 3e38), (1.0, -2.0)
    scores, rows = ExactIndex(items).search(np.array([[1e3, 0.0]], np.float32), 3)
    assert rows.tolist() == [[150, 9, 0]] and scores.tolist() == [[np.inf, 1e3, 0.0]]


@pytest.mark.parametrize("nan", [np.nan, -np.nan])
@pytest.mark.parametrize("backend, count", [("cpu", 201), ("gpu", 203)])
def test_scores_that_are_nan_are_refused(backend, count, nan, monkeypatch):
    """Of either sign: products of finite vectors give either, or infinity, as the processor happens
    to add them up."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(exact, "_block_search", exact._block_search.__wrapped__)
    monkeypatch.setattr(
        exact, "_scores", lambda queries, *rest: SCORES(queries, *rest).at[1, 150].set(nan)
    )
    jax.clear_caches()
    with pytest.raises(QueryError, match="overflow float32 to NaN"):
        ExactIndex(np.ones((count, 2))).search(np.ones((3, 2), np.float32), 3)
    jax.clear_caches()


@pytest.mark.parametrize("backend, approximate", [("cpu", 0), ("gpu", 0), ("tpu", 1)])
def test_only_a_tpu_selects_approximately_and_only_when_asked(
    vectors, backend, approximate, monkeypatch
):
    calls, select = [], jax.lax.approx_max_k
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(
        jax.lax,
        "approx_max_k",
        lambda x, k, **options: calls.append(options) or select(x, k, **options),
    )
    queries, items = vectors
    index = ExactIndex(items, recall_target=0.85)
    np.testing.assert_array_equal(
        index.search(queries, 6)[0], oracle(queries, items, 6)[0]
    )  # a CPU does it exactly
    assert calls == [{"recall_target": 0.85}] * approximate
    ExactIndex(items).search(queries, 11)
    assert len(calls) == approximate
    with pytest.raises(ValueError, match="recall_target=0"):
        ExactIndex(items, recall_target=0)


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
        top_k(queries, items, 5, exclude=Ragged.empty(1))
    items[7, 0] = np.nan
    with pytest.raises(QueryError, match="item vector 7 is not finite"):
        top_k(queries, items, 5)


def test_no_queries_give_no_lists(vectors):
    scores, rows = top_k(np.zeros((0, 5)), vectors[1], 3)
    assert scores.shape == rows.shape == (0, 3)

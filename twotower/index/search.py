"""Search of an index that never changes, less what is excluded or not allowed: full lists whenever
enough items exist.

An approximate index knows no conditions: it is asked for more than K, what is not allowed is
dropped, and where a list is then short, or where so few items are allowed that most of what it
finds would be dropped, the allowed items are compared one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from twotower.core.ragged import Ragged
from twotower.index.base import check_queries
from twotower.index.exact import ExactIndex
from twotower.index.int8 import Vectors

OVERFETCH = 1_000  # candidates beyond k at most
SPARE = 1.5  # times the candidates that would do if the allowed items were anywhere
CHEAPER = 4  # times as many allowed items as would be fetched are compared faster than found
COMPARED = 2**24  # scores at once
ROW_BLOCK = 65_536
FEW = 256  # entries of a list that are compared directly


class Allowed(NamedTuple):
    """The rows of an index that may come back.

    Attributes:
        count: how many there are.
        test: rows [...] -> bool [...].
        rows: () -> all of them, rising.
    """

    count: int
    test: Callable[[np.ndarray], np.ndarray]
    rows: Callable[[], np.ndarray]

    @classmethod
    def mask(cls, mask: np.ndarray) -> Allowed:
        """Where `mask` [N] holds."""
        return cls(int(mask.sum()), mask.__getitem__, lambda: np.flatnonzero(mask))

    @classmethod
    def listed(cls, listed: np.ndarray) -> Allowed:
        """The rows `listed`, which rise."""
        return cls(len(listed), lambda rows: np.isin(rows, listed), lambda: listed)


def search_without(
    index: Any,
    vectors: Vectors,
    queries: np.ndarray,
    k: int,
    exclude: Ragged | None = None,
    *,
    allowed: Allowed | None = None,
    last: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The best `k` items that are allowed and not excluded, as `ExactIndex.search` gives them.

    Args:
        index: an `ExactIndex`, a `ScannIndex` or a `GraphIndex`.
        vectors: [N, D], those of the index.
        exclude: for each query, rows that must not come back.
        allowed: the rows that may; all by default.
        last: [N], one more coordinate that the index has behind those of `vectors`, and the queries
            too.
    """
    exclude = Ragged.empty(len(queries)) if exclude is None else exclude
    if isinstance(index, ExactIndex) and allowed is None:
        return index.search(queries, k, exclude=exclude)
    count = index.num_items if allowed is None else allowed.count
    most = int(exclude.lengths.max(initial=0))
    fetched = k + min(most, OVERFETCH)
    if count < index.num_items:
        fetched = int(SPARE * fetched * index.num_items / max(count, 1)) + 1
    if (
        isinstance(index, ExactIndex)
        or fetched > k + 2 * OVERFETCH
        or count <= CHEAPER * fetched < index.num_items
    ):
        checked = check_queries(queries, index.dim, normalized=index.normalized)
        return exact_among(vectors, _rows_of(allowed), checked, k, exclude, last=last)
    scores, rows = index.search(queries, max(1, min(index.num_items, fetched)))
    keep = rows >= 0
    if most:
        keep &= ~_listed(exclude, rows)
    if allowed is not None and len(vectors):  # of an empty corpus there is nothing to test
        keep &= allowed.test(np.maximum(rows, 0))
    if keep[:, :k].all() and keep.shape[1] >= k:  # nearly always
        return scores[:, :k], rows[:, :k]
    order = np.argsort(~keep, axis=1, kind="stable")[:, :k]
    kept = np.take_along_axis(keep, order, axis=1)
    scores = padded(np.where(kept, np.take_along_axis(scores, order, axis=1), -np.inf), k, -np.inf)
    rows = padded(np.where(kept, np.take_along_axis(rows, order, axis=1), -1), k, -1)
    short = np.flatnonzero(kept.sum(1) < k)
    if short.size:
        listed = exclude.take(short).distinct()
        if allowed is not None:
            listed = listed.filter(allowed.test(listed.values))
        short = short[kept.sum(1)[short] < np.minimum(k, count - listed.lengths)]
    if short.size:
        left = exclude.take(short)
        scores[short], rows[short] = exact_among(
            vectors, _rows_of(allowed), queries[short], k, left, last=last
        )
    return scores, rows


def exact_among(
    vectors: Vectors,
    among: np.ndarray | None,
    queries: np.ndarray,
    k: int,
    exclude: Ragged | None = None,
    *,
    last: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The best `k` of the rows `among` (rising; None: all) by NumPy, which compiles nothing; of
    equal scores the lower row first.

    Returns:
        (scores float32 [Q, k], rows int32 [Q, k]); score -inf and row -1 where fewer than k remain.
    """
    queries = np.asarray(queries, np.float32)
    scores, rows = (
        np.full((len(queries), k), -np.inf, np.float32),
        np.full((len(queries), k), -1, np.int32),
    )
    total = len(vectors) if among is None else len(among)
    step = max(1, COMPARED // ROW_BLOCK)
    for start in range(0, len(queries), step):
        part = slice(start, min(start + step, len(queries)))
        skip = None if exclude is None else exclude.take(np.arange(part.start, part.stop))
        for first in range(0, total, ROW_BLOCK):
            stop = min(first + ROW_BLOCK, total)
            block = np.arange(first, stop) if among is None else among[first:stop]
            found = (
                queries[part, : vectors.shape[1]]
                @ (vectors[first:stop] if among is None else vectors[block]).T
            )
            if last is not None:
                found += queries[part, -1:] * last[block][None, :]
            if skip is not None:
                _drop(found, block, skip)
            scores[part], rows[part] = merge(scores[part], rows[part], found, block, k)
    return scores, rows


def merge(
    scores: np.ndarray, rows: np.ndarray, more: np.ndarray, more_rows: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The best `k` of two sets of items for each query; of equal scores the lower row first.

    Args:
        scores, rows: [Q, k], a list so far; a score of -inf is no item.
        more: [Q, M], scores of the items `more_rows` [M]; likewise.
    """
    least = scores[:, -1]
    if np.isneginf(least).any() and more.shape[1] > k:
        at = more.shape[1] - k
        least = np.maximum(least, np.partition(more, at, axis=1)[:, at])
    # All that equal the k-th are looked at, so that rows break ties and not the place where a
    # partition left them.
    query, column = np.nonzero((more >= least[:, None]) & ~np.isneginf(more))
    known, place = np.nonzero(~np.isneginf(scores))
    queries = np.concatenate([known, query])
    values = np.concatenate([scores[known, place], more[query, column]])
    items = np.concatenate([rows[known, place], more_rows[column]])
    order = np.lexsort((items, -values, queries))
    queries = queries[order]
    rank = np.arange(len(order)) - np.searchsorted(queries, np.arange(len(scores)))[queries]
    order, queries, rank = order[rank < k], queries[rank < k], rank[rank < k]
    best, best_rows = (
        np.full((len(scores), k), -np.inf, np.float32),
        np.full((len(scores), k), -1, rows.dtype),
    )
    best[queries, rank], best_rows[queries, rank] = values[order], items[order]
    return best, best_rows


def padded(array: np.ndarray, k: int, value: float) -> np.ndarray:
    """`array` [Q, <= k] as [Q, k]."""
    return (
        array
        if array.shape[1] == k
        else np.pad(array, ((0, 0), (0, k - array.shape[1])), constant_values=value)
    )


def _listed(lists: Ragged, rows: np.ndarray) -> np.ndarray:
    """Which of the rows [Q, M] stand in the list of their query."""
    if len(lists) == 1 and len(lists.values) <= FEW:
        return (rows[0, :, None] == lists.values[None, :]).any(1)[None, :]
    return lists.contains(np.arange(len(rows))[:, None], rows)


def _rows_of(allowed: Allowed | None) -> np.ndarray | None:
    return None if allowed is None else allowed.rows()


def _drop(scores: np.ndarray, block: np.ndarray, exclude: Ragged) -> None:
    """Takes the excluded rows out of the scores [Q, len(block)] of the rows `block`, which rise."""
    place = np.searchsorted(block, exclude.values)
    inside = (place < len(block)) & (block[np.minimum(place, len(block) - 1)] == exclude.values)
    scores[exclude.rows[inside], place[inside]] = -np.inf

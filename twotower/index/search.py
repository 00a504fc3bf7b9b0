"""Filtered search: the best items of an index that are allowed and not excluded.

An approximate index knows no conditions: more than K items are fetched from it, and those that are
not allowed are dropped. Where a list is then short, or where so few items are allowed that most of
what is found would be dropped, the allowed items are compared one by one. Lists are full whenever
enough items exist.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import ArrayLike

from twotower.core.arrays import Ragged
from twotower.index.base import Index, ShardedIndex, check_queries, check_scores, list_length
from twotower.index.exact import ExactIndex
from twotower.index.vectors import Vectors
from twotower.kernels.top_k import RunningTopK

# Candidates beyond k that are fetched on account of exclusions. A user with more of them may get a
# short list, which is then made again by comparing all items.
MAX_OVERFETCH = 1_000
# Times the candidates that would do if the allowed items were spread evenly over the corpus.
OVERFETCH_FACTOR = 1.5
# Up to this ratio of allowed items to candidates, comparing them all is faster than searching.
BRUTE_FORCE_FACTOR = 4
MAX_BLOCK_SCORES = 2**24  # scores held at once: 64 MiB of float32
ROW_BLOCK = 65_536  # rows compared at once
MAX_COMPARED_EXCLUSIONS = 256  # exclusions of a single query that are compared one by one
MAX_LOOPED = 256  # length of a list that a loop of Python fills
MAX_LOOPED_LISTS = 64  # such lists of one call


@dataclasses.dataclass(frozen=True)
class AllowedRows:
    """The rows of an index that may come back.

    Attributes:
        count: Number of them.
        contains: Function from rows [...] to bool [...], whether each is allowed.
        list_rows: Function that returns all of them, rising.
    """

    # Functions, not a mask of the corpus: most answers look at some K rows of it.

    count: int
    contains: Callable[[np.ndarray], np.ndarray]
    list_rows: Callable[[], np.ndarray]

    @classmethod
    def from_mask(cls, mask: np.ndarray) -> AllowedRows:
        """Returns the rows where `mask`, bool [N], holds."""
        return cls(int(mask.sum()), mask.__getitem__, lambda: np.flatnonzero(mask))

    @classmethod
    def from_rows(cls, allowed: np.ndarray) -> AllowedRows:
        """Returns the given rows, which rise."""
        # A look-up among few rows costs less than making a mask of N.
        return cls(len(allowed), lambda rows: np.isin(rows, allowed), lambda: allowed)


def search_filtered(
    index: Index,
    vectors: Vectors,
    queries: np.ndarray,
    k: int,
    exclude: Ragged | None = None,
    *,
    allowed: AllowedRows | None = None,
    extra_coordinate: np.ndarray | None = None,
    each_as_alone: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the best `k` items that are allowed and not excluded, as `ExactIndex.search` does.

    Args:
        index: Index over the vectors.
        vectors: float [N, D], vectors of the index.
        queries: float [Q, D], or [Q, D + 1] with an extra coordinate.
        k: Length of the lists.
        exclude: Rows that must not come back, one list a query.
        allowed: Rows that may come back; all by default.
        extra_coordinate: float [N], one more coordinate that the index has behind those of
            `vectors`.
        each_as_alone: Whether each list is that which its query gets alone, with the effort that is
            due to its own exclusions; by default all queries get that of the most.

    Returns:
        (scores float32 [Q, L], rows int32 [Q, L]), where L is `k`, or the number of items if that
        is less; score -inf and row -1 where fewer than L items remain.

    Raises:
        QueryError, ConfigError: As `ExactIndex.search`.
    """
    k = list_length(k, index.num_items)
    if exclude is None:
        exclude = Ragged.empty(len(queries))
    # Exact search takes exclusions itself: nothing is fetched in vain.
    is_exact = takes_exclusions(index)
    if is_exact and allowed is None:
        return index.search(queries, max(1, k), exclude=exclude)
    if each_as_alone and len(queries) > 1:
        return _search_each(
            index, vectors, queries, k, exclude, allowed=allowed, extra_coordinate=extra_coordinate
        )
    num_allowed = index.num_items
    if allowed is not None:
        num_allowed = allowed.count
    # One length for all queries, which an index searches together.
    max_excluded = exclude.longest
    fetched = _num_fetched(index.num_items, num_allowed, k, max_excluded)
    # Too many candidates to fetch, or few enough allowed items to compare them all.
    is_wide = fetched > k + 2 * MAX_OVERFETCH
    is_narrow = num_allowed <= BRUTE_FORCE_FACTOR * fetched < index.num_items
    if is_exact or is_wide or is_narrow:
        queries = check_queries(queries, index.dim, normalized=index.normalized)
        among = _allowed_list(allowed)
        return brute_force_search(
            vectors, among, queries, k, exclude, extra_coordinate=extra_coordinate
        )
    scores, rows = index.search(queries, max(1, min(index.num_items, fetched)))
    # The requests of a server: users with usual histories.
    is_usual = allowed is None and 0 < max_excluded <= MAX_OVERFETCH
    found = _first_lists(scores, rows, exclude, k) if is_usual else None
    if found is not None:
        return found
    keep = _may_come_back(rows, exclude if max_excluded else None, allowed)
    if keep.shape[1] >= k and keep[:, :k].all():  # nearly always: no list has to be packed
        return scores[:, :k], rows[:, :k]
    scores, rows, lengths = _drop(scores, rows, keep, k)
    short = np.flatnonzero(lengths < k)
    # A list that holds all there is is not short, and not worth a comparison with every item.
    if short.size:
        available = num_allowed - _count_excluded(exclude.take(short), allowed)
        short = short[lengths[short] < np.minimum(k, available)]
    if short.size:
        among = _allowed_list(allowed)
        scores[short], rows[short] = brute_force_search(
            vectors,
            among,
            queries[short],
            k,
            exclude.take(short),
            extra_coordinate=extra_coordinate,
        )
    return scores, rows


def _search_each(
    index: Index, vectors: Vectors, queries: np.ndarray, k: int, exclude: Ragged, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Returns what `search_filtered` returns for each query alone."""
    lengths = exclude.lengths
    # The same effort for all of them, which are searched at once.
    if (lengths == lengths[0]).all():
        return search_filtered(index, vectors, queries, k, exclude, **options)
    found = [
        search_filtered(
            index, vectors, queries[query : query + 1], k, Ragged.one(exclude[query]), **options
        )
        for query in range(len(queries))
    ]
    return (
        np.concatenate([scores for scores, _ in found]),
        np.concatenate([rows for _, rows in found]),
    )


def _may_come_back(
    rows: np.ndarray, exclude: Ragged | None, allowed: AllowedRows | None
) -> np.ndarray:
    """Marks the rows [Q, M] that were found, are not excluded and are allowed: bool [Q, M]."""
    keep = rows >= 0
    # Each test is skipped where nothing can fail it: half of an answer was such overhead.
    if exclude is not None:
        keep &= ~_is_excluded(exclude, rows)
    if allowed is not None and rows.size:  # of an empty corpus there is nothing to test
        # Row 0 in the place of -1, which would be the last; `keep` is false there already.
        keep &= allowed.contains(np.maximum(rows, 0))
    return keep


def takes_exclusions(index: Index) -> TypeGuard[ExactIndex | ShardedIndex]:
    """Whether an index compares all items, and can leave some of them out."""
    return isinstance(index, ExactIndex) or (isinstance(index, ShardedIndex) and index.is_exact)


def _num_fetched(num_items: int, num_allowed: int, k: int, max_excluded: int) -> int:
    """Returns the number of candidates to fetch, so that `k` are probably left of them."""
    fetched = k + min(max_excluded, MAX_OVERFETCH)
    if num_allowed == num_items:
        return fetched
    # As if allowed items were spread evenly over the lists, and some more, for they are not.
    share = OVERFETCH_FACTOR * fetched * num_items / max(num_allowed, 1)
    return int(share) + 1


def _allowed_list(allowed: AllowedRows | None) -> np.ndarray | None:
    if allowed is None:
        return None
    return allowed.list_rows()


def brute_force_search(
    vectors: Vectors,
    among: np.ndarray | None,
    queries: ArrayLike,
    k: int,
    exclude: Ragged | None = None,
    *,
    extra_coordinate: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the best `k` of some rows; of equal scores the lower row comes first.

    By NumPy, which compiles nothing: the number of allowed rows differs from answer to answer.

    Args:
        vectors: float [N, D].
        among: Rows to compare, rising; None compares all.
        queries: float [Q, D], or [Q, D + 1] with an extra coordinate.
        k: Length of the lists.
        exclude: Rows that must not come back, one list a query.
        extra_coordinate: float [N], a coordinate behind those of `vectors`.

    Returns:
        (scores float32 [Q, L], rows int32 [Q, L]), where L is `k`, or the number of items if that
        is less; score -inf and row -1 where fewer than L remain.

    Raises:
        QueryError: A score overflows.
    """
    queries = np.asarray(queries, np.float32)
    k = min(k, len(vectors))
    # Lists of more items than are compared end in these.
    scores = np.full((len(queries), k), -np.inf, np.float32)
    rows = np.full((len(queries), k), -1, np.int32)
    total = len(vectors)
    if among is not None:
        total = len(among)
    step = max(1, MAX_BLOCK_SCORES // ROW_BLOCK)
    for start in range(0, len(queries), step):
        stop = min(start + step, len(queries))
        lists = None
        if exclude is not None:
            lists = exclude.take(np.arange(start, stop))
        best = RunningTopK(stop - start, k)
        for first in range(0, total, ROW_BLOCK):
            last = min(first + ROW_BLOCK, total)
            # A slice of all vectors is a view; chosen rows are copied.
            if among is None:
                block = np.arange(first, last)
                block_vectors = vectors[first:last]
            else:
                block = among[first:last]
                block_vectors = vectors[block]
            products = queries[start:stop, : vectors.shape[1]] @ block_vectors.T
            # Added, not appended to the vectors: that would copy the corpus for each answer.
            if extra_coordinate is not None:
                products += queries[start:stop, -1:] * extra_coordinate[block][None, :]
            if lists is not None:
                _exclude(products, block, lists)
            check_scores(products)
            best.add(products, first)
        best_scores, positions = best.best()
        length = best_scores.shape[1]
        scores[start:stop, :length] = best_scores
        # Positions among the compared rows become rows of the index.
        if among is not None and length:
            positions = np.where(positions < 0, -1, among[positions])
        rows[start:stop, :length] = positions
    return scores, rows


def _first_lists(
    scores: np.ndarray, rows: np.ndarray, exclude: Ragged, k: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns the first `k` of each list that are not excluded; None where that is left to NumPy.

    Args:
        scores: Scores of the lists, float32 [Q, M].
        rows: Rows, int32 [Q, M]; -1 where none was found.
        exclude: Rows that must not come back, one list a query.
        k: Length of the lists.
    """
    # By NumPy where they are long or many, and where one of them is too short.
    if k > MAX_LOOPED or len(rows) > MAX_LOOPED_LISTS:
        return None
    if len(rows) == 1:
        kept = _first_kept(rows[0], exclude.values, k)
        return None if kept is None else (scores[:, kept], rows[:, kept])
    chosen_scores = []
    chosen_rows = []
    for query, found in enumerate(rows):
        kept = _first_kept(found, exclude[query], k)
        if kept is None:
            return None
        chosen_scores.append(scores[query, kept])
        chosen_rows.append(found[kept])
    return np.array(chosen_scores), np.array(chosen_rows)


def _first_kept(rows: np.ndarray, excluded: np.ndarray, k: int) -> list[int] | slice | None:
    """Returns the positions of the first `k` rows that are filled and not excluded.

    Args:
        rows: Rows of one list, int [M]; -1 where none was found.
        excluded: Rows that must not come back, int [E].
        k: Number of positions.

    Returns:
        A slice where they are the first ones, which is a view and no copy; None where there are
        fewer.
    """
    first = rows[:k].tolist()
    numbers = excluded.tolist()
    # Most of what is found first was not seen. A set of the fewer: making one takes longer than
    # looking into it. A list that is not filled ends in -1.
    if len(first) == k and first[-1] >= 0 and set(first).isdisjoint(numbers):
        return slice(k)
    # By a set and a loop that ends early: a fifth of the time of NumPy's calls for so few.
    out = set(numbers)
    positions = []
    for position, row in enumerate(rows.tolist()):
        if row < 0 or row in out:
            continue
        positions.append(position)
        if len(positions) == k:
            return positions
    return None


def _drop(
    scores: np.ndarray, rows: np.ndarray, keep: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the first `k` entries to keep of each list, padded, and the number of them."""
    if len(keep) == 1:  # of one query the entries to keep are one list
        found = np.flatnonzero(keep[0])[:k]
        if len(found) == k:
            return scores[:, found], rows[:, found], np.array([k])
    # Stable: those to keep come first, and stay in the order of their scores.
    order = np.argsort(~keep, axis=1, kind="stable")[:, :k]
    kept = np.take_along_axis(keep, order, axis=1)
    best = np.where(kept, np.take_along_axis(scores, order, axis=1), -np.inf)
    best_rows = np.where(kept, np.take_along_axis(rows, order, axis=1), -1)
    return _pad_lists(best, k, -np.inf), _pad_lists(best_rows, k, -1), kept.sum(1)


def _pad_lists(lists: np.ndarray, k: int, value: float) -> np.ndarray:
    """Returns lists [Q, <= k], padded with `value` to [Q, k]."""
    missing = k - lists.shape[1]
    if not missing:
        return lists
    return np.pad(lists, ((0, 0), (0, missing)), constant_values=value)


def _is_excluded(exclude: Ragged, rows: np.ndarray) -> np.ndarray:
    """Marks the rows [Q, M] that stand in the list of their query: bool [Q, M]."""
    # For one user with a usual history, all pairs cost less than a search among sorted keys.
    if len(exclude) == 1 and len(exclude.values) <= MAX_COMPARED_EXCLUSIONS:
        return (rows[0, :, None] == exclude.values[None, :]).any(1)[None, :]
    return exclude.contains(np.arange(len(rows))[:, None], rows)


def _count_excluded(exclude: Ragged, allowed: AllowedRows | None) -> np.ndarray:
    """Returns int [Q], the number of allowed rows that each query excludes."""
    # An item that is listed twice is missing once.
    exclude = exclude.distinct()
    if allowed is not None:
        exclude = exclude.filter(allowed.contains(exclude.values))
    return exclude.lengths


def _exclude(scores: np.ndarray, rows: np.ndarray, exclude: Ragged) -> None:
    """Sets the scores [Q, M] of the rows [M], which rise, to -inf where a query excludes them."""
    column = np.searchsorted(rows, exclude.values)
    # A row beyond the last would be looked for behind the end.
    nearest = rows[np.minimum(column, len(rows) - 1)]
    inside = (column < len(rows)) & (nearest == exclude.values)
    scores[exclude.rows[inside], column[inside]] = -np.inf

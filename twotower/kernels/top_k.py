"""The best K of many scores on a host, by NumPy: selection, and merging of lists.

The plain reference is a stable `np.argsort`; everything here returns the same items in the same
order, and so does `twotower.kernels.device_top_k` on a device. Both fast forms rest on one fact.
Divide the scores of a query into groups of neighbours and take the maximum of each: at least K
scores are as good as the K-th greatest maximum, so that no group below it holds one of the best K.
Of most scores only the maxima of their groups are ever compared.
"""

from __future__ import annotations

import numpy as np

# Scores in a group, the first size that fits. Pad a row to a multiple of GROUP to get large groups.
GROUP_SIZES = (32, 16, 8, 4, 2)
GROUP = GROUP_SIZES[0]
# A list of candidates is cut to the best K when it is longer than this many times K: sorting after
# every block would cost more than the blocks.
MAX_CANDIDATES_PER_RANK = 8
# Scores of a block, of all queries, that are sorted as they are: looking for the best among so few
# takes longer.
MAX_SCORES_TO_SORT = 2_048
MIN_SCORES_TO_PACK = 2**10  # scores of all queries, from which sorting packed numbers is quicker
MIN_SCORES_TO_GROUP = 2**15  # scores of a block, of all queries, from which groups save time


def merge_top_k(k: int, scores: np.ndarray, *columns: np.ndarray) -> tuple[np.ndarray, ...]:
    """Merges lists of scored items into the best `k`.

    The lists of a query stand one after another. Of equal scores the earlier one comes first, so
    that lists in the order of their rows leave the lower row first.

    Args:
        k: Greatest length of the merged list.
        scores: float [B, M]; not NaN.
        columns: Arrays [B, M] of what stands beside each score, such as rows.

    Returns:
        The scores [B, <= k], best first, and the columns in the same order.

    >>> scores, rows = merge_top_k(2, np.array([[3.0, 1.0, 3.0, 2.0]]), np.array([[0, 4, 7, 9]]))
    >>> rows.tolist()
    [[0, 7]]
    """
    order = _falling_order(scores)[:, :k]
    return tuple(np.take_along_axis(x, order, axis=1) for x in (scores, *columns))


def _falling_order(scores: np.ndarray) -> np.ndarray:
    """Returns the columns of scores [B, M] from the best to the worst, equals in their order."""
    if scores.dtype != np.float32 or scores.size < MIN_SCORES_TO_PACK:
        return np.argsort(-scores, axis=1, kind="stable")
    # A number that rises as the score falls, before the column: numbers are distinct then, and
    # NumPy's vectorised sort of them takes a tenth of a stable one. 0 and -0 are equal.
    bits = (np.float32(0.0) - scores).view(np.int32)
    falling = np.where(bits < 0, bits ^ np.int32(2**31 - 1), bits)
    packed = falling.astype(np.int64)
    packed <<= 32
    packed |= np.arange(scores.shape[1])
    packed.sort(axis=1)
    return packed & (2**32 - 1)


def group_size(count: int, k: int) -> int:
    """Returns the number of scores in a group: a divisor of `count` that leaves at least twice as
    many groups as the list is long, or 1."""
    fitting = (size for size in GROUP_SIZES if count % size == 0 and count >= 2 * k * size)
    return next(fitting, 1)


def with_maxima(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns scores [Q, C], padded with -inf to whole groups, and the maxima of the groups.

    Where groups would save nothing, both are the scores.
    """
    if scores.size < MIN_SCORES_TO_GROUP:
        return scores, scores
    padding = -scores.shape[1] % GROUP
    size = group_size(scores.shape[1] + padding, k)
    if size == 1:
        return scores, scores
    if padding:
        scores = np.pad(scores, ((0, 0), (0, padding)), constant_values=-np.inf)
    maxima = scores
    # By halves: three to five times as fast as NumPy's maximum along a short axis.
    for _ in range(size.bit_length() - 1):
        maxima = np.maximum(maxima[:, ::2], maxima[:, 1::2])
    return scores, maxima


class RunningTopK:
    """The best `k` scores of each of Q queries, kept while blocks of scores come in.

    Runs on the host, by NumPy: several times as fast as `jax.lax.top_k` on a CPU. Blocks come in
    the order of their rows; of equal scores the lower row is kept. A score of -inf is no item, and
    no score may be NaN.
    """

    def __init__(self, queries: int, k: int):
        self._k = k
        # More than K candidates, unsorted, which `_append` cuts to K now and then.
        self._scores = np.zeros((queries, 0), np.float32)
        self._rows = np.zeros((queries, 0), np.int32)

    def add_lists(self, scores: np.ndarray, rows: np.ndarray) -> None:
        """Adds lists that were selected elsewhere.

        Args:
            scores: float32 [Q, M], best first.
            rows: int [Q, M], rows of the scores.
        """
        self._append(scores, rows)

    def add(self, scores: np.ndarray, first: int, maxima: np.ndarray | None = None) -> None:
        """Adds the scores of a block of rows.

        Args:
            scores: float32 [Q, C] of the rows from `first` on, which lie above all rows so far.
            first: Row of the first column.
            maxima: float32 [Q, C / size], the maxima of groups of `size` neighbours, if they are
                known.
        """
        if not scores.shape[1]:
            return
        if maxima is None and scores.size <= MAX_SCORES_TO_SORT:
            rows = np.arange(first, first + scores.shape[1])
            # Excluded items have -inf, and must not come back with a row.
            self._append(scores, np.where(np.isneginf(scores), -1, rows))
            return
        if maxima is None:
            scores, maxima = with_maxima(scores, self._k)
        count = scores.shape[1]
        num_groups = maxima.shape[1]
        size = count // num_groups
        thresholds = self._thresholds(maxima)
        # Of all queries at once, numbered through: one pass of NumPy instead of a loop over
        # queries.
        groups = np.flatnonzero(maxima >= thresholds[:, None])
        members = scores.reshape(-1, size)[groups]
        # Ascending, hence by query and, within a query, by row: `_first_equals` and `_as_lists`
        # need that.
        kept = np.flatnonzero(members >= thresholds[groups // num_groups][:, None])
        group = groups[kept // size]
        query = group // num_groups
        values = members.ravel()[kept]
        # Positions in the flattened block, of which each query has `count`.
        rows = group * size + kept % size - query * count + first
        # Only then: most blocks leave few candidates, and need no search for equals.
        if len(kept) > MAX_CANDIDATES_PER_RANK * self._k * len(scores):
            needed = self._first_equals(thresholds, query, values)
            query = query[needed]
            values = values[needed]
            rows = rows[needed]
        self._append(*self._as_lists(query, values, rows))

    def best(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the lists so far, best first: scores float32 [Q, <= k] and rows int [Q, <= k];
        score -inf and row -1 after the last of a query."""
        scores, rows = merge_top_k(self._k, self._scores, self._rows)
        return scores, rows

    def _thresholds(self, maxima: np.ndarray) -> np.ndarray:
        """Returns lower bounds of the K-th best scores, float32 [Q]: K scores are as good, in the
        block or in the lists so far."""
        # Above -inf, which is no item.
        thresholds = np.full(len(maxima), np.finfo(np.float32).min)
        for scores in (self._scores, maxima):
            if scores.shape[1] >= self._k:
                at = scores.shape[1] - self._k
                # A partition is linear in the row, and the order within is of no use here.
                kth_best = np.partition(scores, at, axis=1)[:, at]
                thresholds = np.maximum(thresholds, kth_best)
        return thresholds

    def _first_equals(
        self, thresholds: np.ndarray, query: np.ndarray, values: np.ndarray
    ) -> np.ndarray:
        """Returns a mask [M] that leaves at most K candidates of each query at its threshold, the
        first ones."""
        # A collapsed model gives all items one score: without this all would be kept.
        equal = values == thresholds[query]
        equals_before = np.concatenate([[0], np.cumsum(equal)])
        starts = np.searchsorted(query, np.arange(len(thresholds)))
        # Number of each candidate among the equals of its query, from 1.
        number = equals_before[1:] - equals_before[starts][query]
        return ~equal | (number <= self._k)

    def _as_lists(
        self, query: np.ndarray, values: np.ndarray, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns candidates [M], sorted by query, as lists [Q, length of the longest]; score -inf
        and row -1 after the last of each."""
        lengths = np.bincount(query, minlength=len(self._scores))
        starts = np.cumsum(lengths) - lengths
        column = np.arange(len(query)) - starts[query]
        shape = (len(self._scores), int(lengths.max(initial=0)))
        scores = np.full(shape, -np.inf, np.float32)
        scores[query, column] = values
        listed = np.full(shape, -1, np.int32)
        listed[query, column] = rows
        return scores, listed

    def _append(self, scores: np.ndarray, rows: np.ndarray) -> None:
        """Appends candidates, whose rows lie above all so far: a stable sort leaves equals in the
        order of their rows."""
        if self._scores.shape[1]:
            scores = np.concatenate([self._scores, scores], axis=1)
            rows = np.concatenate([self._rows, rows], axis=1)
        # The first candidates are kept without a copy: a single query over one block has no others.
        self._scores = scores
        self._rows = rows
        if self._scores.shape[1] > MAX_CANDIDATES_PER_RANK * self._k:
            self._scores, self._rows = self.best()

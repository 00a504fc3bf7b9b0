"""The best K of many scores: selection on an accelerator, selection on a host, and merging.

The plain references are `jax.lax.top_k` and a stable `np.argsort`; everything here returns the same
items in the same order. Both fast forms rest on one fact. Divide the scores of a query into groups
of neighbours and take the maximum of each: at least K scores are as good as the K-th greatest
maximum, so that no group below it holds one of the best K. Of most scores nothing but the maxima of
their groups is ever looked at.
"""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# Arrays of the host or of a device.
ArrayT = TypeVar("ArrayT", np.ndarray, jax.Array)

# Scores in a group, the first size that fits. Pad a row to a multiple of GROUP to get large groups.
GROUP_SIZES = (32, 16, 8, 4, 2)
GROUP = GROUP_SIZES[0]
# A list of candidates is cut to the best K when it is longer than this many times K: sorting after
# every block would cost more than the blocks.
MAX_CANDIDATES_PER_RANK = 8
# Scores of a block, of all queries, that are sorted as they are: looking for the best among so few
# takes longer.
MAX_SCORES_TO_SORT = 2_048
MIN_SCORES_TO_GROUP = 2**15  # scores of a block, of all queries, from which groups save time


def merge_top_k(k: int, scores: ArrayT, *columns: ArrayT) -> tuple[ArrayT, ...]:
    """Merges lists of scored items into the best `k`.

    The lists of a query stand one after another. Of equal scores the earlier one comes first, so
    that lists in the order of their rows leave the lower row first.

    Args:
        k: length of the merged list, which is shorter where fewer scores are given.
        scores: float [B, M], of NumPy or JAX; not NaN.
        columns: arrays [B, M] of what stands beside each score, such as rows.

    Returns:
        The scores [B, <= k], best first, and the columns in the same order.

    >>> scores, rows = merge_top_k(2, np.array([[3.0, 1.0, 3.0, 2.0]]), np.array([[0, 4, 7, 9]]))
    >>> rows.tolist()
    [[0, 7]]
    """
    if isinstance(scores, np.ndarray):
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return tuple(np.take_along_axis(x, order, axis=1) for x in (scores, *columns))
    best, order = jax.lax.top_k(scores, min(k, scores.shape[1]))
    return best, *(jnp.take_along_axis(x, order, axis=1) for x in columns)


def select_top_k(
    scores: Float[Array, "B N"], k: int
) -> tuple[Float[Array, "B K"], Int[Array, "B K"]]:
    """Selects the best `k` of each row, and their positions, as `jax.lax.top_k` does.

    Many times as fast on an accelerator where rows are long and lists short: XLA sorts the row that
    it is given, and this gives it the maxima of groups first, then the K best groups. Of equal
    maxima the first groups are taken, since each holds a score as good on a lower row.
    """
    # Groups are used only while at most a fourth of the row has to be looked at twice.
    fitting = (size for size in GROUP_SIZES if scores.shape[1] >= 4 * k * size)
    size = next(fitting, 1)
    if size == 1:
        best, positions = jax.lax.top_k(scores, k)
        return best, positions
    padding = -scores.shape[1] % size
    filled = jnp.pad(scores, ((0, 0), (0, padding)), constant_values=-jnp.inf)
    maxima = filled.reshape(len(scores), -1, size).max(-1)
    _, groups = select_top_k(maxima, k)
    # Back in the order of the row: of equal scores the lower position must stay first.
    groups = jnp.sort(groups, axis=1)
    positions = groups[:, :, None] * size + jnp.arange(size)[None, None]
    positions = positions.reshape(len(scores), -1)
    candidates = jnp.take_along_axis(scores, positions, axis=1, mode="fill", fill_value=-jnp.inf)
    best, order = jax.lax.top_k(candidates, k)
    return best, jnp.take_along_axis(positions, order, axis=1)


def group_size(count: int, k: int) -> int:
    """Returns how many of `count` scores a group has: a divisor of `count` that leaves at least
    twice as many groups as the list is long, or 1."""
    fitting = (size for size in GROUP_SIZES if count % size == 0 and count >= 2 * k * size)
    return next(fitting, 1)


def _with_maxima(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns scores [Q, C], padded with -inf to whole groups, and the maxima of the groups; the
    scores themselves where groups would save nothing."""
    if scores.size < MIN_SCORES_TO_GROUP or scores.shape[1] < 2 * k * GROUP:
        return scores, scores
    padding = -scores.shape[1] % GROUP
    if padding:
        scores = np.pad(scores, ((0, 0), (0, padding)), constant_values=-np.inf)
    maxima = scores
    # By halves: three to five times as fast as NumPy's maximum along a short axis.
    for _ in range(GROUP.bit_length() - 1):
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
        self._scores = np.zeros((queries, 0), np.float32)
        self._rows = np.zeros((queries, 0), np.int32)

    def add_lists(self, scores: np.ndarray, rows: np.ndarray) -> None:
        """Adds lists of the best that were found elsewhere.

        Args:
            scores: float32 [Q, M], best first.
            rows: int [Q, M], their rows.
        """
        self._append(scores, rows)

    def add(self, scores: np.ndarray, first: int, maxima: np.ndarray | None = None) -> None:
        """Adds the scores of a block of rows.

        Args:
            scores: float32 [Q, C] of the rows from `first` on, which lie above all rows so far.
            first: row of the first column.
            maxima: float32 [Q, C / size], the maxima of groups of `size` neighbours, where they are
                known.
        """
        if not scores.shape[1]:
            return
        if maxima is None and scores.size <= MAX_SCORES_TO_SORT:
            rows = np.arange(first, first + scores.shape[1])
            self._append(scores, np.where(np.isneginf(scores), -1, rows))
            return
        if maxima is None:
            scores, maxima = _with_maxima(scores, self._k)
        count = scores.shape[1]
        num_groups = maxima.shape[1]
        size = count // num_groups
        thresholds = self._thresholds(maxima)
        groups = np.flatnonzero(maxima >= thresholds[:, None])
        members = scores.reshape(-1, size)[groups]
        kept = np.flatnonzero(members >= thresholds[groups // num_groups][:, None])
        group = groups[kept // size]
        query = group // num_groups
        values = members.ravel()[kept]
        # Positions in the flattened block, of which each query has `count`.
        rows = group * size + kept % size - query * count + first
        if len(kept) > MAX_CANDIDATES_PER_RANK * self._k * len(scores):
            needed = self._first_equals(thresholds, query, values)
            query, values, rows = query[needed], values[needed], rows[needed]
        self._append(*self._as_lists(query, values, rows))

    def best(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the lists so far, best first: scores float32 [Q, <= k] and rows int [Q, <= k];
        score -inf and row -1 where a query has fewer."""
        scores, rows = merge_top_k(self._k, self._scores, self._rows)
        return scores, rows

    def _thresholds(self, maxima: np.ndarray) -> np.ndarray:
        """Returns scores float32 [Q] that the K-th best is not below: K scores are as good, in the
        block or in the lists so far."""
        thresholds = np.full(len(maxima), np.finfo(np.float32).min)  # above -inf, which is no item
        for scores in (self._scores, maxima):
            if scores.shape[1] >= self._k:
                at = scores.shape[1] - self._k
                kth_best = np.partition(scores, at, axis=1)[:, at]
                thresholds = np.maximum(thresholds, kth_best)
        return thresholds

    def _first_equals(
        self, thresholds: np.ndarray, query: np.ndarray, values: np.ndarray
    ) -> np.ndarray:
        """Returns bool [M], false for candidates that equal the threshold and are not among the
        first K of their query that do. A collapsed model gives all items one score: all would be
        kept."""
        equal = values == thresholds[query]
        equals_before = np.concatenate([[0], np.cumsum(equal)])
        starts = np.searchsorted(query, np.arange(len(thresholds)))
        number = equals_before[1:] - equals_before[starts][query]
        return ~equal | (number <= self._k)

    def _as_lists(
        self, query: np.ndarray, values: np.ndarray, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns candidates [M], which are sorted by query, as [Q, most of any query]; score -inf
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
        """Puts candidates behind those so far, in the order of rows, so that a stable sort leaves
        equals in order."""
        self._scores = np.concatenate([self._scores, scores], axis=1)
        self._rows = np.concatenate([self._rows, rows], axis=1)
        if self._scores.shape[1] > MAX_CANDIDATES_PER_RANK * self._k:
            self._scores, self._rows = self.best()

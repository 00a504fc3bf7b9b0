"""The best K of scores that lie in the host's memory, by NumPy: several times as fast as
`jax.lax.top_k` on a CPU.

The scores of a query come in groups of neighbours with the maximum of each. The K-th greatest
maximum is reached by K items at least, so that no group below it holds one of the best K: of most
scores nothing but the maxima is ever looked at.
"""

from __future__ import annotations

import numpy as np

SIZES = (32, 16, 8, 4, 2)  # of a group, in scores
GROUP = SIZES[0]
WIDEST = 8  # times K candidates are kept before the best are sorted out


def group_size(count: int, k: int) -> int:
    """How many of `count` scores to take the maximum of: a divisor of `count` that leaves more
    groups than the list is long."""
    return next((size for size in SIZES if count % size == 0 and count >= 2 * k * size), 1)


class RunningTopK:
    """The best `k` of each of Q queries among the scores so far; of equal scores the lower row.
    None may be NaN."""

    def __init__(self, queries: int, k: int):
        self._k = k
        self._scores = np.zeros((queries, 0), np.float32)
        self._rows = np.zeros((queries, 0), np.int32)

    def add(self, scores: np.ndarray, maxima: np.ndarray, first: int) -> None:
        """Scores [Q, C] of the rows from `first` on, all above those before, and the maxima [Q, C /
        size] of their groups."""
        count, size = scores.shape[1], scores.shape[1] // maxima.shape[1]
        least = self._least(maxima)
        groups = np.flatnonzero(maxima >= least[:, None])
        query, values = groups // maxima.shape[1], scores.reshape(-1, size)[groups]
        found = np.flatnonzero(values >= least[query][:, None])
        group = found // size
        query, values, rows = (
            query[group],
            values.ravel()[found],
            groups[group] * size + found % size,
        )
        if len(found) > WIDEST * self._k * len(scores):
            query, values, rows = self._fewer_equals(least, query, values, rows)
        self._append(query, values, (rows - query * count + first).astype(np.int32))

    def best(self) -> tuple[np.ndarray, np.ndarray]:
        """(scores float32 [Q, <= k], rows int32), best first; score -inf and row -1 where fewer are
        there."""
        order = np.argsort(-self._scores, axis=1, kind="stable")[:, : self._k]
        return np.take_along_axis(self._scores, order, axis=1), np.take_along_axis(
            self._rows, order, axis=1
        )

    def _least(self, maxima: np.ndarray) -> np.ndarray:
        """float32 [Q], what the K-th best is not below: so many are as good in the new scores, or
        in those so far."""
        least = np.full(len(maxima), np.finfo(np.float32).min)  # -inf is no item
        for known in (self._scores, maxima):
            if known.shape[1] >= self._k:
                at = known.shape[1] - self._k
                least = np.maximum(least, np.partition(known, at, axis=1)[:, at])
        return least

    def _fewer_equals(
        self, least: np.ndarray, query: np.ndarray, *found: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """Candidates without those that equal the least and are not the first K of them: a
        collapsed model has all alike."""
        equal = found[0] == least[query]
        so_far = np.concatenate([[0], np.cumsum(equal)])
        number = so_far[1:] - so_far[np.searchsorted(query, np.arange(len(least)))][query]
        keep = ~equal | (number <= self._k)
        return query[keep], *(x[keep] for x in found)

    def _append(self, query: np.ndarray, values: np.ndarray, rows: np.ndarray) -> None:
        """Candidates in the order of queries, of each in that of rows: a stable sort then leaves
        equals in order."""
        lengths = np.bincount(query, minlength=len(self._scores))
        place = np.arange(len(query)) - (np.cumsum(lengths) - lengths)[query]
        shape = len(self._scores), int(lengths.max(initial=0))
        more, more_rows = np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int32)
        more[query, place], more_rows[query, place] = values, rows
        if not self._scores.shape[1]:
            self._scores, self._rows = more, more_rows
            return
        self._scores = np.concatenate([self._scores, more], axis=1)
        self._rows = np.concatenate([self._rows, more_rows], axis=1)
        if self._scores.shape[1] > WIDEST * self._k:
            self._scores, self._rows = self.best()

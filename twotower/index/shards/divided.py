"""An index in shards: each holds some of the items, all are asked together, their lists are merged.

The merged lists are those of one index over all items, where the shards are exact to the bit: a
score does not depend on the items beside it, and of equal ones the lower row comes first. A shard
that finds a share of its own best items finds at least that share of those that are among the best
of all.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from twotower.core.arrays import Ragged
from twotower.index.base import Index, ShardedIndex, check_queries, list_length
from twotower.index.exact import ExactIndex
from twotower.kernels.top_k import merge_top_k


class DividedIndex(ShardedIndex):
    """Indices of shards with the contract of `Index.search`, over the rows of the whole.

    Attributes:
        kind: Kinds of the shards' indices.
        parts: Index of each shard.
        rows: Rows of each shard's items in the whole, int64 [N_s] each, rising.
        num_items: Number of items of all shards.
        dim: Width of the vectors.
        normalized: Whether the vectors have length 1.
        is_exact: Whether all shards compare all their items.
    """

    def __init__(self, parts: Sequence[Index], rows: Sequence[np.ndarray]):
        """Joins shards.

        Args:
            parts: Index of each of S shards, S >= 1.
            rows: Rows of each shard's items, int [N_s] each, rising; each row is in one of them.
        """
        self.parts = tuple(parts)
        self.rows = tuple(np.asarray(part, np.int64) for part in rows)
        # A shard without items is searched exactly whatever the others are.
        kinds = dict.fromkeys(part.kind for part in self.parts if part.num_items)
        self.kind = ", ".join(kinds) or "exact"
        self.num_items = sum(map(len, self.rows))
        self.dim = self.parts[0].dim
        self.normalized = self.parts[0].normalized
        self.is_exact = all(isinstance(part, ExactIndex) for part in self.parts)
        self._threads: tuple[int, ThreadPoolExecutor] | None = None

    def search(
        self, queries: ArrayLike, k: int, *, exclude: Ragged | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the (nearly) best items of each query; see `ShardedIndex.search`."""
        queries = check_queries(queries, self.dim, normalized=self.normalized)
        k = list_length(k, self.num_items)
        # An index refuses 0, which a corpus without items asks for.
        wanted = max(1, k)

        def search_part(number: int) -> tuple[np.ndarray, np.ndarray]:
            part = self.parts[number]
            if exclude is None:
                scores, rows = part.search(queries, wanted)
            else:
                assert isinstance(part, ExactIndex), "only exact search takes exclusions"
                own = rows_within(exclude, self.rows[number])
                scores, rows = part.search(queries, wanted, exclude=own)
            return scores, rows_of_whole(rows, self.rows[number])

        # The libraries let go of Python's lock while they search.
        lists = list(self._pool().map(search_part, range(len(self.parts))))
        return merge_lists(k, lists)

    def save(self, folder: str | os.PathLike) -> dict[str, Any]:
        """Shards are saved one by one: see `twotower.retrieval.bundle`."""
        raise NotImplementedError("The shards of an index are saved one by one.")

    def _pool(self) -> ThreadPoolExecutor:
        """Returns a thread for each shard, made with the first search."""
        process = os.getpid()
        # The threads of a parent do not live on in a child that was forked.
        if self._threads is None or self._threads[0] != process:
            pool = ThreadPoolExecutor(len(self.parts), thread_name_prefix="shard")
            self._threads = process, pool
        return self._threads[1]


def merge_lists(
    k: int, lists: Sequence[tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the best `k` of the lists of all shards; of equal scores the lower row comes first.

    Args:
        k: Length of the merged lists, at most.
        lists: Scores [Q, M_s] and rows of the whole [Q, M_s] of each shard; score -inf and row -1
            where nothing was found.

    Returns:
        (scores float32 [Q, <= k], rows int32 [Q, <= k]).
    """
    scores = np.concatenate([part for part, _ in lists], axis=1)
    rows = np.concatenate([part for _, part in lists], axis=1)
    # In the order of the rows: the merge keeps it among equal scores.
    order = np.argsort(rows, axis=1, kind="stable")
    scores = np.take_along_axis(scores, order, axis=1)
    rows = np.take_along_axis(rows, order, axis=1)
    best, best_rows = merge_top_k(k, scores, rows)
    return best, best_rows


def rows_of_whole(rows: np.ndarray, shard_rows: np.ndarray) -> np.ndarray:
    """Returns rows of a shard as rows of the whole, int32 of the same shape; -1 stays.

    Args:
        rows: Rows of a shard, int [Q, M].
        shard_rows: Rows of the shard's items in the whole, int64 [N_s].
    """
    if not len(shard_rows):
        return rows.astype(np.int32)
    return np.where(rows < 0, -1, shard_rows[rows]).astype(np.int32)


def rows_within(lists: Ragged, shard_rows: np.ndarray) -> Ragged:
    """Returns those of lists of rows that are in a shard, as its own rows.

    Args:
        lists: Rows of the whole, one list a query.
        shard_rows: Rows of the shard's items in the whole, int64 [N_s], rising.
    """
    is_inside, rows = find_rows(lists.values, shard_rows)
    return Ragged.from_pairs(lists.rows[is_inside], rows, num_rows=len(lists))


def find_rows(rows: np.ndarray, shard_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns which rows of the whole are in a shard, bool [M], and these as its rows, int64.

    Args:
        rows: Rows of the whole, int [M].
        shard_rows: Rows of the shard's items in the whole, int64 [N_s], rising.
    """
    if not len(shard_rows):
        return np.zeros(len(rows), bool), np.zeros(0, np.int64)
    position = np.searchsorted(shard_rows, rows)
    # A row behind the last one is not in the shard, and is compared with that.
    position = np.minimum(position, len(shard_rows) - 1)
    is_inside = shard_rows[position] == rows
    return is_inside, position[is_inside]

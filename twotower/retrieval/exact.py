"""Exact search: the K items of greatest dot product, in blocks of queries and of items on the device.

Blocks bound the memory, and on a GPU they are also faster: XLA sorts a row that `top_k` takes whole.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from twotower.retrieval.csr import Csr
from twotower.validation import ScoreError

ITEM_BLOCK = 65_536
BLOCK_BYTES = 2**27  # of scores


class QueryError(ScoreError):
    """Query vectors that no ranking can be made from: the message names the first bad row."""


def top_k(queries: Any, items: Any, k: int, *, exclude: Csr | None = None, normalized: bool = False):
    """The `k` items of greatest dot product of each query. See `ExactIndex.search`.

    >>> scores, rows = top_k(np.eye(2), np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]), k=2)
    >>> rows.tolist()
    [[0, 2], [1, 2]]
    """
    return ExactIndex(items, normalized=normalized).search(queries, k, exclude=exclude)


class ExactIndex:
    """Item vectors on the device, searched exhaustively."""

    kind = "exact"

    def __init__(self, vectors: Any, *, normalized: bool = False, item_block: int = ITEM_BLOCK):
        """Args:
        vectors: float [N, D].
        normalized: vectors have length 1, so that a query of length 0 is a mistake.
        item_block: items compared at once.
        """
        vectors = check_vectors(vectors, what="item")
        self.num_items, self.dim = vectors.shape
        self.normalized = normalized
        self._block = item_block
        self._blocks = [jnp.asarray(vectors[i : i + item_block]) for i in range(0, self.num_items, item_block)]

    def search(self, queries: Any, k: int, *, exclude: Csr | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The best items, best first; of equal scores the lower row first.

        Args:
            queries: float [Q, D], finite.
            k: length of the lists.
            exclude: for each query, rows that must not come back.

        Returns:
            (scores float32 [Q, k], rows int32 [Q, k]); score -inf and row -1 where fewer than k items remain.

        Raises:
            QueryError: a query is of the wrong width, not finite, or zero where vectors are normalised.
            ValueError: k < 1, or `exclude` is not one list a query.
        """
        queries = check_queries(queries, self.dim, normalized=self.normalized)
        check_k(k)
        if exclude is not None and len(exclude) != len(queries):
            raise ValueError(f"exclude holds {len(exclude)} lists for {len(queries)} queries; give one list a query.")
        scores = np.full((len(queries), k), -np.inf, np.float32)
        rows = np.full((len(queries), k), -1, np.int32)
        step = max(1, min(BLOCK_BYTES // (4 * self._block), 1024))
        for start in range(0, len(queries), step):
            chosen = slice(start, min(start + step, len(queries)))
            skip = None if exclude is None else exclude.take(np.arange(chosen.start, chosen.stop))
            found, where = self._search_block(queries[chosen], min(k, self.num_items), skip)
            scores[chosen, : found.shape[1]], rows[chosen, : where.shape[1]] = found, where
        return scores, rows

    def _search_block(self, queries: np.ndarray, k: int, exclude: Csr | None) -> tuple[np.ndarray, np.ndarray]:
        count = len(queries)
        queries = pad_rows(queries, next_power_of_two(count))
        best = None
        for number, items in enumerate(self._blocks):
            first = number * self._block
            pairs = excluded_pairs(exclude, first, first + len(items))
            found = _best_of_block(queries, items, *pairs, first, min(k, len(items)))
            best = found if best is None else _merge(*best, *found, k)
        return tuple(np.asarray(part)[:count] for part in best) if best else (np.zeros((count, 0)),) * 2


@functools.partial(jax.jit, static_argnames="k")
def _best_of_block(
    queries: Float[Array, "B D"],
    items: Float[Array, "N D"],
    query: Int[Array, " E"],
    item: Int[Array, " E"],
    first,
    k: int,
):
    """The top k of one block of items whose first row is `first`, less the pairs (query, item)."""
    scores = jnp.einsum("bd,nd->bn", queries, items, precision=jax.lax.Precision.HIGHEST)
    scores = scores.at[query, item].set(-jnp.inf, mode="drop")
    best, rows = jax.lax.top_k(scores, k)
    return best, jnp.where(jnp.isneginf(best), -1, rows + first)


@functools.partial(jax.jit, static_argnames="k")
def _merge(scores, rows, new_scores, new_rows, k: int):
    """The top k of two sorted lists; `top_k` is stable, so the earlier (lower) rows win ties."""
    scores, rows = jnp.concatenate([scores, new_scores], axis=1), jnp.concatenate([rows, new_rows], axis=1)
    best, at = jax.lax.top_k(scores, min(k, scores.shape[1]))
    return best, jnp.take_along_axis(rows, at, axis=1)


def blocked_top_k(scores: Float[Array, "B N"], k: int) -> tuple[Float[Array, "B K"], Int[Array, "B K"]]:
    """`jax.lax.top_k` by blocks of the row; the same answer, of equal scores the lower row first."""
    best = None
    for first in range(0, scores.shape[1], ITEM_BLOCK):
        part = scores[:, first : first + ITEM_BLOCK]
        found, rows = jax.lax.top_k(part, min(k, part.shape[1]))
        best = (found, rows + first) if best is None else _merge(*best, found, rows + first, k)
    return best


def excluded_pairs(exclude: Csr | None, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """(query, item - first) int32 of the exclusions within [first, stop), padded to a power of two with pairs that
    a scatter drops, so that few shapes are compiled."""
    if exclude is None:
        return np.zeros(0, np.int32), np.zeros(0, np.int32)
    inside = (exclude.values >= first) & (exclude.values < stop)
    query, item = exclude.rows[inside], exclude.values[inside] - first
    return pad_pairs(query, item, next_power_of_two(len(item)), beyond=stop - first)


def pad_pairs(query: np.ndarray, item: np.ndarray, size: int, *, beyond: int) -> tuple[np.ndarray, np.ndarray]:
    """Both int32 [size]; the padding points at column `beyond`, outside of the scores."""
    query = np.pad(query, (0, size - len(query))).astype(np.int32)
    return query, np.pad(item, (0, size - len(item)), constant_values=beyond).astype(np.int32)


def pad_rows(array: np.ndarray, size: int) -> np.ndarray:
    """`array` with rows of zeros appended up to `size`."""
    return np.pad(array, [(0, size - len(array))] + [(0, 0)] * (array.ndim - 1))


def next_power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k={k} must be at least 1.")


def check_vectors(vectors: Any, *, what: str) -> Any:
    """`vectors` as contiguous float32 [N, D], or an error that names the first row that is not finite."""
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if vectors.ndim != 2 or vectors.shape[1] == 0:
        raise QueryError(f"{what} vectors must be of shape [rows, width], not {list(vectors.shape)}.")
    bad = ~np.isfinite(vectors).all(axis=1)
    if bad.any():
        raise QueryError(f"{what} vector {int(bad.argmax())} is not finite ({int(bad.sum())} of {len(bad)} are not).")
    return vectors


def check_queries(queries: Any, dim: int, *, normalized: bool = False) -> np.ndarray:
    """`queries` as float32 [Q, D]; refuses what would be answered with arbitrary items.

    Raises:
        QueryError: the width is not `dim`, a row is not finite, or is zero although vectors are normalised.
    """
    if _sound(queries, dim):
        return queries
    queries = check_vectors(queries, what="query")
    if queries.shape[1] != dim:
        raise QueryError(f"query vectors are {queries.shape[1]} wide; the items are {dim} wide.")
    zero = ~queries.any(axis=1)
    if normalized and zero.any():
        raise QueryError(f"query vector {int(zero.argmax())} is zero although vectors are normalised.")
    return queries


def _sound(queries: Any, dim: int) -> bool:
    """Whether one pass, a fraction of the time of one search, tells that nothing is wrong with the queries; where it does not,
    they may be sound still. A sum of squares is NaN or infinite where a number is, and 0 of zeros."""
    if type(queries) is not np.ndarray or queries.dtype != np.float32 or not queries.flags.c_contiguous:
        return False
    if queries.ndim != 2 or queries.shape[1] != dim:
        return False
    if len(queries) == 1:
        return bool(0.0 < np.vdot(queries, queries) < np.inf)
    squares = np.einsum("qd,qd->q", queries, queries)
    return bool(((squares > 0.0) & (squares < np.inf)).all())

"""Exact search: the K items of greatest dot product, in blocks of queries and of items, on one
device or divided over a mesh.

Blocks bound the memory. On a CPU XLA multiplies and NumPy selects; a GPU would sort the row that
`top_k` takes, so that it is given groups. Over a mesh each device holds its part of every block,
finds the best of it, and K scores and rows of each are merged: no device holds another's items.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from twotower.core.arrays import next_power_of_two, pad_pairs, pad_rows, round_up
from twotower.core.errors import QueryError
from twotower.core.mesh import AXIS, REPLICATED, SHARDED, SINGLE_DEVICE, group_of, localise, put
from twotower.core.ragged import Ragged
from twotower.kernels.top_k import GROUP, RunningTopK, group_size, merge_top_k, select_top_k

ITEM_BLOCK = 65_536  # of each device
# Bytes of the scores of a block on each device, and queries in it: enough to fill an accelerator.
BLOCK_BYTES, BLOCK_QUERIES = 2**30, 4_096
# On a CPU, few: glibc asks the system for every buffer of 32 MiB and more, and the system clears it
# each time, which is half of a search's time; and the devices of a mesh share one memory.
HOST_BLOCK_BYTES, HOST_BLOCK_QUERIES = 2**25 - 2**20, 1_024


def top_k(
    queries: Any, items: Any, k: int, *, exclude: Ragged | None = None, normalized: bool = False
):
    """The `k` items of greatest dot product of each query. See `ExactIndex.search`.

    >>> scores, rows = top_k(np.eye(2), np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]), k=2)
    >>> rows.tolist()
    [[0, 2], [1, 2]]
    """
    return ExactIndex(items, normalized=normalized).search(queries, k, exclude=exclude)


class ExactIndex:
    """Item vectors on the device or divided over those of a mesh, searched exhaustively."""

    kind = "exact"

    def __init__(
        self,
        vectors: Any,
        *,
        normalized: bool = False,
        item_block: int = ITEM_BLOCK,
        mesh: Mesh | None = None,
        recall_target: float = 1.0,
    ):
        """Args:
        vectors: float [N, D]; with a mesh of several processes, which each has whole
            (memory-mapped, say).
        normalized: vectors have length 1, so that a query of length 0 is a mistake.
        item_block: items compared at once on each device.
        mesh: whose devices get their rows of each block alone; None is the default device.
        recall_target: below 1, TPUs select by `jax.lax.approx_max_k`, whose lists hold this share
            of the best in expectation; other devices select exactly all the same.
        """
        if not 0 < recall_target <= 1:
            raise ValueError(f"recall_target={recall_target} must lie in (0, 1].")
        vectors = check_vectors(vectors, what="item")
        self.num_items, self.dim = vectors.shape
        self.normalized = normalized
        self._mesh = mesh if mesh is not None and mesh.size > 1 else None
        self._host = self._mesh is None and jax.default_backend() == "cpu"
        self._recall_target = recall_target if jax.default_backend() == "tpu" else 1.0
        devices = self._mesh.size if self._mesh else 1
        self._rows = max(
            1, min(item_block, -(-self.num_items // devices))
        )  # of a block, on each device
        self._block = self._rows * devices
        unit = devices if self._mesh else GROUP if self._host and self._rows >= GROUP else 1
        parts = (vectors[i : i + self._block] for i in range(0, self.num_items, self._block))
        self._blocks = [
            self._placed(pad_rows(part, round_up(len(part), unit)), SHARDED) for part in parts
        ]

    def search(
        self, queries: Any, k: int, *, exclude: Ragged | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best items, best first; of equal scores the lower row first.

        Args:
            queries: float [Q, D], finite.
            k: length of the lists.
            exclude: for each query, rows that must not come back.

        Returns:
            (scores float32 [Q, k], rows int32 [Q, k]); score -inf and row -1 where fewer than k
            items remain.

        Raises:
            QueryError: a query is of the wrong width, not finite, or zero where vectors are
                normalised; or a score overflows.
            ValueError: k < 1, or `exclude` is not one list a query.
        """
        queries = check_queries(queries, self.dim, normalized=self.normalized)
        check_k(k)
        if exclude is not None and len(exclude) != len(queries):
            raise ValueError(
                f"exclude holds {len(exclude)} lists for {len(queries)} queries; give one list a query."
            )
        scores = np.full((len(queries), k), -np.inf, np.float32)
        rows = np.full((len(queries), k), -1, np.int32)
        if not self.num_items:
            return scores, rows
        search = self._search_host if self._host else self._search_devices
        on_cpu = jax.default_backend() == "cpu"
        size, most = (
            (HOST_BLOCK_BYTES, HOST_BLOCK_QUERIES) if on_cpu else (BLOCK_BYTES, BLOCK_QUERIES)
        )
        step = max(1, min(size // (4 * self._rows), most))
        for start in range(0, len(queries), step):
            chosen = slice(start, min(start + step, len(queries)))
            skip = None if exclude is None else exclude.take(np.arange(chosen.start, chosen.stop))
            found, where = search(
                queries[chosen], min(step, next_power_of_two(chosen.stop - start)), k, skip
            )
            scores[chosen, : found.shape[1]], rows[chosen, : where.shape[1]] = found, where
        return scores, rows

    def _search_host(
        self, queries: np.ndarray, size: int, k: int, exclude: Ragged | None
    ) -> tuple[np.ndarray, np.ndarray]:
        best, padded = RunningTopK(len(queries), k), pad_rows(queries, size)
        for number, items in enumerate(self._blocks):
            first = number * self._block
            real = min(self._block, self.num_items - first)
            pairs = excluded_pairs(exclude, first, first + len(items))
            found = _scores_and_maxima(
                padded, items, *pairs, count=real, size=group_size(len(items), k)
            )
            values, maxima = (np.asarray(part)[: len(queries)] for part in found)
            check_scores(maxima)
            best.add(values, first, maxima)
        return best.best()

    def _search_devices(
        self, queries: np.ndarray, size: int, k: int, exclude: Ragged | None
    ) -> tuple[np.ndarray, np.ndarray]:
        best, padded = None, self._placed(pad_rows(queries, size), REPLICATED)
        for number, items in enumerate(self._blocks):
            first = number * self._block
            pairs = excluded_pairs(exclude, first, first + len(items))
            more = self._placed((*pairs, np.int32(first), np.int32(self.num_items)), REPLICATED)
            found = _best_of_block(self._mesh, k, self._recall_target)(items, padded, *more)
            best = found if best is None else _merge(*best, *found, k)
        scores, rows = (np.asarray(part)[: len(queries)] for part in best)
        check_scores(scores)
        return scores, rows

    def _placed(self, tree: Any, spec: Any) -> Any:
        return put(self._mesh, tree, spec) if self._mesh else jax.tree.map(jnp.asarray, tree)


def _scores(
    queries: Float[Array, "B D"],
    items: Float[Array, "N D"],
    query: Int[Array, " E"],
    item: Int[Array, " E"],
) -> Float[Array, "B N"]:
    """Those of the pairs (query, item) are -inf."""
    scores = jnp.einsum("bd,nd->bn", queries, items, precision=jax.lax.Precision.HIGHEST)
    return scores.at[query, item].set(-jnp.inf, mode="drop")


@functools.partial(jax.jit, static_argnames=("count", "size"))
def _scores_and_maxima(queries, items, query, item, count: int, size: int):
    """Scores [B, N] of a block, -inf from the `count`-th on, and the maxima of their groups of
    `size`."""
    scores = _scores(queries, items, query, item).at[:, count:].set(-jnp.inf)
    return scores, scores.reshape(len(queries), -1, size).max(-1)


@functools.cache
def _best_of_block(mesh: Mesh | None, k: int, recall_target: float) -> Any:
    """(items divided, queries, pairs (query, item) left out, the block's first row, N) -> (scores,
    rows) [B, <= k], the same on every device: the best of the block."""
    group = group_of(mesh) if mesh else SINGLE_DEVICE

    def search(
        items: Float[Array, "M D"],
        queries: Float[Array, "B D"],
        query: Int[Array, " E"],
        item: Int[Array, " E"],
        first: Int[Array, ""],
        count: Int[Array, ""],
    ):
        places, most = group.places(len(items)), min(k, len(items))
        scores = _scores(
            queries, items, query, item if mesh is None else localise(item, len(items), group)
        )
        scores = (
            scores
            if mesh is None
            else jnp.where((first + places)[None, :] < count, scores, -jnp.inf)
        )
        select = (
            functools.partial(jax.lax.approx_max_k, recall_target=recall_target)
            if recall_target < 1
            else select_top_k
        )
        # `top_k` puts the NaN of a negative sign, which processors make, behind all others:
        # `check_scores` would not see it.
        best, at = select(jnp.where(jnp.isnan(scores), jnp.nan, scores), most)
        rows = jnp.where(jnp.isneginf(best), -1, first + places[at])
        if mesh is None:
            return best, rows
        # In the order of devices, which is that of rows: of equal scores the lower row stays first.
        best, rows = (jax.lax.all_gather(x, AXIS, axis=1, tiled=True) for x in (best, rows))
        return merge_top_k(k, best, rows)

    if mesh is None:
        return jax.jit(search)
    specs = (SHARDED, REPLICATED, REPLICATED, REPLICATED, REPLICATED, REPLICATED)
    return jax.jit(
        jax.shard_map(
            search, mesh=mesh, in_specs=specs, out_specs=(REPLICATED, REPLICATED), check_vma=False
        )
    )


@functools.partial(jax.jit, static_argnames="k")
def _merge(scores, rows, new_scores, new_rows, k: int):
    """The best `k` of two lists, the earlier of which holds the lower rows."""
    scores = jnp.concatenate([scores, new_scores], axis=1)
    rows = jnp.concatenate([rows, new_rows], axis=1)
    return merge_top_k(k, scores, rows)


def excluded_pairs(exclude: Ragged | None, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """(query, item - first) int32 of the exclusions within [first, stop), padded to a power of two
    with pairs that a scatter drops, so that few shapes are compiled."""
    if exclude is None:
        return np.zeros(0, np.int32), np.zeros(0, np.int32)
    inside = (exclude.values >= first) & (exclude.values < stop)
    query, item = exclude.rows[inside], exclude.values[inside] - first
    return pad_pairs(query, item, next_power_of_two(len(item)), num_columns=stop - first)


def check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k={k} must be at least 1.")


def check_scores(scores: np.ndarray) -> None:
    """Refuses NaN, which finite vectors give where products overflow to both infinities."""
    if np.isnan(scores).any():
        raise QueryError(
            "Scores overflow float32 to NaN; they cannot be ranked. The vectors are too long."
        )


def check_vectors(vectors: Any, *, what: str) -> Any:
    """`vectors` as contiguous float32 [N, D], or an error that names the first row that is not
    finite."""
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if vectors.ndim != 2 or vectors.shape[1] == 0:
        raise QueryError(
            f"{what} vectors must be of shape [rows, width], not {list(vectors.shape)}."
        )
    bad = ~np.isfinite(vectors).all(axis=1)
    if bad.any():
        raise QueryError(
            f"{what} vector {int(bad.argmax())} is not finite ({int(bad.sum())} of {len(bad)} are not)."
        )
    return vectors


def check_queries(queries: Any, dim: int, *, normalized: bool = False) -> np.ndarray:
    """`queries` as float32 [Q, D]; refuses what would be answered with arbitrary items.

    Raises:
        QueryError: the width is not `dim`, a row is not finite, or is zero although vectors are
            normalised.
    """
    if _sound(queries, dim):
        return queries
    queries = check_vectors(queries, what="query")
    if queries.shape[1] != dim:
        raise QueryError(f"query vectors are {queries.shape[1]} wide; the items are {dim} wide.")
    zero = ~queries.any(axis=1)
    if normalized and zero.any():
        raise QueryError(
            f"query vector {int(zero.argmax())} is zero although vectors are normalised."
        )
    return queries


def _sound(queries: Any, dim: int) -> bool:
    """Whether one pass, a fraction of the time of one search, tells that nothing is wrong with the
    queries; where it does not, they may be sound still. A sum of squares is NaN or infinite where a
    number is, and 0 of zeros."""
    if (
        type(queries) is not np.ndarray
        or queries.dtype != np.float32
        or not queries.flags.c_contiguous
    ):
        return False
    if queries.ndim != 2 or queries.shape[1] != dim:
        return False
    if len(queries) == 1:
        return bool(0.0 < np.vdot(queries, queries) < np.inf)
    squares = np.einsum("qd,qd->q", queries, queries)
    return bool(((squares > 0.0) & (squares < np.inf)).all())

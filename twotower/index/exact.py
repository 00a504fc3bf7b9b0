"""Exact search: the K items of greatest dot product, on one device or divided over a mesh.

Queries and items are taken in blocks, which bounds the memory. On a CPU XLA multiplies and NumPy
selects; a GPU would sort the whole row given to `top_k`, so `select_top_k` hands it groups. Over a
mesh each device holds its part of every block and finds the best of it; only lists of K scores and
rows are exchanged and merged.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from twotower.core.arrays import Ragged, next_power_of_two, pad_pairs, pad_rows, round_up
from twotower.core.fork import check_fork
from twotower.index.base import check_queries, check_scores, check_vectors, list_length
from twotower.kernels.top_k import RunningTopK, group_size

# JAX is loaded where items are put on devices: a bundle has this class of index beside others, and
# most answers need none of its programs.
if TYPE_CHECKING:
    import jax

ITEM_BLOCK = 65_536  # items compared at once on each device
# Bytes of the scores of a block on each device, and queries in it: enough to fill an accelerator.
BLOCK_BYTES = 2**30
BLOCK_QUERIES = 4_096
# Less on a CPU: glibc asks the system for every buffer of 32 MiB and more, and the system clears it
# each time, which is half of a search's time; and the devices of a mesh share one memory.
HOST_BLOCK_BYTES = 2**25 - 2**20
HOST_BLOCK_QUERIES = 1_024
# Items that the length of a block is a multiple of on a CPU: XLA then adds the products of a score
# in one order, whichever items stand beside it. Measured: 32 are too few.
HOST_BLOCK_MULTIPLE = 64
# Exclusions of several queries are padded to the first number times a power of four, up to the
# second; more of them, and those of one query, to a power of two.
MIN_COARSE = 1_024
MAX_COARSE = 65_536


def top_k(
    queries: ArrayLike,
    items: ArrayLike,
    k: int,
    *,
    exclude: Ragged | None = None,
    normalized: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the `k` items of greatest dot product of each query; see `ExactIndex.search`.

    >>> scores, rows = top_k(np.eye(2), np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]), k=2)
    >>> rows.tolist()
    [[0, 2], [1, 2]]
    """
    return ExactIndex(items, normalized=normalized).search(queries, k, exclude=exclude)


class ExactIndex:
    """Item vectors on one device, or divided over those of a mesh, searched exhaustively."""

    kind = "exact"

    def __init__(
        self,
        vectors: ArrayLike,
        *,
        normalized: bool = False,
        item_block: int = ITEM_BLOCK,
        mesh: jax.sharding.Mesh | None = None,
        recall_target: float = 1.0,
    ):
        """Puts the vectors on the devices.

        Args:
            vectors: float [N, D]. Where several processes make up the mesh, each has all of them
                (memory-mapped, say).
            normalized: Whether the vectors have length 1, so that a query of length 0 is a mistake.
            item_block: Number of items compared at once on each device.
            mesh: Devices to divide the items of each block over; None is the default device.
            recall_target: Below 1, TPUs select by `jax.lax.approx_max_k`, whose lists hold this
                share of the best in expectation; other devices select exactly all the same.
        """
        if not 0 < recall_target <= 1:
            raise ValueError(f"recall_target={recall_target} must lie in (0, 1].")
        from twotower.index import exact_programs

        check_fork()
        vectors = check_vectors(vectors, what="item")
        self.num_items, self.dim = vectors.shape
        self.normalized = normalized
        # A mesh of one device is no mesh: nothing is divided, and nothing has to be merged.
        self._mesh = mesh if mesh is not None and mesh.size > 1 else None
        # NumPy selects several times as fast as XLA's `top_k` on a CPU. Several CPU devices, which
        # tests take for accelerators, select as these do.
        self._platform = exact_programs.default_platform()
        self._on_host = self._mesh is None and self._platform == "cpu"
        self._recall_target = recall_target if self._platform == "tpu" else 1.0
        devices = self._mesh.size if self._mesh else 1
        items_per_device = -(-self.num_items // devices)
        # A small corpus is one block as long as itself, not one padded to `item_block`.
        self._device_rows = max(1, min(item_block, items_per_device))
        self._block_rows = self._device_rows * devices
        # Only the last block is padded: to equal parts on a mesh; on the host to whole groups (a
        # length without small divisors would leave groups of one), and for scores that are the same
        # to the bit.
        multiple = devices
        if self._on_host:
            multiple = HOST_BLOCK_MULTIPLE
        self._blocks: list[jax.Array] = []
        for first in range(0, self.num_items, self._block_rows):
            block = vectors[first : first + self._block_rows]
            # A copy also where nothing is missing: on a CPU JAX may keep the buffer that it is
            # given, and a caller may write into its own.
            padded = pad_rows(block, round_up(len(block), multiple))
            self._blocks.append(exact_programs.put_items(self._mesh, padded))

    def search(
        self, queries: ArrayLike, k: int, *, exclude: Ragged | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the best items of each query, best first; of equal scores the lower row first.

        Args:
            queries: float [Q, D], finite.
            k: Length of the lists.
            exclude: Rows that must not come back, one list a query.

        Returns:
            (scores float32 [Q, L], rows int32 [Q, L]), where L is `k`, or the number of items if
            that is less; score -inf and row -1 where fewer than L items remain.

        Raises:
            QueryError: A query is of the wrong width, not finite, or zero where vectors are
                normalised; or a score overflows.
            ConfigError: `k` is no whole number, or below 1.
            ValueError: `exclude` is not one list a query.
        """
        check_fork()
        queries = check_queries(queries, self.dim, normalized=self.normalized)
        k = list_length(k, self.num_items)
        if exclude is not None and len(exclude) != len(queries):
            raise ValueError(
                f"exclude holds {len(exclude)} lists for {len(queries)} queries; "
                "give one list a query."
            )
        # Lists with exclusions end in these.
        scores = np.full((len(queries), k), -np.inf, np.float32)
        rows = np.full((len(queries), k), -1, np.int32)
        if not self.num_items:
            return scores, rows
        search = self._search_on_host if self._on_host else self._search_on_devices
        step = self._query_block()
        for start in range(0, len(queries), step):
            stop = min(start + step, len(queries))
            lists = None
            if exclude is not None:
                lists = exclude.take(np.arange(start, stop))
            # Padded to a power of two, so that few shapes are compiled.
            size = min(step, next_power_of_two(stop - start))
            best, best_rows = search(queries[start:stop], size, k, lists)
            scores[start:stop, : best.shape[1]] = best
            rows[start:stop, : best.shape[1]] = best_rows
        return scores, rows

    def save(self, folder: str | os.PathLike) -> dict[str, Any]:
        """Returns the settings alone: the vectors, which the bundle holds, are the index."""
        return {
            "kind": self.kind,
            "num_items": self.num_items,
            "dim": self.dim,
            "normalized": self.normalized,
        }

    def _query_block(self) -> int:
        """Returns the number of queries whose scores with a block of items fit into its memory."""
        # By the platform, not by `_on_host`: the devices of a CPU mesh share one memory.
        if self._platform == "cpu":
            block_bytes = HOST_BLOCK_BYTES
            max_queries = HOST_BLOCK_QUERIES
        else:
            block_bytes = BLOCK_BYTES
            max_queries = BLOCK_QUERIES
        bytes_per_query = 4 * self._device_rows  # scores are float32
        return max(1, min(block_bytes // bytes_per_query, max_queries))

    def _search_on_host(
        self, queries: np.ndarray, size: int, k: int, exclude: Ragged | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """`search` of one block of queries, padded to `size`: XLA multiplies, NumPy selects."""
        from twotower.index.exact_programs import scores_and_maxima

        best = RunningTopK(len(queries), k)
        padded = queries
        # `np.pad` takes ten microseconds and more also where nothing is missing.
        if len(queries) < size:
            padded = pad_rows(queries, size)
        for number, items in enumerate(self._blocks):
            first = number * self._block_rows
            count = min(self._block_rows, self.num_items - first)
            pairs = _excluded_pairs(exclude, first, first + len(items))
            group = group_size(len(items), k)
            block = scores_and_maxima(padded, items, *pairs, count=count, size=group)
            # On a CPU these are views of XLA's buffers.
            scores, maxima = (np.asarray(x)[: len(queries)] for x in block)
            # A maximum is NaN where any score of its group is, so the scores need no look.
            check_scores(maxima)
            best.add(scores, first, maxima)
        return best.best()

    def _search_on_devices(
        self, queries: np.ndarray, size: int, k: int, exclude: Ragged | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """`search` of one block of queries, padded to `size`; only the lists leave the devices."""
        from twotower.index.exact_programs import block_search, merge_lists, put_queries

        padded = put_queries(self._mesh, pad_rows(queries, size))
        search_block = block_search(self._mesh, k, self._recall_target)
        lists: tuple[jax.Array, jax.Array] | None = None
        for number, items in enumerate(self._blocks):
            first = number * self._block_rows
            pairs = _excluded_pairs(exclude, first, first + len(items))
            others = (*pairs, np.int32(first), np.int32(self.num_items))
            block = search_block(items, padded, *put_queries(self._mesh, others))
            # Merged at once, so that one list a query is held however many blocks there are.
            if lists is None:
                lists = block
            else:
                lists = merge_lists(*lists, *block, k)
        assert lists is not None, "an index without items is answered without a search"
        # The only copy to the host: lists of K, not scores of all items.
        scores, rows = (np.asarray(x)[: len(queries)] for x in lists)
        check_scores(scores)
        return scores, rows


def _excluded_pairs(exclude: Ragged | None, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the exclusions within [first, stop) as pairs (query, item - first), int32 each.

    They are padded with pairs that a scatter drops, so that few shapes are compiled.
    """
    # Without exclusions the arrays are empty, which is one more shape that is compiled.
    if exclude is None:
        return np.zeros(0, np.int32), np.zeros(0, np.int32)
    inside = (exclude.values >= first) & (exclude.values < stop)
    query = exclude.rows[inside]
    item = exclude.values[inside] - first
    size = padded_exclusions(len(item), len(exclude))
    return pad_pairs(query, item, size, num_columns=stop - first)


def padded_exclusions(count: int, num_lists: int) -> int:
    """Returns the number of exclusions to which so many of all lists together are padded.

    >>> [padded_exclusions(20, 1), padded_exclusions(20, 8), padded_exclusions(2_000, 8)]
    [32, 1024, 4096]
    """
    if num_lists == 1 or count > MAX_COARSE:
        return next_power_of_two(count)
    # Each number of lists has programs of its own, which a server compiles before it is ready. What
    # is padded costs little beside the products.
    size = MIN_COARSE
    while size < count:
        size *= 4
    return size

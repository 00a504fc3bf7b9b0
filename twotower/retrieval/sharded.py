"""Exact search of a corpus that is divided over the devices of a mesh: each finds the best of its part, and these are merged.

What moves between devices is K scores and rows of each for every query; no device holds another's items.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from twotower.retrieval.csr import Csr
from twotower.retrieval.exact import (
    BLOCK_BYTES,
    blocked_top_k,
    check_k,
    check_queries,
    check_vectors,
    next_power_of_two,
    pad_pairs,
    pad_rows,
)
from twotower.training.mesh import AXIS, SPLIT, WHOLE, place

MOST_QUERIES = 1_024  # at once


class ShardedIndex:
    """Item vectors divided over a mesh, with the meaning of `ExactIndex`: the same lists, to the order of equal scores."""

    kind = "exact_sharded"

    def __init__(self, vectors: Any, mesh: Mesh, *, normalized: bool = False):
        """Args:
        vectors: float [N, D], which each process has whole (memory-mapped, say); devices get their rows alone.
        normalized: see `ExactIndex`.
        """
        vectors = check_vectors(vectors, what="item")
        self.num_items, self.dim = vectors.shape
        self.normalized, self.mesh = normalized, mesh
        self._rows = max(1, -(-self.num_items // mesh.size))  # of each device
        self._vectors = place(mesh, pad_rows(vectors, self._rows * mesh.size), SPLIT)

    def search(self, queries: Any, k: int, *, exclude: Csr | None = None) -> tuple[np.ndarray, np.ndarray]:
        """See `ExactIndex.search`."""
        queries = check_queries(queries, self.dim, normalized=self.normalized)
        check_k(k)
        if exclude is not None and len(exclude) != len(queries):
            raise ValueError(f"exclude holds {len(exclude)} lists for {len(queries)} queries; give one list a query.")
        scores = np.full((len(queries), k), -np.inf, np.float32)
        rows = np.full((len(queries), k), -1, np.int32)
        step = max(1, min(BLOCK_BYTES // (4 * self._rows), MOST_QUERIES))
        for start in range(0, len(queries), step):
            part = slice(start, min(start + step, len(queries)))
            skip = Csr.empty(0) if exclude is None else exclude.take(np.arange(part.start, part.stop))
            found = self._search(queries[part], min(k, self.num_items), skip)
            for whole, block in zip((scores, rows), found):
                whole[part, : block.shape[1]] = block
        return scores, rows

    def _search(self, queries: np.ndarray, k: int, exclude: Csr) -> tuple[np.ndarray, np.ndarray]:
        if not k:
            return np.zeros((len(queries), 0)), np.zeros((len(queries), 0))
        # The padding of pairs lies beyond every device's rows.
        size, beyond = next_power_of_two(len(exclude.values)), self._rows * self.mesh.size
        pairs = pad_pairs(exclude.rows, exclude.values, size, beyond=beyond)
        given = place(self.mesh, (pad_rows(queries, next_power_of_two(len(queries))), *pairs, np.int32(self.num_items)), WHOLE)
        found = _compiled(self.mesh, self._rows, k)(self._vectors, *given)
        return tuple(np.asarray(x)[: len(queries)] for x in found)


@functools.cache
def _compiled(mesh: Mesh, rows: int, k: int) -> Any:
    """(vectors divided, queries, pairs (query, item) left out, N) -> (scores, rows) [B, k], the same on every device."""

    def search(
        items: Float[Array, "M D"], queries: Float[Array, "B D"], query: Int[Array, " E"], item: Int[Array, " E"],
        count: Int[Array, ""],
    ):  # fmt: skip
        first = jax.lax.axis_index(AXIS) * rows
        scores = jnp.einsum("bd,nd->bn", queries, items, precision=jax.lax.Precision.HIGHEST)
        scores = jnp.where((first + jnp.arange(rows))[None, :] < count, scores, -jnp.inf)
        # A negative place would count from the end: what lies on other devices is put past the end, and dropped.
        local = jnp.where((item >= first) & (item < first + rows), item - first, rows)
        best, places = blocked_top_k(scores.at[query, local].set(-jnp.inf, mode="drop"), min(k, rows))
        # In the order of devices, which is that of rows: of equal scores the lower row stays first.
        best, places = (jax.lax.all_gather(x, AXIS, axis=1, tiled=True) for x in (best, places + first))
        best, at = jax.lax.top_k(best, min(k, best.shape[1]))
        return best, jnp.where(jnp.isneginf(best), -1, jnp.take_along_axis(places, at, axis=1))

    specs = (SPLIT, WHOLE, WHOLE, WHOLE, WHOLE)
    return jax.jit(jax.shard_map(search, mesh=mesh, in_specs=specs, out_specs=(WHOLE, WHOLE), check_vma=False))

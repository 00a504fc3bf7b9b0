"""The programs of exact search: scores of a block of items, and the best of them on each device.

They are apart from `twotower.index.exact` so that a search by another library loads no JAX.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from twotower.core.mesh import AXIS, REPLICATED, SHARDED, SINGLE_DEVICE, device_group, put
from twotower.kernels.device_top_k import merge_top_k, select_top_k


def default_platform() -> str:
    """Returns the kind of the default device: "cpu", "gpu" or "tpu"."""
    return jax.default_backend()


def put_items(mesh: Mesh | None, vectors: np.ndarray) -> jax.Array:
    """Returns a block of vectors on the default device, or divided over those of a mesh."""
    if mesh is None:
        return jnp.asarray(vectors)
    return put(mesh, vectors, SHARDED)


def put_queries(mesh: Mesh | None, arrays: Any) -> Any:
    """Returns what all devices need: on the default device, or on each of a mesh."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, arrays)
    return put(mesh, arrays, REPLICATED)


def _scores(
    queries: Float[Array, "B D"],
    items: Float[Array, "N D"],
    query: Int[Array, " E"],
    item: Int[Array, " E"],
) -> Float[Array, "B N"]:
    """Returns all dot products, -inf for the excluded pairs (query, item)."""
    # HIGHEST: by default accelerators round the factors of a product to fewer bits.
    scores = jnp.einsum("bd,nd->bn", queries, items, precision=jax.lax.Precision.HIGHEST)
    return scores.at[query, item].set(-jnp.inf, mode="drop")


@functools.partial(jax.jit, static_argnames=("count", "size"))
def scores_and_maxima(
    queries: Float[Array, "B D"],
    items: Float[Array, "N D"],
    query: Int[Array, " E"],
    item: Int[Array, " E"],
    count: int,
    size: int,
) -> tuple[Float[Array, "B N"], Float[Array, "B G"]]:
    """Returns the scores of a block and the maxima of groups of `size` neighbours.

    Scores are -inf from the `count`-th item on, where the block is padding.
    """
    scores = _scores(queries, items, query, item)
    scores = scores.at[:, count:].set(-jnp.inf)
    groups = scores.reshape(len(queries), -1, size)
    return scores, groups.max(-1)


@functools.cache
def block_search(mesh: Mesh | None, k: int, recall_target: float) -> Callable[..., Any]:
    """Returns the compiled search of one block of items.

    The function takes the items [M, D] of the block (divided over the mesh), queries [B, D], the
    excluded pairs (query, item), the row of the block's first item, and N. It returns
    (scores, rows) [B, <= k], the same on every device.
    """
    group = device_group(mesh) if mesh else SINGLE_DEVICE

    def search(
        items: Float[Array, "M D"],
        queries: Float[Array, "B D"],
        query: Int[Array, " E"],
        item: Int[Array, " E"],
        first: Int[Array, ""],
        count: Int[Array, ""],
    ) -> tuple[Float[Array, "B K"], Int[Array, "B K"]]:
        # Inside of `shard_map` the items are those of one device, whose rows begin further on.
        rows = first + group.row_numbers(len(items))
        if mesh is None:
            scores = _scores(queries, items, query, item)
        else:
            scores = _scores(queries, items, query, group.local_rows(item, len(items)))
            # The last block ends in rows of padding, so that every device has as many.
            scores = jnp.where(rows[None, :] < count, scores, -jnp.inf)
        # `top_k` puts the NaN of a negative sign, which processors make, behind all others:
        # `check_scores` would not see it.
        scores = jnp.where(jnp.isnan(scores), jnp.nan, scores)
        length = min(k, len(items))
        if recall_target < 1:
            best, positions = jax.lax.approx_max_k(scores, length, recall_target=recall_target)
        else:
            best, positions = select_top_k(scores, length)
        # Excluded items, and padding: of a short list these come back too.
        best_rows = jnp.where(jnp.isneginf(best), -1, rows[positions])
        if mesh is None:
            return best, best_rows
        # In the order of devices, which is that of rows: of equal scores the lower row stays first.
        gathered = jax.lax.all_gather((best, best_rows), AXIS, axis=1, tiled=True)
        best, best_rows = merge_top_k(k, *gathered)
        return best, best_rows

    if mesh is None:
        return jax.jit(search)
    # `check_vma` is off: the outputs are the same on every device after the gathering, which JAX
    # does not infer.
    in_specs = (SHARDED, REPLICATED, REPLICATED, REPLICATED, REPLICATED, REPLICATED)
    sharded = jax.shard_map(
        search,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=(REPLICATED, REPLICATED),
        check_vma=False,
    )
    return jax.jit(sharded)


@functools.partial(jax.jit, static_argnames="k")
def merge_lists(
    scores: Float[Array, "B K"],
    rows: Int[Array, "B K"],
    more_scores: Float[Array, "B M"],
    more_rows: Int[Array, "B M"],
    k: int,
) -> tuple[Float[Array, "B L"], Int[Array, "B L"]]:
    """Returns the best `k` of two lists; those of the first have the lower rows."""
    scores = jnp.concatenate([scores, more_scores], axis=1)
    rows = jnp.concatenate([rows, more_rows], axis=1)
    best, best_rows = merge_top_k(k, scores, rows)
    return best, best_rows

"""Exact evaluation over the whole corpus, in blocks on the device or on a mesh, of which each
device scores its own items."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from twotower.core.arrays import next_power_of_two, pad_pairs, pad_rows, round_up
from twotower.core.errors import ScoreError
from twotower.core.mesh import (
    AXIS,
    REPLICATED,
    SHARDED,
    SINGLE_DEVICE,
    DeviceGroup,
    device_group,
    put,
)
from twotower.core.progress import progress
from twotower.core.ragged import Ragged
from twotower.evaluation import heads, metrics
from twotower.evaluation.queries import Queries, make_queries
from twotower.kernels.top_k import merge_top_k, select_top_k
from twotower.pipeline.prepare import PreparedData
from twotower.retrieval.embed import embed_rows, mesh_of_tables

# The scores [b, N] of the queries in a slice. Where their columns are divided over a mesh, the last
# may be no items.
Scores = Callable[[slice], Any]

BLOCK_BYTES = 2**27  # of scores
LARGEST_BLOCK = 1_024  # queries
COLUMNS = P(None, AXIS)


def evaluate(
    scores_of: Scores,
    queries: Queries,
    ks: Sequence[int],
    *,
    mask_seen: bool,
    block_bytes: int = BLOCK_BYTES,
) -> dict[str, float]:
    """Ranks the whole corpus for every query and averages the metrics over the queries.

    A right answer ranks behind every other item of the same score, so that a model that gives all
    items one score finds nothing. With `mask_seen`, seen items are dropped from the lists and from
    the right answers; queries that are left without a right answer are not averaged, and counted.

    Args:
        scores_of: slice of queries -> float32 [b, N].
        queries: what is asked.
        ks: list lengths.
        mask_seen: whether items that the user had seen are taken out.
        block_bytes: of scores at once.

    Returns:
        name@K for every metric and K, "queries" (averaged over) and "queries_without_answer" (not
        averaged over).

    Raises:
        ScoreError: a score is NaN.
    """
    queries = queries.less_seen() if mask_seen else queries
    asked = queries.num_right > 0
    measured: dict[str, list[np.ndarray]] = {}
    shown = {k: np.zeros(queries.num_items, bool) for k in ks}
    for chosen, size, seen, right in _blocks(queries, block_bytes, mask_seen):
        count = chosen.stop - chosen.start
        scores, asks = scores_of(chosen), (*seen, *right, pad_rows(queries.num_right[chosen], size))
        values, rows = _measured_on(
            mesh_of_tables(scores), _grown(scores, size), asks, queries.counts, tuple(ks)
        )
        if np.isnan(values.pop("poison")):
            raise ScoreError(
                f"Scores of queries {chosen.start} to {chosen.stop - 1} hold NaN; they cannot be ranked."
            )
        for name, value in values.items():
            measured.setdefault(name, []).append(np.asarray(value)[:count])
        for k in ks:
            top = np.asarray(rows)[:count][asked[chosen], :k]
            shown[k][top[top >= 0]] = True
    result = {name: _average(np.concatenate(values), asked) for name, values in measured.items()}
    result |= {
        f"coverage@{k}": float(metrics.coverage(jnp.asarray(items))) for k, items in shown.items()
    }
    return result | {"queries": int(asked.sum()), "queries_without_answer": int((~asked).sum())}


def dot_scores(users: Any, items: Any, *, mesh: Mesh | None = None) -> Scores:
    """Scores of user vectors [Q, D] with item vectors [N, D], which are divided over the `mesh`, if
    there is one."""
    if mesh is None:
        items = jnp.asarray(items)
        return lambda chosen: _dot(jnp.asarray(users[chosen]), items)
    items = put(mesh, pad_rows(items, round_up(len(items), mesh.size)), SHARDED)
    dot = jax.jit(_dot, out_shardings=NamedSharding(mesh, COLUMNS))
    return lambda chosen: dot(put(mesh, users[chosen], REPLICATED), items)


def query_vectors(prepared: PreparedData, model: Any, weights: Any, queries: Queries) -> np.ndarray:
    """float32 [Q, D]"""
    return embed_rows(model, weights, "user", prepared.user_features(queries.user, queries.context))


def model_scores(prepared: PreparedData, model: Any, weights: Any, queries: Queries) -> Scores:
    """The scores of the two towers, on the mesh that the weights are divided over."""
    items = embed_rows(model, weights, "item", prepared.features["item"])
    return dot_scores(
        query_vectors(prepared, model, weights, queries), items, mesh=mesh_of_tables(weights)
    )


def make_validate(prepared: PreparedData, model: Any) -> Callable[[Any], Mapping[str, float]]:
    """weights -> validation metrics, for the training loop; seen items masked, a fixed sample of
    the queries; those of heads as "click/auc", over a fixed sample of as many rows."""
    evaluation = prepared.config.evaluation
    queries = make_queries(prepared, "validation", evaluation.query).sample(
        evaluation.validation_queries
    )
    measure_heads = heads.make_head_metrics(
        prepared, model, "validation", most=evaluation.validation_queries
    )

    def validate(weights: Any) -> dict[str, float]:
        ranked = evaluate(
            model_scores(prepared, model, weights, queries), queries, evaluation.ks, mask_seen=True
        )
        return ranked | heads.flat(measure_heads(weights))

    return validate


@jax.jit
def _dot(users: Float[Array, "B D"], items: Float[Array, "N D"]) -> Float[Array, "B N"]:
    return jnp.einsum("bd,nd->bn", users, items, precision=jax.lax.Precision.HIGHEST)


def _blocks(queries: Queries, block_bytes: int, mask_seen: bool):
    """Yields (slice of queries, size, seen pairs, right pairs). All blocks are to be padded to one
    size, as their pairs are, so that one program serves all."""
    size = max(1, min(block_bytes // (4 * queries.num_items), LARGEST_BLOCK, len(queries)))
    chosen = [
        slice(start, min(start + size, len(queries))) for start in range(0, len(queries), size)
    ]
    # Also where nothing is masked, so that the same program serves both.
    seen_lengths = queries.seen.lengths[queries.user]
    sizes = [
        max((next_power_of_two(int(lengths[part].sum())) for part in chosen), default=1)
        for lengths in (seen_lengths, queries.right.lengths)
    ]
    none = Ragged.empty(size)
    for part in progress(chosen, total=len(chosen), what="Evaluation"):
        lists = (
            queries.seen_of(part) if mask_seen else none,
            queries.right.take(np.arange(part.start, part.stop)),
        )
        yield (
            part,
            size,
            *(
                pad_pairs(csr.rows, csr.values, length, num_columns=queries.num_items)
                for csr, length in zip(lists, sizes)
            ),
        )


def _grown(scores: Any, size: int) -> Float[Array, "B N"]:
    """With rows of zeros up to `size`."""
    scores = jnp.asarray(scores)
    return jnp.pad(scores, ((0, size - len(scores)), (0, 0))) if len(scores) < size else scores


def _measured_on(
    mesh: Mesh | None, scores: Any, asks: tuple[Any, ...], counts: np.ndarray, ks: tuple[int, ...]
) -> Any:
    """`_measure` of arrays of this process."""
    if mesh is None:
        return _measure(scores, *asks, counts, ks=ks)
    padding = scores.shape[1] - len(counts)
    asks, counts = (
        put(mesh, asks, REPLICATED),
        put(mesh, pad_rows(counts.astype(np.int32), scores.shape[1]), SHARDED),
    )
    return _measure(scores, *asks, counts, ks=ks, padding=padding, mesh=mesh)


@functools.partial(jax.jit, static_argnames=("ks", "padding", "mesh"))
def _measure(
    *arrays: Array, ks: tuple[int, ...], padding: int = 0, mesh: Mesh | None = None
) -> Any:
    """Metrics of each query, and the rows of the longest list, the same on every device. "poison"
    is NaN when a score is.

    Args:
        arrays: as of `_measure_part`; with a mesh, the columns of the scores and the counts are
            divided over it.
        padding: so many of the last columns are no items.
    """
    if mesh is None:
        return _measure_part(*arrays, ks=ks, padding=padding, group=SINGLE_DEVICE)
    part = functools.partial(_measure_part, ks=ks, padding=padding, group=device_group(mesh))
    specs = (COLUMNS, REPLICATED, REPLICATED, REPLICATED, REPLICATED, REPLICATED, SHARDED)
    return jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=REPLICATED, check_vma=False)(
        *arrays
    )


def _measure_part(
    scores: Float[Array, "B N"],
    seen_query: Int[Array, " S"],
    seen_item: Int[Array, " S"],
    right_query: Int[Array, " R"],
    right_item: Int[Array, " R"],
    num_right: Int[Array, " B"],
    counts: Int[Array, " N"],
    *,
    ks: tuple[int, ...],
    padding: int,
    group: DeviceGroup,
) -> tuple[dict[str, Array], Int[Array, "B K"]]:
    """`_measure` on one device, which has N of the items."""
    width, num_items = scores.shape[1], scores.shape[1] * group.size - padding
    poison = jnp.where(group.sum(jnp.isnan(scores).any().astype(jnp.int32)) > 0, jnp.nan, 0.0)
    seen_item, right_item = (
        item if group is SINGLE_DEVICE else group.local_rows(item, width)
        for item in (seen_item, right_item)
    )
    scores = scores.astype(jnp.float32).at[seen_query, seen_item].set(-jnp.inf, mode="drop")
    if padding:
        scores = jnp.where((group.row_numbers(width) < num_items)[None, :], scores, -jnp.inf)
    right = jnp.zeros(scores.shape, bool).at[right_query, right_item].set(True, mode="drop")
    best, rows = select_top_k(_behind_equals(scores, right_query, right_item), min(max(ks), width))
    found = (
        best,
        group.row_numbers(width)[rows],
        jnp.take_along_axis(right, rows, axis=1),
        counts[rows],
    )
    best, rows, hits, seen_before = _best_of_all(found, max(ks), group)
    real = ~jnp.isneginf(best)
    hits, rows = hits & real, jnp.where(real, rows, -1)
    # A corpus smaller than K gives lists that end in nothing.
    missing = [(0, 0), (0, max(ks) - rows.shape[1])]
    hits, rows = jnp.pad(hits, missing), jnp.pad(rows, missing, constant_values=-1)
    seen_before, total = jnp.pad(jnp.where(real, seen_before, 0), missing), group.sum(counts.sum())
    values: dict[str, Array] = {"poison": poison}
    for k in ks:
        real = rows[:, :k] >= 0
        for name, metric in metrics.ACCURACY.items():
            values[f"{name}@{k}"] = metric(hits[:, :k], num_right)
        values[f"novelty@{k}"] = metrics.novelty(seen_before[:, :k], total, num_items, where=real)
        values[f"never_trained@{k}"] = metrics.never_trained(seen_before[:, :k], where=real)
    return values, rows


def _best_of_all(lists: tuple[Array, ...], k: int, group: DeviceGroup) -> tuple[Array, ...]:
    """The best `k` of all devices' lists [B, K] of (scores, ...): in the order of devices, which is
    that of rows, so that of equal scores the lower row stays first."""
    if group is SINGLE_DEVICE:
        return lists
    lists = tuple(jax.lax.all_gather(x, AXIS, axis=1, tiled=True) for x in lists)
    return merge_top_k(k, *lists)


def _behind_equals(
    scores: Float[Array, "B N"], query: Int[Array, " R"], item: Int[Array, " R"]
) -> Float[Array, "B N"]:
    """Scores with those of the pairs (query, item) one step lower, so that these sort after their
    equals."""
    tiny = jnp.finfo(jnp.float32).tiny
    # Numbers below `tiny` compare as 0 on some devices, so the steps around 0 are made by hand.
    scores = jnp.where(jnp.abs(scores) < tiny, 0.0, scores)
    own = scores.at[query, item].get(mode="fill", fill_value=1.0)
    lower = jnp.where(own == 0, -tiny, jnp.where(own == tiny, 0.0, jnp.nextafter(own, -jnp.inf)))
    return scores.at[query, item].set(lower, mode="drop")


def _average(values: np.ndarray, where: np.ndarray) -> float:
    return float(values[where].mean(dtype=np.float64)) if where.any() else 0.0

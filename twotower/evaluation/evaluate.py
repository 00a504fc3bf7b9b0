"""Exact evaluation: every query ranks the whole corpus, a block of queries at a time.

On a mesh each device scores and ranks its own items, and only lists of the best are exchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from twotower.config import Config
from twotower.core.arrays import next_power_of_two, pad_pairs, pad_rows, round_up
from twotower.core.errors import ScoreError, choose
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
from twotower.retrieval.embed import embed_rows, find_mesh
from twotower.towers.two_tower import TwoTower, Weights

# A slice of the queries -> their scores, float32 [b, N]. Where the columns are divided over a mesh,
# there may be more of them than items; the last ones are then padding.
Scores = Callable[[slice], jax.Array | np.ndarray]

BLOCK_BYTES = 2**27  # bytes of scores that are held at once
MAX_BLOCK_QUERIES = 1_024
# Each device has the scores of all queries for its own part of the items.
COLUMNS = P(None, AXIS)


def evaluate(
    score_block: Scores,
    queries: Queries,
    ks: Sequence[int],
    *,
    mask_seen: bool,
    block_bytes: int = BLOCK_BYTES,
) -> dict[str, float]:
    """Ranks the whole corpus for every query and averages the metrics over the queries.

    A relevant item ranks behind every other item of the same score, so that a model that gives all
    items one score finds nothing. Queries without a relevant item are counted, not averaged.

    Args:
        score_block: Function from a slice of the queries to their scores, float32 [b, N].
        queries: Queries with their relevant and their seen items.
        ks: Lengths of the lists.
        mask_seen: Whether items that the user had seen are taken out of the lists, and out of the
            relevant items.
        block_bytes: bytes of scores that are held at once.

    Returns:
        "name@K" for every metric and K, "queries" (the number that is averaged) and
        "queries_without_answer" (the number that is not).

    Raises:
        ScoreError: A score is NaN.
    """
    # Both halves belong together: an item that no list may hold would count as missed.
    if mask_seen:
        queries = queries.without_seen()
    answerable = queries.num_relevant > 0
    per_query: dict[str, list[np.ndarray]] = {}
    recommended = {k: np.zeros(queries.num_items, bool) for k in ks}
    for block, pairs in _blocks(queries, block_bytes, mask_seen=mask_seen):
        count = block.stop - block.start
        # The last block is as long as the others, so that one program serves all.
        scores = _pad_queries(score_block(block), len(pairs.num_relevant))
        values, lists = _measure_block(scores, pairs, queries.counts, tuple(ks))
        # Refused, not ranked: NaN has no order, so any figure of it would be arbitrary.
        if values.pop("has_nan"):
            raise ScoreError(
                f"Scores of queries {block.start} to {block.stop - 1} hold NaN; "
                "they cannot be ranked."
            )
        for name, value in values.items():
            per_query.setdefault(name, []).append(np.asarray(value)[:count])
        # Coverage is over the same queries as the means.
        lists = np.asarray(lists)[:count][answerable[block]]
        for k in ks:
            listed = lists[:, :k]
            # -1 ends a list that could not be filled.
            recommended[k][listed[listed >= 0]] = True
    result: dict[str, float] = {}
    for name, values in per_query.items():
        result[name] = _average(np.concatenate(values), answerable)
    for k, items in recommended.items():
        result[f"coverage@{k}"] = float(metrics.coverage(jnp.asarray(items)))
    result["queries"] = int(answerable.sum())
    result["queries_without_answer"] = int((~answerable).sum())
    return result


def dot_scores(
    users: np.ndarray | jax.Array, items: np.ndarray | jax.Array, *, mesh: Mesh | None = None
) -> Scores:
    """Makes scores of user vectors [Q, D] with item vectors [N, D].

    Args:
        users: Vectors of the queries' users.
        items: Vectors of the corpus.
        mesh: Devices that the items are divided over, if any.
    """
    if mesh is None:
        items = jnp.asarray(items)
        return lambda block: _dot(jnp.asarray(users[block]), items)
    # Equal parts: the last device has rows of zeros, which `_mask_scores` keeps out of lists.
    padded = pad_rows(np.asarray(items), round_up(len(items), mesh.size))
    parts = put(mesh, padded, SHARDED)
    # Scores stay divided by columns, so that no device needs room for all of them.
    dot = jax.jit(_dot, out_shardings=NamedSharding(mesh, COLUMNS))
    return lambda block: dot(put(mesh, users[block], REPLICATED), parts)


def query_vectors(
    prepared: PreparedData, model: TwoTower, weights: Weights, queries: Queries
) -> np.ndarray:
    """Returns the user vectors of the queries, float32 [Q, D]."""
    # The context is the query's own: its time and its history, not those of the user today.
    features = prepared.user_features(queries.user, queries.context)
    return embed_rows(model, weights, "user", features)


def model_scores(
    prepared: PreparedData, model: TwoTower, weights: Weights, queries: Queries
) -> Scores:
    """Makes the scores that the two towers give, on the mesh that the weights are divided over."""
    items = embed_rows(model, weights, "item", prepared.features["item"])
    users = query_vectors(prepared, model, weights, queries)
    return dot_scores(users, items, mesh=find_mesh(weights))


def make_validate(
    prepared: PreparedData, model: TwoTower
) -> Callable[[Weights], Mapping[str, float]]:
    """Makes the function from weights to validation metrics that the training loop calls.

    Seen items are masked. Queries are a fixed sample of `config.evaluation.validation_queries`; the
    metrics of heads, named "click/auc", are over a fixed sample of as many rows.
    """
    evaluation = prepared.config.evaluation
    # Made once: all validations of a training measure the same queries and rows.
    every_query = make_queries(prepared, "validation", evaluation.query)
    queries = every_query.sample(evaluation.validation_queries)
    measure_heads = heads.make_head_metrics(
        prepared, model, "validation", max_rows=evaluation.validation_queries
    )

    def validate(weights: Weights) -> dict[str, float]:
        scores = model_scores(prepared, model, weights, queries)
        ranking = evaluate(scores, queries, evaluation.ks, mask_seen=True)
        return ranking | heads.flatten_metrics(measure_heads(weights))

    return validate


def check_metric_name(config: Config) -> None:
    """Refuses, before any data is read, a metric that no validation measures.

    Raises:
        ConfigError: `config.training.metric` is not known; the message names the nearest.
    """
    # Without validation rows nothing is measured, and the name is not read.
    if not config.split.validation:
        return
    names = (*metrics.RANKING_METRICS, "novelty", "never_trained", "coverage")
    # Numbers of queries are measured too; that they choose no checkpoint is said by training.
    known = ["queries", "queries_without_answer"]
    synonyms = {}
    for k in config.evaluation.ks:
        known += [f"{name}@{k}" for name in names]
        # A metric without a length of lists is a slip too.
        words = metrics.SYNONYMS | dict(zip(names, names))
        for word, name in words.items():
            synonyms[f"{word}@{k}"] = f"{name}@{k}"
            synonyms.setdefault(word, f"{name}@{k}")
    for head in config.objective.heads:
        known += [f"{head}/{name}" for name in heads.HEAD_METRICS]
    choose(
        dict.fromkeys(known), config.training.metric, "config.training.metric", synonyms=synonyms
    )


class _Pairs(NamedTuple):
    """Seen and relevant items of a block of queries, as pairs (query of the block, item).

    All blocks are padded to the same numbers of pairs and queries, so that one program serves all.
    """

    seen_query: jax.Array | np.ndarray  # int32 [S]
    seen_item: jax.Array | np.ndarray  # int32 [S]
    relevant_query: jax.Array | np.ndarray  # int32 [R]
    relevant_item: jax.Array | np.ndarray  # int32 [R]
    num_relevant: jax.Array | np.ndarray  # int32 [B]


@jax.jit
def _dot(users: Float[Array, "B D"], items: Float[Array, "N D"]) -> Float[Array, "B N"]:
    # The default precision of a TPU or GPU would round scores to eight or eleven bits.
    return jnp.einsum("bd,nd->bn", users, items, precision=jax.lax.Precision.HIGHEST)


def _blocks(
    queries: Queries, block_bytes: int, *, mask_seen: bool
) -> Iterator[tuple[slice, _Pairs]]:
    """Yields slices of the queries with their pairs; no seen pairs without `mask_seen`."""
    queries_that_fit = block_bytes // (4 * queries.num_items)  # four bytes a score
    size = max(1, min(queries_that_fit, MAX_BLOCK_QUERIES, len(queries)))
    starts = range(0, len(queries), size)
    blocks = [slice(start, min(start + size, len(queries))) for start in starts]
    # Room for seen pairs also where none are masked, so that the same program serves both.
    seen_size = _max_pairs(queries.seen.lengths[queries.user], blocks)
    relevant_size = _max_pairs(queries.relevant.lengths, blocks)
    num_items = queries.num_items

    for block in progress(blocks, total=len(blocks), what="Evaluation"):
        seen = Ragged.empty(size)
        if mask_seen:
            seen = queries.seen_lists(block)
        relevant = queries.relevant.take(np.arange(block.start, block.stop))
        # Pairs of padding name the column past the last item. Scatters drop it; where a mesh has
        # such a column, it is no item and is masked.
        seen_pairs = pad_pairs(seen.rows, seen.values, seen_size, num_columns=num_items)
        relevant_pairs = pad_pairs(
            relevant.rows, relevant.values, relevant_size, num_columns=num_items
        )
        num_relevant = pad_rows(queries.num_relevant[block], size)
        yield block, _Pairs(*seen_pairs, *relevant_pairs, num_relevant)


def _max_pairs(lengths: np.ndarray, blocks: Sequence[slice]) -> int:
    """Returns the size that the pairs of every block fit in."""
    # A power of two, so that evaluations of nearly as many pairs share a compiled program.
    return max((next_power_of_two(int(lengths[block].sum())) for block in blocks), default=1)


def _pad_queries(scores: jax.Array | np.ndarray, size: int) -> Float[Array, "B N"]:
    """Returns the scores with rows of zeros up to `size` queries."""
    scores = jnp.asarray(scores)
    if len(scores) == size:
        return scores
    return jnp.pad(scores, ((0, size - len(scores)), (0, 0)))


def _measure_block(
    scores: Float[Array, "B N"], pairs: _Pairs, counts: np.ndarray, ks: tuple[int, ...]
) -> tuple[dict[str, Array], Int[Array, "B K"]]:
    """Measures a block on the devices that the columns of its scores are divided over."""
    mesh = find_mesh(scores)
    if mesh is None:
        return _measure(scores, pairs, counts, ks=ks)
    width = scores.shape[1]
    # Pairs are few: every device gets all of them and keeps those of its own columns.
    return _measure(
        scores,
        put(mesh, pairs, REPLICATED),
        put(mesh, pad_rows(counts.astype(np.int32), width), SHARDED),
        ks=ks,
        padding=width - len(counts),
        mesh=mesh,
    )


@functools.partial(jax.jit, static_argnames=("ks", "padding", "mesh"))
def _measure(
    scores: Float[Array, "B N"],
    pairs: _Pairs,
    counts: Int[Array, " N"],
    *,
    ks: tuple[int, ...],
    padding: int = 0,
    mesh: Mesh | None = None,
) -> tuple[dict[str, Array], Int[Array, "B K"]]:
    """Ranks the items of each query and measures the lists.

    Args:
        scores: Scores of every item; with a mesh their columns are divided over it.
        pairs: Seen and relevant items.
        counts: Number of training rows of each item, divided over the mesh as well.
        ks: Lengths of the lists.
        padding: Number of the last columns that are no items.
        mesh: Devices that share the items, if any.

    Returns:
        The metrics of each query [B] by name with "has_nan", whether any score is NaN; and the
        longest lists, rows of items best first and -1 where no item is left. Both are the same on
        every device.
    """
    if mesh is None:
        return _measure_part(scores, pairs, counts, ks=ks, padding=padding, group=SINGLE_DEVICE)
    part = functools.partial(_measure_part, ks=ks, padding=padding, group=device_group(mesh))
    specs = (COLUMNS, REPLICATED, SHARDED)
    # Unchecked, since JAX cannot see that all_gather and top_k leave the same on every device.
    divided = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=REPLICATED, check_vma=False)
    return divided(scores, pairs, counts)


def _measure_part(
    scores: Float[Array, "B N"],
    pairs: _Pairs,
    counts: Int[Array, " N"],
    *,
    ks: tuple[int, ...],
    padding: int,
    group: DeviceGroup,
) -> tuple[dict[str, Array], Int[Array, "B K"]]:
    """Measures the lists as `_measure` does, on one device of a group, which has N of the items."""
    max_k = max(ks)
    # Before masking, which could hide a NaN.
    is_nan = jnp.isnan(scores)
    has_nan = group.sum(is_nan.any().astype(jnp.int32)) > 0
    if group is not SINGLE_DEVICE:
        width = scores.shape[1]
        # Items of other devices get the column past the end, which scatters drop.
        pairs = pairs._replace(
            seen_item=group.local_rows(jnp.asarray(pairs.seen_item), width),
            relevant_item=group.local_rows(jnp.asarray(pairs.relevant_item), width),
        )
    scores = _mask_scores(scores, pairs, padding, group)
    best, rows, hits, trained = _top_lists(scores, pairs, counts, max_k, group)
    # A list longer than what masking leaves ends in masked items, which are no part of it.
    listed = ~jnp.isneginf(best)
    # A corpus smaller than K gives lists that end in nothing.
    missing = [(0, 0), (0, max_k - rows.shape[1])]
    hits = jnp.pad(hits & listed, missing)
    rows = jnp.pad(jnp.where(listed, rows, -1), missing, constant_values=-1)
    trained = jnp.pad(jnp.where(listed, trained, 0), missing)
    num_relevant = jnp.asarray(pairs.num_relevant)
    # Columns of padding have a count of 0.
    total = group.sum(counts.sum())
    num_items = scores.shape[1] * group.size - padding
    values: dict[str, Array] = {"has_nan": has_nan}
    for k in ks:
        listed = rows[:, :k] >= 0
        # Without a mask: a list that could not be filled is still K long to these.
        for name, metric in metrics.RANKING_METRICS.items():
            values[f"{name}@{k}"] = metric(hits[:, :k], num_relevant)
        values[f"novelty@{k}"] = metrics.novelty(trained[:, :k], total, num_items, where=listed)
        values[f"never_trained@{k}"] = metrics.never_trained(trained[:, :k], where=listed)
    return values, rows


def _mask_scores(
    scores: Float[Array, "B N"], pairs: _Pairs, padding: int, group: DeviceGroup
) -> Float[Array, "B N"]:
    """Returns the scores with -inf for seen items and for columns that are no items."""
    scores = scores.astype(jnp.float32)
    # -inf, not a low score: where fewer than K items remain, seen ones must not come back.
    scores = scores.at[pairs.seen_query, pairs.seen_item].set(-jnp.inf, mode="drop")
    if not padding:
        return scores
    width = scores.shape[1]
    is_item = group.row_numbers(width) < width * group.size - padding
    return jnp.where(is_item[None, :], scores, -jnp.inf)


def _top_lists(
    scores: Float[Array, "B N"],
    pairs: _Pairs,
    counts: Int[Array, " N"],
    k: int,
    group: DeviceGroup,
) -> tuple[Array, ...]:
    """Returns the best `k` items of all devices, best first.

    Returns:
        Arrays [B, <= k]: scores, rows of items, whether each is relevant, and its training rows.
    """
    width = scores.shape[1]
    relevant = jnp.zeros(scores.shape, bool)
    relevant = relevant.at[pairs.relevant_query, pairs.relevant_item].set(True, mode="drop")
    ranked = _relevant_behind_equals(scores, pairs)
    best, columns = select_top_k(ranked, min(k, width))
    hits = jnp.take_along_axis(relevant, columns, axis=1)
    lists = (best, group.row_numbers(width)[columns], hits, counts[columns])
    if group is SINGLE_DEVICE:
        return lists
    # In the order of devices, which is that of rows: of equal scores the lower row stays first.
    gathered = [jax.lax.all_gather(x, AXIS, axis=1, tiled=True) for x in lists]
    return tuple(jnp.asarray(x) for x in merge_top_k(k, *gathered))


def _relevant_behind_equals(scores: Float[Array, "B N"], pairs: _Pairs) -> Float[Array, "B N"]:
    """Returns scores in which those of relevant items are one step of float32 lower.

    The relevant items then sort after their equals, and before all that is really lower.
    """
    positions = (pairs.relevant_query, pairs.relevant_item)
    tiny = jnp.finfo(jnp.float32).tiny
    # Numbers below `tiny` compare as 0 on some devices, so the steps around 0 are made by hand.
    scores = jnp.where(jnp.abs(scores) < tiny, 0.0, scores)
    # Pairs of padding read 1, which is written nowhere.
    relevant_scores = scores.at[positions].get(mode="fill", fill_value=1.0)
    next_lower = jnp.nextafter(relevant_scores, -jnp.inf)
    next_lower = jnp.where(relevant_scores == tiny, 0.0, next_lower)
    next_lower = jnp.where(relevant_scores == 0, -tiny, next_lower)
    return scores.at[positions].set(next_lower, mode="drop")


def _average(values: np.ndarray, where: np.ndarray) -> float:
    if not where.any():
        return 0.0
    # In float64: a sum of many float32 values loses digits.
    return float(values[where].mean(dtype=np.float64))

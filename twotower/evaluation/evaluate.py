"""Exact evaluation: every query ranks the whole corpus, a block of queries at a time.

On a mesh each device scores and ranks its own items, and only lists of the best are exchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from twotower.config import Config
from twotower.core.arrays import Ragged, next_power_of_two, pad_pairs, pad_rows, round_up
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
from twotower.evaluation import heads, metrics
from twotower.evaluation.further import FurtherMetrics
from twotower.evaluation.lists import Evaluation, Lists
from twotower.evaluation.queries import Queries, make_queries
from twotower.kernels.device_top_k import merge_top_k, select_top_k
from twotower.kernels.top_k import GROUP, RunningTopK, with_maxima
from twotower.pipeline.prepare import PreparedData
from twotower.retrieval.embed import embed_rows, find_mesh
from twotower.towers.two_tower import TwoTower, Weights

# A slice of the queries -> their scores, float32 [b, N]. Where the columns are divided over a mesh,
# there may be more of them than items; the last ones are then padding.
Scores = Callable[[slice], jax.Array | np.ndarray]

BLOCK_BYTES = 2**27  # bytes of scores that an accelerator holds at once
# A CPU: what its caches help with, and below what the system hands out page by page, see
# `twotower.index.exact`.
HOST_BLOCK_BYTES = 2**25 - 2**20
MAX_BLOCK_QUERIES = 1_024
VALIDATION_SHARE = 0.1  # greatest share of a training that validations take
# The standard error of a recall over them is at most 1.6 percent.
MIN_VALIDATION_QUERIES = 1_000
NOTHING_FURTHER = FurtherMetrics()
# Each device has the scores of all queries for its own part of the items.
COLUMNS = P(None, AXIS)


def evaluate(
    score_block: Scores,
    queries: Queries,
    ks: Sequence[int],
    *,
    mask_seen: bool,
    block_bytes: int = 0,
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
        block_bytes: Bytes of scores that are held at once; 0 for what suits the device.

    Returns:
        "name@K" for every metric and K, "queries" (the number that is averaged) and
        "queries_without_answer" (the number that is not).

    Raises:
        ScoreError: A score is NaN.
    """
    modes = (mask_seen,)
    (evaluation,) = _evaluate_modes(score_block, queries, ks, modes, block_bytes)
    return evaluation.figures


def evaluate_both(
    score_block: Scores,
    queries: Queries,
    ks: Sequence[int],
    *,
    further: FurtherMetrics = NOTHING_FURTHER,
) -> tuple[Evaluation, Evaluation]:
    """Evaluates with seen items masked and without, and scores each query once for both.

    Args:
        score_block: Function from a slice of the queries to their scores, float32 [b, N].
        queries: Queries with their relevant and their seen items.
        ks: Lengths of the lists.
        further: Metrics that take longer.

    Returns:
        What `evaluate` measures with `mask_seen`, and without.
    """
    modes = (True, False)
    masked, unmasked = _evaluate_modes(
        score_block, queries, ks, modes, further=further, resampled=True
    )
    return masked, unmasked


def evaluate_masked(score_block: Scores, queries: Queries, ks: Sequence[int]) -> Evaluation:
    """Evaluates with seen items masked, figure by figure and query by query; see `evaluate`."""
    (masked,) = _evaluate_modes(score_block, queries, ks, (True,), resampled=True)
    return masked


def _evaluate_modes(
    score_block: Scores,
    queries: Queries,
    ks: Sequence[int],
    modes: Sequence[bool],
    block_bytes: int = 0,
    *,
    further: FurtherMetrics = NOTHING_FURTHER,
    resampled: bool = False,
) -> list[Evaluation]:
    """Returns what `evaluate` measures for each value of `mask_seen`."""
    size = _block_queries(queries, block_bytes)
    lists = [
        Lists(queries, ks, size, mask_seen=mask_seen, further=further, resampled=resampled)
        for mask_seen in modes
    ]
    starts = range(0, len(queries), size)
    blocks = [slice(start, min(start + size, len(queries))) for start in starts]
    ranker: _Ranker | None = None
    for block in progress(blocks, total=len(blocks), what="Evaluation"):
        scores = score_block(block)
        if ranker is None:
            ranker = _make_ranker(scores, queries, blocks, max(ks))
        relevant = queries.relevant.take(np.arange(block.start, block.stop))
        # Refused, not ranked: NaN has no order, so any figure of it would be arbitrary.
        ranker.read(scores, relevant)
        if ranker.has_nan:
            raise ScoreError(
                f"Scores of queries {block.start} to {block.stop - 1} hold NaN; "
                "they cannot be ranked."
            )
        # Lists without masks first: a ranker may write masks into its scores.
        for part in sorted(lists, key=lambda part: part.mask_seen):
            seen = Ragged.empty(block.stop - block.start)
            if part.mask_seen:
                seen = queries.seen_lists(block)
            part.add(block, ranker.rank(seen))
        if further.auc:
            # Of every item, so on the host: they come from the device that ranked them.
            every_score = np.asarray(scores)[:, : queries.num_items]
            for part in lists:
                part.add_scores(block, every_score)
    return [part.evaluation() for part in lists]


@runtime_checkable
class _Ranker(Protocol):
    """Ranks the items of a block of queries; the scores stay where they are until the next block.

    Attributes:
        has_nan: Whether any score of the block is NaN.
    """

    has_nan: bool

    def read(self, scores: Any, relevant: Ragged) -> None:
        """Takes the scores [b, N] of a block, and its relevant items, which go behind equals."""
        ...

    def rank(self, seen: Ragged) -> np.ndarray:
        """Returns the best items of each query that are not in its list of `seen`.

        Rows int [b, K], best first, and -1 where no item is left. The items of a list stay out of
        all later lists of the block.
        """
        ...


class _HostRanker:
    """Ranks by NumPy, which on a CPU is several times as fast as XLA and compiles nothing."""

    def __init__(self, size: int, num_items: int, k: int):
        self.has_nan = False
        self._num_items = num_items
        self._k = k
        # One buffer for all blocks, padded to whole groups of scores once.
        shape = (size, round_up(num_items, GROUP))
        self._buffer = np.full(shape, -np.inf, np.float32)

    def read(self, scores: Any, relevant: Ragged) -> None:
        self._scores = self._buffer[: len(scores)]
        # A copy also of an array that could be written to: it may be the caller's own.
        self._scores[:, : self._num_items] = scores
        position = (relevant.rows, relevant.values)
        # The next lower number: behind all equals, and before all that is really lower.
        self._scores[position] = np.nextafter(self._scores[position], np.float32(-np.inf))
        _, self._maxima = with_maxima(self._scores, self._k)
        # A maximum is NaN where any score of its group is.
        self.has_nan = bool(np.isnan(self._maxima).any())

    def rank(self, seen: Ragged) -> np.ndarray:
        # -inf, not a low score: where fewer than K items remain, seen ones must not come back.
        self._scores[seen.rows, seen.values] = -np.inf
        group = self._scores.shape[1] // self._maxima.shape[1]
        # Only these groups have another maximum than before.
        changed = (seen.rows, seen.values // group)
        by_group = self._scores.reshape(*self._maxima.shape, group)
        self._maxima[changed] = by_group[changed].max(-1)
        lists = RunningTopK(len(self._scores), self._k)
        lists.add(self._scores, 0, self._maxima)
        best, rows = lists.best()
        missing = self._k - rows.shape[1]
        # Masked and padded items are no part of a list.
        listed = np.where(np.isneginf(best), -1, rows)
        return np.pad(listed, [(0, 0), (0, missing)], constant_values=-1)


class _DeviceRanker:
    """Ranks by a compiled program, on one accelerator or on those that divide the columns."""

    def __init__(self, queries: Queries, blocks: Sequence[slice], k: int):
        self.has_nan = False
        self._k = k
        self._num_items = queries.num_items
        self._size = blocks[0].stop if blocks else 1
        # Padded to one size for all blocks, so that one program serves all.
        self._num_seen = _max_pairs(queries.seen.lengths[queries.seen_row], blocks)
        self._num_relevant = _max_pairs(queries.relevant.lengths, blocks)

    def read(self, scores: Any, relevant: Ragged) -> None:
        self._count = len(scores)
        self._scores = _pad_queries(scores, self._size)
        self._relevant = self._pairs(relevant, self._num_relevant)
        self.has_nan = bool(jnp.isnan(self._scores).any())

    def rank(self, seen: Ragged) -> np.ndarray:
        pairs = _Pairs(*self._pairs(seen, self._num_seen), *self._relevant)
        rows = _rank_block(self._scores, pairs, self._num_items, self._k)
        return np.asarray(rows)[: self._count]

    def _pairs(self, lists: Ragged, size: int) -> tuple[np.ndarray, np.ndarray]:
        # Pairs of padding name the column past the last item. Scatters drop it; where a mesh has
        # such a column, it is no item and is masked.
        return pad_pairs(lists.rows, lists.values, size, num_columns=self._num_items)


def _make_ranker(
    scores: jax.Array | np.ndarray, queries: Queries, blocks: Sequence[slice], k: int
) -> _Ranker:
    """Makes the ranker for the device that the scores are on."""
    is_divided = isinstance(scores, jax.Array) and find_mesh(scores) is not None
    if is_divided or jax.default_backend() != "cpu":
        return _DeviceRanker(queries, blocks, k)
    return _HostRanker(blocks[0].stop, queries.num_items, k)


def dot_scores(
    users: np.ndarray | jax.Array, items: np.ndarray | jax.Array, *, mesh: Mesh | None = None
) -> Scores:
    """Makes scores of user vectors [Q, D] with item vectors [N, D].

    Args:
        users: Vectors of the queries' users.
        items: Vectors of the corpus.
        mesh: Devices that the items are divided over, if any.
    """
    if mesh is None and jax.default_backend() == "cpu":
        # NumPy multiplies as fast as XLA there, and needs no program for each shape.
        users = np.asarray(users)
        columns = np.asarray(items).T
        return lambda block: users[block] @ columns
    if mesh is None:
        items = jnp.asarray(items)
        return lambda block: _dot(jnp.asarray(users[block]), items)
    # Equal parts: the last device has rows of zeros, which `_mask_scores` keeps out of lists.
    padded = pad_rows(np.asarray(items), round_up(len(items), mesh.size))
    parts = put(mesh, padded, SHARDED)
    # Scores stay divided by columns, so that no device needs room for all of them.
    dot = jax.jit(_dot, out_shardings=NamedSharding(mesh, COLUMNS))
    return lambda block: dot(put(mesh, users[block], REPLICATED), parts)


def rows_of_scores(scores: Scores, rows: np.ndarray) -> Scores:
    """Returns the scores of some queries alone.

    Args:
        scores: Scores of vectors, see `dot_scores`, whose queries any index may choose.
        rows: Positions of the queries, int [R].
    """
    # An index in the place of the slice, which other scores do not take.
    index: Any = rows
    return lambda block: scores(index[block])


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

    Seen items are masked. Queries are a fixed sample of `config.evaluation.validation_queries`, of
    fewer where they would take over a tenth of the training; the metrics of heads, named
    "click/auc", and of a loss on labels, named "label/auc", are over a fixed sample of rows.
    """
    evaluation = prepared.config.evaluation
    # Made once: all validations of a training measure the same queries and rows.
    queries = validation_queries(prepared)
    measure_heads = heads.make_head_metrics(
        prepared, model, "validation", max_rows=evaluation.validation_queries
    )

    def validate(weights: Weights) -> dict[str, float]:
        scores = model_scores(prepared, model, weights, queries)
        ranking = evaluate(scores, queries, evaluation.ks, mask_seen=True)
        return ranking | heads.flatten_metrics(measure_heads(weights))

    return validate


def validation_queries(prepared: PreparedData) -> Queries:
    """Returns the fixed sample of queries that each validation of a run asks; see `make_validate`.

    Args:
        prepared: Data of the run.
    """
    evaluation = prepared.config.evaluation
    affordable = _affordable_queries(prepared)
    wanted = evaluation.validation_queries
    count = affordable
    if wanted:
        count = min(wanted, affordable)
    queries = make_queries(prepared, "validation", evaluation.query, sample=count)
    if len(queries) == affordable != wanted:
        logging.info(
            "Validations ask %d queries: more would take over a tenth of the training (raise "
            "config.training.validate_every for more).",
            affordable,
        )
    return queries


def _affordable_queries(prepared: PreparedData) -> int:
    """Returns the number of queries that take a tenth of the steps between two validations.

    By the products alone, 2 N D operations a query and 6 B^2 D a step (forward, and backward to
    both sides), so that the number is the same on any machine.
    """
    training = prepared.config.training.scaled_to(prepared.num_examples)
    # An example of whole sequences holds many queries.
    positions = prepared.num_positions / prepared.num_examples
    step = 6 * training.batch_size**2 * positions
    query = 2 * len(prepared.items)
    affordable = VALIDATION_SHARE * training.validate_every * step / query
    return max(MIN_VALIDATION_QUERIES, int(affordable))


def check_metric_name(config: Config) -> None:
    """Refuses, before any data is read, a metric that no validation measures.

    Raises:
        ConfigError: `config.training.metric` is not known; the message names the nearest.
    """
    # Without validation rows nothing is measured, and the name is not read.
    if not config.split.validation:
        return
    names = (*metrics.RANKING_METRICS, *metrics.LIST_METRICS, *metrics.CORPUS_METRICS)
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
    for task in heads.label_tasks(config.objective):
        known += [f"{task}/{name}" for name in heads.HEAD_METRICS]
        for name in heads.HEAD_METRICS:
            synonyms.setdefault(name, f"{task}/{name}")
    choose(
        dict.fromkeys(known), config.training.metric, "config.training.metric", synonyms=synonyms
    )


class _Pairs(NamedTuple):
    """Seen and relevant items of a block of queries, as pairs (query of the block, item)."""

    seen_query: jax.Array | np.ndarray  # int32 [S]
    seen_item: jax.Array | np.ndarray  # int32 [S]
    relevant_query: jax.Array | np.ndarray  # int32 [R]
    relevant_item: jax.Array | np.ndarray  # int32 [R]


@jax.jit
def _dot(users: Float[Array, "B D"], items: Float[Array, "N D"]) -> Float[Array, "B N"]:
    # The default precision of a TPU or GPU would round scores to eight or eleven bits.
    return jnp.einsum("bd,nd->bn", users, items, precision=jax.lax.Precision.HIGHEST)


def _block_queries(queries: Queries, block_bytes: int) -> int:
    """Returns the number of queries that are scored at once."""
    if not block_bytes:
        on_host = jax.default_backend() == "cpu"
        block_bytes = HOST_BLOCK_BYTES if on_host else BLOCK_BYTES
    queries_that_fit = block_bytes // (4 * queries.num_items)  # four bytes a score
    return max(1, min(queries_that_fit, MAX_BLOCK_QUERIES, len(queries)))


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


def _rank_block(
    scores: Float[Array, "B N"], pairs: _Pairs, num_items: int, k: int
) -> Int[Array, "B K"]:
    """Ranks a block on the devices that the columns of its scores are divided over."""
    mesh = find_mesh(scores)
    if mesh is None:
        return _rank(scores, pairs, k=k)
    # Pairs are few: every device gets all of them and keeps those of its own columns.
    pairs = put(mesh, pairs, REPLICATED)
    return _rank(scores, pairs, k=k, padding=scores.shape[1] - num_items, mesh=mesh)


@functools.partial(jax.jit, static_argnames=("k", "padding", "mesh"))
def _rank(
    scores: Float[Array, "B N"],
    pairs: _Pairs,
    *,
    k: int,
    padding: int = 0,
    mesh: Mesh | None = None,
) -> Int[Array, "B K"]:
    """Ranks the items of each query.

    Args:
        scores: Scores of every item; with a mesh their columns are divided over it.
        pairs: Seen and relevant items.
        k: Length of the lists.
        padding: Number of the last columns that are no items.
        mesh: Devices that share the items, if any.

    Returns:
        Rows of items, best first and -1 where no item is left, the same on every device.
    """
    if mesh is None:
        return _rank_part(scores, pairs, k=k, padding=padding, group=SINGLE_DEVICE)
    part = functools.partial(_rank_part, k=k, padding=padding, group=device_group(mesh))
    specs = (COLUMNS, REPLICATED)
    # Unchecked, since JAX cannot see that all_gather and top_k leave the same on every device.
    divided = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=REPLICATED, check_vma=False)
    return divided(scores, pairs)


def _rank_part(
    scores: Float[Array, "B N"], pairs: _Pairs, *, k: int, padding: int, group: DeviceGroup
) -> Int[Array, "B K"]:
    """Ranks as `_rank` does, on one device of a group, which has N of the items."""
    width = scores.shape[1]
    if group is not SINGLE_DEVICE:
        # Items of other devices get the column past the end, which scatters drop.
        pairs = pairs._replace(
            seen_item=group.local_rows(jnp.asarray(pairs.seen_item), width),
            relevant_item=group.local_rows(jnp.asarray(pairs.relevant_item), width),
        )
    scores = _mask_scores(scores, pairs, padding, group)
    best, columns = select_top_k(_relevant_behind_equals(scores, pairs), min(k, width))
    rows = group.row_numbers(width)[columns]
    if group is not SINGLE_DEVICE:
        # In the order of devices, which is that of rows: of equals the lower row stays first.
        lists = [jax.lax.all_gather(x, AXIS, axis=1, tiled=True) for x in (best, rows)]
        best, rows = merge_top_k(k, jnp.asarray(lists[0]), jnp.asarray(lists[1]))
    # A list longer than what masking leaves ends in masked items, which are no part of it, and a
    # corpus smaller than K gives lists that end in nothing.
    listed = jnp.where(jnp.isneginf(best), -1, rows)
    missing = [(0, 0), (0, k - rows.shape[1])]
    return jnp.pad(listed, missing, constant_values=-1)


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

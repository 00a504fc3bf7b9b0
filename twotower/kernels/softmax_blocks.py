"""The arithmetic of one block of queries of `twotower.kernels.streaming_softmax`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# The greatest logit of a query may lie this far below its bound, in nats. The exponential of -60 is
# as many nats from the least normal number of float32 as matter beside it.
_MAX_SPREAD = 60.0


class GradientInputs(NamedTuple):
    """Inputs that the loss is differentiated by: vectors, and the logits that are known before."""

    queries: Float[Array, "B D"]
    items: Float[Array, "C D"]
    positive: Float[Array, "B"]
    hard: Float[Array, "B H"]
    scale: Float[Array, ""]
    bias: Float[Array, ""]
    weights: Float[Array, "B"]


class LossIds(NamedTuple):
    """Inputs of the loss that carry no gradient: ids and log expected counts."""

    positives: Int[Array, "B"]
    queries: Int[Array, "B"]
    hard_allowed: Bool[Array, "B H"]
    candidates: Int[Array, "C"]
    candidate_queries: Int[Array, "C"]
    candidate_log_counts: Float[Array, "C"]


class KernelOptions(NamedTuple):
    """Static options.

    Attributes:
        per_query, by_logit_margin, biased: see `twotower.kernels.loss_inputs.Loss`.
        block_rows: queries in a block, at most.
        dtype: type of the operands of the matrix products; None keeps that of the vectors.
    """

    per_query: Callable[..., jax.Array]
    by_logit_margin: Callable[[jax.Array], jax.Array] | None
    biased: bool
    block_rows: int
    dtype: Any


class Operands(NamedTuple):
    """Vectors in the layouts of the three products: XLA for CPUs multiplies transposed bfloat16 far
    slower."""

    queries: Float[Array, "B D"]
    items: Float[Array, "C D"]
    columns: Float[Array, "D C"]


class Block(NamedTuple):
    """The inputs of one block of n queries; `columns` are the queries once more."""

    queries: Float[Array, "n D"]
    columns: Float[Array, "D n"]
    positive: Float[Array, "n"]
    hard: Float[Array, "n H"]
    weights: Float[Array, "n"]
    ids: Int[Array, "n"]
    query_ids: Int[Array, "n"]
    hard_allowed: Bool[Array, "n H"]


class LogitBound(NamedTuple):
    """A number that no candidate's logit for a query q exceeds: slope |q| + level. An infinite
    slope bounds nothing."""

    slope: Float[Array, ""]
    level: Float[Array, ""]


class LogitGradients(NamedTuple):
    """Derivatives of a block's weighted loss by its logits; those by the candidates' are
    `factor[:, None] * candidates`."""

    positive: Float[Array, "n"]
    hard: Float[Array, "n H"]
    candidates: Float[Array, "n C"]
    factor: Float[Array, "n"]


def make_operands(options: KernelOptions, arrays: GradientInputs) -> Operands:
    dtype = options.dtype or jnp.result_type(arrays.queries, arrays.items)
    items = arrays.items.astype(dtype)
    return Operands(arrays.queries.astype(dtype), items, _transpose(items))


def _transpose(x: jax.Array) -> jax.Array:
    # The barrier keeps XLA from folding the transposition into the products of the loop.
    return jax.lax.optimization_barrier(jnp.swapaxes(x, -1, -2))


def cut_into_blocks(
    options: KernelOptions, operands: Operands, arrays: GradientInputs, ids: LossIds
) -> Block:
    """Returns all blocks, with a leading axis; the last is filled up with queries of weight 0."""
    count = len(ids.positives)
    number = max(1, -(-count // options.block_rows))
    rows = -(-count // number)

    def cut(x: jax.Array) -> jax.Array:
        filled = jnp.pad(x, [(0, number * rows - count)] + [(0, 0)] * (x.ndim - 1))
        return filled.reshape(number, rows, *x.shape[1:])

    queries = cut(operands.queries)
    return Block(
        queries=queries,
        columns=_transpose(queries),
        positive=cut(arrays.positive),
        hard=cut(arrays.hard),
        weights=cut(arrays.weights),
        ids=cut(ids.positives),
        query_ids=cut(ids.queries),
        hard_allowed=cut(ids.hard_allowed),
    )


def block_scores(operands: Operands, arrays: GradientInputs, block: Block) -> Float[Array, "n C"]:
    exact = arrays.positive.dtype
    return jnp.matmul(block.queries, operands.columns, preferred_element_type=exact)


def block_losses(
    options: KernelOptions,
    arrays: GradientInputs,
    ids: LossIds,
    block: Block,
    scores: Float[Array, "n C"],
    bound: LogitBound | None,
    *,
    differentiate: bool = False,
) -> tuple[Float[Array, "n"], LogitGradients | None]:
    """Returns the loss of each query and, where asked for, the gradients of the weighted loss."""
    if options.by_logit_margin is not None:
        negative_logits = functools.partial(_negative_logits, arrays, ids, block)
        return _losses_by_logit_margin(
            options, negative_logits, block, scores, bound, differentiate=differentiate
        )
    logits = scores * arrays.scale + _levels(arrays, ids, padding=0.0)[None, :]
    allowed = ~_is_hit(ids, block) & (ids.candidates >= 0)[None, :]
    where = jnp.concatenate([allowed, block.hard_allowed], axis=1)

    def losses_from_logits(positive: jax.Array, logits: jax.Array, hard: jax.Array) -> jax.Array:
        negatives = jnp.concatenate([logits, hard], axis=1)
        return options.per_query(positive, negatives, where=where)

    if not differentiate:
        return losses_from_logits(block.positive, logits, block.hard), None
    losses, pull = jax.vjp(losses_from_logits, block.positive, logits, block.hard)
    positive, candidates, hard = pull(block.weights)
    return losses, LogitGradients(positive, hard, candidates, jnp.ones_like(positive))


def _is_hit(ids: LossIds, block: Block) -> Bool[Array, "n C"]:
    """Returns which candidates are no negatives: the query's own positive, wherever it stands, and
    other positives of its user."""
    is_positive = ids.candidates[None, :] == block.ids[:, None]
    is_same_user = ids.candidate_queries[None, :] == block.query_ids[:, None]
    return is_positive | is_same_user


def _levels(arrays: GradientInputs, ids: LossIds, padding: float = -jnp.inf) -> Float[Array, "C"]:
    """Returns the number added to a candidate's scaled score; `padding` where there is none."""
    return jnp.where(ids.candidates >= 0, arrays.bias - ids.candidate_log_counts, padding)


def _negative_logits(
    arrays: GradientInputs, ids: LossIds, block: Block, scores: Float[Array, "n C"]
) -> Float[Array, "n C"]:
    """Returns the logits of negatives, -inf elsewhere."""
    logits = scores * arrays.scale + _levels(arrays, ids)[None, :]
    return jnp.where(_is_hit(ids, block), -jnp.inf, logits)


def _losses_by_logit_margin(
    options: KernelOptions,
    negative_logits: Callable[[jax.Array], jax.Array],
    block: Block,
    scores: Float[Array, "n C"],
    bound: LogitBound | None,
    *,
    differentiate: bool,
) -> tuple[Float[Array, "n"], LogitGradients | None]:
    """Returns losses of log sum exp(negatives) - positive, whose gradients by the candidates'
    logits are the exponentials times one number a query."""
    by_logit_margin = options.by_logit_margin
    assert by_logit_margin is not None
    hard = jnp.where(block.hard_allowed, block.hard, -jnp.inf)
    top = _top_logit(block, negative_logits, scores, hard, bound)
    exponentials = jnp.exp(negative_logits(scores) - top[:, None])
    hard = jnp.exp(hard - top[:, None])
    if options.dtype:
        exponentials = _narrow(exponentials, options.dtype)
    total = exponentials.sum(axis=1, dtype=hard.dtype) + hard.sum(axis=1)
    none = total == 0
    total = jnp.where(none, 1.0, total)
    margin = top + jnp.log(total) - block.positive
    if not differentiate:
        return jnp.where(none, 0.0, by_logit_margin(margin)), None
    losses, pull = jax.vjp(by_logit_margin, margin)
    slope = jnp.where(none, 0.0, pull(block.weights)[0])
    gradients = LogitGradients(
        positive=-slope,
        hard=hard * (slope / total)[:, None],
        candidates=exponentials,
        factor=slope / total,
    )
    return jnp.where(none, 0.0, losses), gradients


def _narrow(exponentials: Float[Array, "n C"], dtype: Any) -> Float[Array, "n C"]:
    """Rounds to `dtype`. XLA for CPUs rounds to bfloat16 in many instructions; here two do, ties
    going up."""
    if jax.default_backend() != "cpu" or exponentials.dtype != jnp.float32 or dtype != jnp.bfloat16:
        return exponentials.astype(dtype)
    bits = jax.lax.bitcast_convert_type(exponentials, jnp.uint32) + 0x8000
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def logit_bound(
    options: KernelOptions, operands: Operands, arrays: GradientInputs, ids: LossIds
) -> LogitBound | None:
    """Returns a bound that spares a block the search for its greatest logits, a pass over all of
    them; None where they are needed.

    The exponentials of a loss are taken of logits less a number that no logit of the query exceeds
    by much. The greatest logit is always right. A bound is right if it is not so far above that
    exponentials vanish, which the longest vectors decide.
    """
    on_cpu = jax.default_backend() == "cpu"
    if options.by_logit_margin is None or arrays.hard.shape[1] or not on_cpu:
        return None

    def longest(vectors: jax.Array) -> jax.Array:
        squares = jnp.square(vectors.astype(arrays.positive.dtype)).sum(-1)
        return jnp.sqrt(squares.max(initial=0.0))

    levels = _levels(arrays, ids)
    highest = jnp.max(levels, initial=-jnp.inf)
    lowest = jnp.min(levels, where=levels > -jnp.inf, initial=jnp.inf)
    slope = jnp.abs(arrays.scale) * longest(operands.items)
    spread = 2 * slope * longest(operands.queries) + highest - lowest
    is_near = (highest >= lowest) & (spread < _MAX_SPREAD)
    return LogitBound(jnp.where(is_near, slope, jnp.inf), highest)


def _top_logit(
    block: Block,
    negative_logits: Callable[[jax.Array], jax.Array],
    scores: Float[Array, "n C"],
    hard: Float[Array, "n H"],
    bound: LogitBound | None,
) -> Float[Array, "n"]:
    """Returns a finite number near each query's greatest logit and not far below it."""

    def greatest(scores: jax.Array) -> jax.Array:
        logits = negative_logits(scores)
        top = jnp.maximum(logits.max(axis=1, initial=-jnp.inf), hard.max(axis=1, initial=-jnp.inf))
        return jnp.where(top == -jnp.inf, 0.0, top)

    if bound is None:
        return greatest(scores)
    lengths = jnp.sqrt(jnp.square(block.queries.astype(scores.dtype)).sum(axis=1))

    def bounded(scores: jax.Array) -> jax.Array:
        return bound.slope * lengths + bound.level

    return jax.lax.cond(bound.slope < jnp.inf, bounded, greatest, scores)

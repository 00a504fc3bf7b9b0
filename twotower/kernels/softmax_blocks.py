"""The arithmetic of one block of queries of `twotower.kernels.streaming_softmax`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from twotower.kernels.loss_inputs import positives_among_candidates

# Greatest distance of a query's greatest logit from its bound, in nats: the least normal number of
# float32 is e^-87, so that logits up to 27 nats below the greatest one still count beside it.
_MAX_SPREAD = 60.0


class GradientInputs(NamedTuple):
    """Inputs that the loss is differentiated by: vectors, and the logits of single pairs.

    Attributes:
        queries: Vectors of the queries.
        items: Vectors of the candidates.
        positive: Logit of each query with its positive.
        hard: Logits of each query with its own hard negatives.
        scale: Factor of the scores, 1 / temperature.
        bias: Number added to every logit.
        weights: Weight of each query in the sum of losses.
    """

    queries: Float[Array, "B D"]
    items: Float[Array, "C D"]
    # Logits of positives and hard negatives are formed outside the loop: autodiff takes their
    # gradients on to the vectors.
    positive: Float[Array, "B"]
    hard: Float[Array, "B H"]
    scale: Float[Array, ""]
    bias: Float[Array, ""]
    weights: Float[Array, "B"]


class LossIds(NamedTuple):
    """Inputs of the loss that carry no gradient: ids and log expected counts.

    Attributes:
        positives: Item id of the positive of each query.
        queries: User id of each query; one that no candidate has where users are not masked.
        hard_allowed: Whether a hard negative exists and is not the query's own positive.
        candidates: Item id of each candidate; -1 for padding.
        candidate_queries: User id of the query that each candidate is the positive of.
        candidate_log_counts: Log expected count to subtract from the logits of each candidate.
    """

    positives: Int[Array, "B"]
    queries: Int[Array, "B"]
    hard_allowed: Bool[Array, "B H"]
    candidates: Int[Array, "C"]
    candidate_queries: Int[Array, "C"]
    candidate_log_counts: Float[Array, "C"]


class KernelOptions(NamedTuple):
    """Static options of the kernel.

    Attributes:
        per_query, by_logit_margin, biased: see `twotower.kernels.loss_inputs.Loss`.
        block_rows: Queries in a block, at most.
        dtype: Type of the operands of the matrix products; None keeps that of the vectors.
    """

    per_query: Callable[..., jax.Array]
    by_logit_margin: Callable[[jax.Array], jax.Array] | None
    biased: bool
    block_rows: int
    dtype: DTypeLike | None


class Operands(NamedTuple):
    """Vectors of queries and candidates in the layouts that the matrix products take.

    Attributes:
        queries: Vectors of the queries.
        items: Vectors of the candidates.
        columns: Vectors of the candidates once more, transposed.
    """

    queries: Float[Array, "B D"]
    # Scores multiply by `columns`, gradients of queries by `items`: XLA for CPUs multiplies
    # transposed bfloat16 far slower.
    items: Float[Array, "C D"]
    columns: Float[Array, "D C"]


class Block(NamedTuple):
    """The inputs of one block of n queries, each a slice of those of all queries.

    `columns` are the vectors of its queries once more, transposed for the product that gives the
    gradients of the candidates.
    """

    queries: Float[Array, "n D"]
    columns: Float[Array, "D n"]
    positive: Float[Array, "n"]
    hard: Float[Array, "n H"]
    weights: Float[Array, "n"]
    ids: Int[Array, "n"]
    query_ids: Int[Array, "n"]
    hard_allowed: Bool[Array, "n H"]


class LogitBound(NamedTuple):
    """Upper bound of the logits of a query q over all candidates: slope |q| + level."""

    # Infinite where the bound is too far above the logits to be used.
    slope: Float[Array, ""]
    level: Float[Array, ""]


class LogitGradients(NamedTuple):
    """Derivatives of a block's weighted loss by its logits; those by the logits of candidates are
    `factor[:, None] * candidates`."""

    positive: Float[Array, "n"]
    hard: Float[Array, "n H"]
    # Kept apart from the factor, so that the exponentials go into the products as they are: one
    # pass over [n, C] less.
    candidates: Float[Array, "n C"]
    factor: Float[Array, "n"]


def make_operands(options: KernelOptions, arrays: GradientInputs) -> Operands:
    """Returns the vectors in the type and the layouts of the products."""
    # Rounded once for all blocks, not in each.
    dtype = options.dtype or jnp.result_type(arrays.queries, arrays.items)
    items = arrays.items.astype(dtype)
    return Operands(arrays.queries.astype(dtype), items, _transpose(items))


def _transpose(x: jax.Array) -> jax.Array:
    # The barrier keeps XLA from folding the transposition into the products of the loop.
    return jax.lax.optimization_barrier(jnp.swapaxes(x, -1, -2))


def cut_into_blocks(
    options: KernelOptions, operands: Operands, arrays: GradientInputs, ids: LossIds
) -> Block:
    """Returns all blocks, stacked along a leading axis; the last is filled up with queries of
    weight 0."""
    count = len(ids.positives)
    # Blocks of equal size, so that the last is not mostly padding.
    number = max(1, -(-count // options.block_rows))
    rows = -(-count // number)

    def cut(x: jax.Array) -> jax.Array:
        # Padding has weight 0, and its gradients are cut off after the loop.
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
    """Returns the dot products of a block's queries with all candidates, in the type of sums."""
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
    """Returns the loss of each query and, if `differentiate`, the gradients of the weighted loss;
    else None."""
    if options.by_logit_margin is not None:
        negative_logits = functools.partial(_negative_logits, arrays, ids, block)
        return _losses_by_logit_margin(
            options, negative_logits, block, scores, bound, differentiate=differentiate
        )
    # Finite for padding too: the mask takes it out, and 0 x inf would be NaN in the gradient.
    logits = scores * arrays.scale + _levels(arrays, ids, padding=0.0)[None, :]
    allowed = ~_positives_among(ids, block) & (ids.candidates >= 0)[None, :]
    where = jnp.concatenate([allowed, block.hard_allowed], axis=1)

    def losses_from_logits(positive: jax.Array, logits: jax.Array, hard: jax.Array) -> jax.Array:
        negatives = jnp.concatenate([logits, hard], axis=1)
        return options.per_query(positive, negatives, where=where)

    if not differentiate:
        return losses_from_logits(block.positive, logits, block.hard), None
    losses, pull = jax.vjp(losses_from_logits, block.positive, logits, block.hard)
    positive, candidates, hard = pull(block.weights)
    return losses, LogitGradients(positive, hard, candidates, jnp.ones_like(positive))


def _positives_among(ids: LossIds, block: Block) -> Bool[Array, "n C"]:
    return positives_among_candidates(
        block.ids, block.query_ids, ids.candidates, ids.candidate_queries
    )


def _levels(arrays: GradientInputs, ids: LossIds, padding: float = -jnp.inf) -> Float[Array, "C"]:
    """Returns the number added to the scaled score of each candidate; `padding` for id -1."""
    # The correction comes after the temperature: log counts are not divided by it.
    return jnp.where(ids.candidates >= 0, arrays.bias - ids.candidate_log_counts, padding)


def _negative_logits(
    arrays: GradientInputs, ids: LossIds, block: Block, scores: Float[Array, "n C"]
) -> Float[Array, "n C"]:
    """Returns the logits of negatives, -inf elsewhere."""
    logits = scores * arrays.scale + _levels(arrays, ids)[None, :]
    return jnp.where(_positives_among(ids, block), -jnp.inf, logits)


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
    # Taken off all logits before the exponential, and added to its logarithm: any number near the
    # greatest logit gives the same loss.
    top = _top_logit(block, negative_logits, scores, hard, bound)
    # Formed here even where their maximum was taken before: masks, exponentials and rounding are
    # then one pass over [n, C].
    exponentials = jnp.exp(negative_logits(scores) - top[:, None])
    hard = jnp.exp(hard - top[:, None])
    if options.dtype:
        exponentials = _narrow(exponentials, options.dtype)
    # Summed in float32 after rounding: value and gradient see the same exponentials.
    total = exponentials.sum(axis=1, dtype=hard.dtype) + hard.sum(axis=1)
    # A query without negatives: 1 avoids log 0, and the loss is masked below.
    none = total == 0
    total = jnp.where(none, 1.0, total)
    margin = top + jnp.log(total) - block.positive
    if not differentiate:
        return jnp.where(none, 0.0, by_logit_margin(margin)), None
    losses, pull = jax.vjp(by_logit_margin, margin)
    # Derivative of the weighted loss by its logit margin.
    slope = jnp.where(none, 0.0, pull(block.weights)[0])
    gradients = LogitGradients(
        positive=-slope,
        hard=hard * (slope / total)[:, None],
        candidates=exponentials,
        factor=slope / total,
    )
    return jnp.where(none, 0.0, losses), gradients


def _narrow(exponentials: Float[Array, "n C"], dtype: DTypeLike) -> Float[Array, "n C"]:
    """Rounds exponentials to `dtype`; ties to bfloat16 go up on a CPU."""
    # XLA for CPUs rounds to bfloat16 in many instructions; adding half a unit and cutting the lower
    # 16 bits off are two. Exponentials are finite and positive, so that nothing overflows.
    if jax.default_backend() != "cpu" or exponentials.dtype != jnp.float32 or dtype != jnp.bfloat16:
        return exponentials.astype(dtype)
    bits = jax.lax.bitcast_convert_type(exponentials, jnp.uint32) + 0x8000
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def logit_bound(
    options: KernelOptions, operands: Operands, arrays: GradientInputs, ids: LossIds
) -> LogitBound | None:
    """Returns a bound of all logits, which spares a block the pass that finds its greatest ones;
    None where these are needed.

    Exponentials are taken of logits less a number near the greatest one. The greatest one itself
    always serves. A bound serves unless it is so far above that exponentials vanish, which depends
    on the norms of the vectors.
    """
    # The bound covers candidates alone: hard negatives need the maximum.
    on_cpu = jax.default_backend() == "cpu"
    if options.by_logit_margin is None or arrays.hard.shape[1] or not on_cpu:
        return None

    def longest(vectors: jax.Array) -> jax.Array:
        # In the type of the sums: squares of bfloat16 would round the norm down, below the logits.
        squares = jnp.square(vectors.astype(arrays.positive.dtype)).sum(-1)
        return jnp.sqrt(squares.max(initial=0.0))

    levels = _levels(arrays, ids)
    highest = jnp.max(levels, initial=-jnp.inf)
    lowest = jnp.min(levels, where=levels > -jnp.inf, initial=jnp.inf)
    slope = jnp.abs(arrays.scale) * longest(operands.items)
    # |q . v| is at most |q| |v|, on either side of 0: hence twice the product.
    spread = 2 * slope * longest(operands.queries) + highest - lowest
    # The first condition fails where there is no candidate at all.
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
        # Without any negative: 0 keeps -inf - -inf out of the exponentials.
        return jnp.where(top == -jnp.inf, 0.0, top)

    if bound is None:
        return greatest(scores)
    lengths = jnp.sqrt(jnp.square(block.queries.astype(scores.dtype)).sum(axis=1))

    def bounded(scores: jax.Array) -> jax.Array:
        return bound.slope * lengths + bound.level

    # Decided at run time, since norms change in training; only one branch runs.
    return jax.lax.cond(bound.slope < jnp.inf, bounded, greatest, scores)

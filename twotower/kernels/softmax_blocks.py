r"""The sweep beneath `streaming_loss`: blocks of queries against all candidates, losses and
gradients formed together.

Each block sees every candidate, so its losses are complete and their gradient is known while the
block's exponentials are still in the cache: three matrix products, no recomputation. The gradients
are the residuals of a `custom_vjp`, whose backward pass only multiplies them by the cotangent; for
this reason there are no second derivatives. Evaluated without differentiation, the sweep forms the
losses alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from twotower.objectives.negatives import Candidates

# How far below its bound the greatest logit of a query may be: its exponential, e^-60, is as many
# nats from the least normal number of float32 as matter beside it.
_SPREAD = 60.0


class LossInputs(NamedTuple):
    """What the loss is differentiated by."""

    queries: Float[Array, "B D"]
    items: Float[Array, "C D"]
    positive: Float[Array, "B"]
    hard: Float[Array, "B H"]
    scale: Float[Array, ""]
    bias: Float[Array, ""]
    weights: Float[Array, "B"]


class LossIds(NamedTuple):
    """What it is not: identities, and the logs of expected counts."""

    ids: Int[Array, "B"]
    owners: Int[Array, "B"]
    hard_allowed: Bool[Array, "B H"]
    candidates: Candidates


class KernelOptions(NamedTuple):
    """The loss, and how to go about it; static.

    Attributes:
        of, of_gap, biased: see `twotower.objectives.loss.Loss`.
        rows: queries in a block, at most.
        dtype: of the operands of the matrix products.
    """

    of: Callable[..., jax.Array]
    of_gap: Callable[[jax.Array], jax.Array] | None
    biased: bool
    rows: int
    dtype: Any


class _Operands(NamedTuple):
    """What is multiplied, in the layouts of the three products: XLA for CPUs multiplies transposed
    bfloat16 far slower."""

    queries: Float[Array, "B D"]
    items: Float[Array, "C D"]
    columns: Float[Array, "D C"]


class _Block(NamedTuple):
    """The rows of `LossInputs` and `LossIds` that are of one block of n queries; `columns` are the
    queries once more."""

    queries: Float[Array, "n D"]
    columns: Float[Array, "D n"]
    positive: Float[Array, "n"]
    hard: Float[Array, "n H"]
    weights: Float[Array, "n"]
    ids: Int[Array, "n"]
    owners: Int[Array, "n"]
    hard_allowed: Bool[Array, "n H"]


class LogitBound(NamedTuple):
    """No candidate's logit for a query q is greater than slope |q| + level. An infinite slope says
    nothing."""

    slope: Float[Array, ""]
    level: Float[Array, ""]


class LogitGradients(NamedTuple):
    """Derivatives of a block's weighted loss by its logits; by the candidates', `factor[:, None] *
    candidates`."""

    positive: Float[Array, "n"]
    hard: Float[Array, "n H"]
    candidates: Float[Array, "n C"]
    factor: Float[Array, "n"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sweep(form: KernelOptions, scored: LossInputs, known: LossIds) -> Float[Array, ""]:
    """The sum of weight x loss. Under a `shard_map` all of `scored` must vary over the same axes as
    the ids."""
    operands = _operands(form, scored)
    bound = _bound(form, operands, scored, known)

    def body(total: jax.Array, block: _Block) -> tuple[jax.Array, None]:
        losses, _ = _losses(form, scored, known, block, _scores(operands, scored, block), bound)
        return total + jnp.sum(block.weights * losses), None

    start = jnp.zeros((), scored.positive.dtype) + varying_zero(known)
    return jax.lax.scan(body, start, _blocks(form, operands, scored, known))[0]


def _forward(
    form: KernelOptions, scored: LossInputs, known: LossIds
) -> tuple[Float[Array, ""], LossInputs]:
    operands, exact = _operands(form, scored), scored.positive.dtype
    bound = _bound(form, operands, scored, known)

    def body(totals: tuple, block: _Block) -> tuple[tuple, tuple]:
        loss, transposed, scale, bias = totals
        losses, slopes = _losses(
            form, scored, known, block, _scores(operands, scored, block), bound, weighted=True
        )
        outer = slopes.candidates.astype(operands.items.dtype)
        queries = slopes.factor[:, None] * jnp.matmul(
            outer, operands.items, preferred_element_type=exact
        )
        scaled = (block.columns * (scored.scale * slopes.factor)[None, :]).astype(outer.dtype)
        # As [D, C]: the CPU forms this product several times as fast as its transpose.
        transposed += jnp.matmul(scaled, outer, preferred_element_type=exact)
        scale += jnp.sum(queries * block.queries)
        if form.biased:
            bias += jnp.sum(slopes.factor * slopes.candidates.sum(axis=1))
        loss += jnp.sum(block.weights * losses)
        return (loss, transposed, scale, bias), (
            scored.scale * queries,
            slopes.positive,
            slopes.hard,
            losses,
        )

    start = (
        jnp.zeros((), exact),
        jnp.zeros(scored.items.shape[::-1], exact),
        jnp.zeros((), exact),
        jnp.zeros((), exact),
    )
    start = jax.tree.map(lambda x: x + varying_zero(known).astype(exact), start)
    (loss, transposed, scale, bias), rows = jax.lax.scan(
        body, start, _blocks(form, operands, scored, known)
    )
    queries, positive, hard, losses = (jax.lax.collapse(x, 0, 2)[: len(known.ids)] for x in rows)
    # The barrier keeps the transposition out of the loop, where XLA would fold it into the product.
    items = jax.lax.optimization_barrier(transposed).T
    gradients = LossInputs(queries, items, positive, hard, scale, bias, losses)
    return loss, jax.tree.map(lambda g, x: g.astype(x.dtype), gradients, scored)


def _backward(
    form: KernelOptions, gradients: LossInputs, cotangent: Float[Array, ""]
) -> tuple[LossInputs, None]:
    return jax.tree.map(lambda g: g * cotangent.astype(g.dtype), gradients), None


sweep.defvjp(_forward, _backward)


def varying_zero(known: LossIds) -> Int[Array, ""]:
    """0, made of the ids: what it is added to varies over a mesh as they do, which loops and
    `custom_vjp` ask for."""
    return 0 * known.ids[:1].sum() + 0 * known.candidates.ids[:1].sum()


def _operands(form: KernelOptions, scored: LossInputs) -> _Operands:
    dtype = form.dtype or jnp.result_type(scored.queries, scored.items)
    queries, items = scored.queries.astype(dtype), scored.items.astype(dtype)
    return _Operands(queries, items, _transposed(items))


def _transposed(x: jax.Array) -> jax.Array:
    """With a barrier, so that XLA does not fold the transposition into the products of the loop."""
    return jax.lax.optimization_barrier(jnp.swapaxes(x, -1, -2))


def _bound(
    form: KernelOptions, operands: _Operands, scored: LossInputs, known: LossIds
) -> LogitBound | None:
    """What spares a block the search for its greatest logits, a pass over all of them; None where
    they are needed.

    The exponentials of a loss are taken of logits less a number that no logit of the query exceeds
    by much. The greatest one is always right; a bound is if it is not so far above that
    exponentials vanish, which the longest vectors decide.
    """
    if form.of_gap is None or scored.hard.shape[1] or jax.default_backend() != "cpu":
        return None

    def longest(vectors: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.square(vectors.astype(scored.positive.dtype)).sum(-1).max(initial=0.0))

    levels = _levels(scored, known)
    highest = jnp.max(levels, initial=-jnp.inf)
    lowest = jnp.min(levels, where=levels > -jnp.inf, initial=jnp.inf)
    slope = jnp.abs(scored.scale) * longest(operands.items)
    near = (highest >= lowest) & (
        2 * slope * longest(operands.queries) + highest - lowest < _SPREAD
    )
    return LogitBound(jnp.where(near, slope, jnp.inf), highest)


def _blocks(form: KernelOptions, operands: _Operands, scored: LossInputs, known: LossIds) -> _Block:
    """[blocks, n, ...] of each; the last block is filled up with queries of weight 0."""
    count = len(known.ids)
    number = max(1, -(-count // form.rows))
    rows = -(-count // number)

    def cut(x: jax.Array) -> jax.Array:
        filled = jnp.pad(x, [(0, number * rows - count)] + [(0, 0)] * (x.ndim - 1))
        return filled.reshape(number, rows, *x.shape[1:])

    queries, *others = map(
        cut,
        (
            operands.queries,
            scored.positive,
            scored.hard,
            scored.weights,
            known.ids,
            known.owners,
            known.hard_allowed,
        ),
    )
    return _Block(queries, _transposed(queries), *others)


def _scores(operands: _Operands, scored: LossInputs, block: _Block) -> Float[Array, "n C"]:
    return jnp.matmul(block.queries, operands.columns, preferred_element_type=scored.positive.dtype)


def _levels(scored: LossInputs, known: LossIds, empty: float = -jnp.inf) -> Float[Array, "C"]:
    """What is added to a candidate's scaled score; `empty` where there is none."""
    return jnp.where(
        known.candidates.ids >= 0, scored.bias - known.candidates.log_expected_count, empty
    )


def _logits(
    scored: LossInputs, scores: Float[Array, "n C"], levels: Float[Array, "C"]
) -> Float[Array, "n C"]:
    return scores * scored.scale + levels[None, :]


def _hits(known: LossIds, block: _Block) -> Bool[Array, "n C"]:
    """Which candidates are the query's own positive, or another of its owner's."""
    ids, owners = known.candidates.ids, known.candidates.owners
    return (ids[None, :] == block.ids[:, None]) | (owners[None, :] == block.owners[:, None])


def _losses(
    form: KernelOptions,
    scored: LossInputs,
    known: LossIds,
    block: _Block,
    scores: jax.Array,
    bound: LogitBound | None,
    weighted: bool = False,
) -> tuple[Float[Array, "n"], LogitGradients | None]:
    """The loss of each query and, if `weighted`, the slopes of the block's weighted loss."""
    if form.of_gap is not None:
        return _by_gap(
            form, functools.partial(_kept, scored, known, block), block, scores, bound, weighted
        )
    logits = _logits(scored, scores, _levels(scored, known, empty=0.0))
    allowed = ~_hits(known, block) & (known.candidates.ids >= 0)[None, :]
    where = jnp.concatenate([allowed, block.hard_allowed], axis=1)

    def of(positive: jax.Array, logits: jax.Array, hard: jax.Array) -> jax.Array:
        return form.of(positive, jnp.concatenate([logits, hard], axis=1), where=where)

    if not weighted:
        return of(block.positive, logits, block.hard), None
    losses, pull = jax.vjp(of, block.positive, logits, block.hard)
    positive, candidates, hard = pull(block.weights)
    return losses, LogitGradients(positive, hard, candidates, jnp.ones_like(positive))


def _kept(
    scored: LossInputs, known: LossIds, block: _Block, scores: Float[Array, "n C"]
) -> Float[Array, "n C"]:
    """The logits of negatives, -inf elsewhere."""
    logits = _logits(scored, scores, _levels(scored, known))
    return jnp.where(_hits(known, block), -jnp.inf, logits)


def _narrow(exponentials: Float[Array, "n C"], dtype: Any) -> Float[Array, "n C"]:
    """As `dtype`. XLA for CPUs rounds to bfloat16 in many instructions; here two do, ties going
    up."""
    if jax.default_backend() != "cpu" or exponentials.dtype != jnp.float32 or dtype != jnp.bfloat16:
        return exponentials.astype(dtype)
    bits = jax.lax.bitcast_convert_type(exponentials, jnp.uint32) + 0x8000
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def _by_gap(
    form: KernelOptions,
    kept_of: Callable,
    block: _Block,
    scores: jax.Array,
    bound: LogitBound | None,
    weighted: bool,
) -> tuple[Float[Array, "n"], LogitGradients | None]:
    """A loss of log sum exp(negatives) - positive: its slopes are the exponentials times one number
    a query."""
    hard = jnp.where(block.hard_allowed, block.hard, -jnp.inf)
    top = _top(block, kept_of, scores, hard, bound)
    kept, hard = jnp.exp(kept_of(scores) - top[:, None]), jnp.exp(hard - top[:, None])
    if form.dtype:
        kept = _narrow(kept, form.dtype)
    total = kept.sum(axis=1, dtype=hard.dtype) + hard.sum(axis=1)
    none = total == 0
    total = jnp.where(none, 1.0, total)
    gap = top + jnp.log(total) - block.positive
    if not weighted:
        return jnp.where(none, 0.0, form.of_gap(gap)), None
    losses, pull = jax.vjp(form.of_gap, gap)
    slope = jnp.where(none, 0.0, pull(block.weights)[0])
    return jnp.where(none, 0.0, losses), LogitGradients(
        -slope, hard * (slope / total)[:, None], kept, slope / total
    )


def _top(
    block: _Block,
    kept_of: Callable,
    scores: Float[Array, "n C"],
    hard: Float[Array, "n H"],
    bound: LogitBound | None,
) -> Float[Array, "n"]:
    """A finite number near each query's greatest logit and not far below it."""

    def greatest(scores: jax.Array) -> jax.Array:
        kept = kept_of(scores)
        found = jnp.maximum(kept.max(axis=1, initial=-jnp.inf), hard.max(axis=1, initial=-jnp.inf))
        return jnp.where(found == -jnp.inf, 0.0, found)

    if bound is None:
        return greatest(scores)
    lengths = jnp.sqrt(jnp.square(block.queries.astype(scores.dtype)).sum(axis=1))
    return jax.lax.cond(
        bound.slope < jnp.inf, lambda _: bound.slope * lengths + bound.level, greatest, scores
    )

"""A retrieval loss against all candidates that never holds their [B, C] scores.

Queries go in blocks against all candidates. A block sees every candidate, so that its losses are
complete, and their gradient is known, while its exponentials are still in the cache: three matrix
products, no recomputation. Memory is O((B + C) D + block x C). Three files belong to it:
`softmax_blocks` has the arithmetic of one block, `softmax_reference` the plain reference, and
`softmax_pallas` kernels for GPUs that may take the place of the blocks.

Negatives are the candidates with an id other than the positive's and, where users are masked, of
another user. Positions in the batch play no part: candidates may be the batch's own items, those of
every device, a sample, a queue or the whole corpus, or all of them.

Inside a `shard_map` queries are the device's own, and candidates are gathered from all devices
before the call. The loop then holds no collective, and the sum of the results over devices is the
loss of the whole batch.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from twotower.kernels.loss_inputs import (
    HardNegatives,
    LossInputs,
    LossOptions,
    allowed_hard_negatives,
)
from twotower.kernels.softmax_blocks import (
    Block,
    GradientInputs,
    KernelOptions,
    LossIds,
    block_losses,
    block_scores,
    cut_into_blocks,
    logit_bound,
    make_operands,
)

SoftmaxKernel = Literal["blocks", "pallas"]

# A query id that no candidate has, -1 included: nobody is not the same user as another nobody.
_NOBODY = -2


def streaming_softmax(
    inputs: LossInputs,
    options: LossOptions,
    *,
    block: int = 0,
    dtype: DTypeLike | None = None,
    kernel: SoftmaxKernel = "blocks",
    interpret: bool = False,
) -> Float[Array, ""]:
    r"""Sums weight x loss over all queries.

    .. math:: s_c = \mathrm{scale} \; (q \cdot v_c) + \mathrm{bias} - \log E_c, \quad
              s_+ = \mathrm{scale} \; (q \cdot v_+ - \mathrm{margin}) + \mathrm{bias} - \log E_+

    A loss has those parts of the logits that its `Loss` names; hard negatives have logits like
    candidates. The gradients by all vectors, scale, bias and weights are formed in the same loop as
    the value, and cost little more. There are no second derivatives.

    Args:
        inputs: The arrays.
        options: The loss and its static options.
        block: Number of queries in a block; 0 chooses by the number of candidates.
        dtype: Type of the operands of matrix products, for example bfloat16; sums are in float32 at
            least.
        kernel: "blocks", which are those of queries, or "pallas" for `softmax_pallas` where that
            serves the loss, the shapes and the backend.
        interpret: Whether "pallas" is run by Pallas's interpreter, on any backend: for tests.
    """
    loss = options.loss
    queries = inputs.queries
    positives = inputs.positives
    candidates = inputs.candidates
    # Logits and sums are float32 at least, float64 where the vectors are, as in the tests.
    exact = jnp.promote_types(queries.dtype, jnp.float32)
    scale = jnp.asarray(inputs.scale if loss.scaled else 1.0, exact)
    has_bias = loss.biased and inputs.bias is not None
    bias = jnp.asarray(inputs.bias if has_bias else 0.0, exact)

    positive_scale = scale
    if loss.bilateral and options.positive_temperature:
        positive_scale = 1.0 / options.positive_temperature
    # In units of scores, before the temperature.
    margin = 0.0 if loss.takes_margin else options.margin
    positive = _dots(queries, positives.vectors, exact) - margin
    positive = positive * positive_scale + bias
    positive -= _log_count(positives.log_expected_count, loss.corrects_positive, exact)

    hard = inputs.hard
    if hard is None:
        hard = _no_hard_negatives(inputs, exact)
    # B H products, few beside the B C of the candidates: no block is needed for them.
    hard_logits = _dots(queries[..., None, :], hard.vectors, exact) * scale + bias
    hard_logits -= _log_count(hard.log_expected_count, loss.corrects, exact)
    hard_allowed = allowed_hard_negatives(hard.ids, positives.ids)

    # Rows of packed sequences are queries like any other from here on.
    lead = queries.shape[:-1]
    flatten = functools.partial(jax.lax.collapse, start_dimension=0, stop_dimension=len(lead))
    ids = LossIds(
        positives=flatten(positives.ids),
        queries=flatten(_masked_query_ids(inputs.query_ids, lead, options.mask_same_user)),
        hard_allowed=flatten(hard_allowed),
        candidates=candidates.ids,
        candidate_queries=candidates.query_ids,
        candidate_log_counts=_log_count(candidates.log_expected_count, loss.corrects, exact),
    )
    arrays = GradientInputs(
        queries=flatten(queries),
        items=candidates.vectors,
        positive=flatten(positive),
        hard=flatten(hard_logits),
        scale=scale,
        bias=bias,
        weights=flatten(inputs.weights.astype(exact)),
    )
    # Scale and bias are the same on all devices, vectors are not: a `custom_vjp` wants one kind.
    arrays = jax.tree.map(lambda x: x + varying_zero(ids).astype(x.dtype), arrays)
    kernel_options = KernelOptions(
        per_query=loss.per_query,
        by_logit_margin=loss.by_logit_margin,
        biased=loss.biased,
        block_rows=block or block_rows(len(candidates.ids), jax.default_backend()),
        dtype=dtype,
    )
    if kernel == "pallas":
        # Here, since Pallas takes half a second to load.
        from twotower.kernels import softmax_pallas

        masks_users = options.mask_same_user
        if interpret or softmax_pallas.is_usable(kernel_options, arrays, masks_users=masks_users):
            return softmax_pallas.sum_of_losses(
                kernel_options, arrays, ids, masks_users=masks_users, interpret=interpret
            )
    return _sum_of_blocks(kernel_options, arrays, ids)


def _no_hard_negatives(inputs: LossInputs, dtype: DTypeLike) -> HardNegatives:
    """Returns hard negatives with H = 0, so that one program serves both cases."""
    return HardNegatives(
        inputs.queries[..., None, :][..., :0, :],
        inputs.positives.ids[..., None][..., :0],
        jnp.zeros((*inputs.queries.shape[:-1], 0), dtype),
    )


def _masked_query_ids(
    query_ids: Int[Array, "..."], lead: tuple[int, ...], mask_same_user: bool
) -> Int[Array, "*B"]:
    """Returns the user id of every query; `_NOBODY` for a query without one, and for all where
    users are not masked."""
    missing_axes = (1,) * (len(lead) - query_ids.ndim)
    query_ids = jnp.broadcast_to(query_ids.reshape(query_ids.shape + missing_axes), lead)
    return jnp.where(mask_same_user & (query_ids >= 0), query_ids, _NOBODY)


def block_rows(candidates: int, backend: str) -> int:
    """Returns the number of queries in a block, for a number of candidates and a backend of JAX."""
    # On a CPU a block's logits stay in the cache, 4 MiB of them; elsewhere they fill the device.
    if backend == "cpu":
        min_rows = 256
        max_logits = 2**20
    else:
        min_rows = 1024
        max_logits = 2**26
    return max(min_rows, max_logits // max(candidates, 1))


def _dots(
    queries: Float[Array, "*a D"], vectors: Float[Array, "*b D"], dtype: DTypeLike
) -> Float[Array, "*b"]:
    # Products and sum in the exact type: these are single pairs, not worth rounding.
    return jnp.sum(queries.astype(dtype) * vectors.astype(dtype), axis=-1)


def _log_count(values: Float[Array, "*b"], used: bool, dtype: DTypeLike) -> Float[Array, "*b"]:
    """Returns log expected counts to subtract; zeros for a loss that does not correct."""
    if not used:
        return jnp.zeros(values.shape, dtype)
    # Estimates of the sampler, not of the model: nothing is learned through them.
    return jax.lax.stop_gradient(values).astype(dtype)


def varying_zero(ids: LossIds) -> Int[Array, ""]:
    """Returns 0, computed from the ids: a sum with it varies over a mesh as they do, which loops
    and `custom_vjp` require."""
    # Slices, so that nothing is summed in earnest and an empty batch works too.
    return 0 * ids.positives[:1].sum() + 0 * ids.candidates[:1].sum()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_of_blocks(
    options: KernelOptions, arrays: GradientInputs, ids: LossIds
) -> Float[Array, ""]:
    """Sums weight x loss, block by block, without gradients.

    Under a `shard_map` all `arrays` must vary over the same axes as the ids.
    """
    operands = make_operands(options, arrays)
    bound = logit_bound(options, operands, arrays, ids)

    def add_block(total: jax.Array, block: Block) -> tuple[jax.Array, None]:
        scores = block_scores(operands, arrays, block)
        losses, _ = block_losses(options, arrays, ids, block, scores, bound)
        return total + jnp.sum(block.weights * losses), None

    # The first value of a scan must vary over the mesh as the later ones do.
    start = jnp.zeros((), arrays.positive.dtype) + varying_zero(ids)
    blocks = cut_into_blocks(options, operands, arrays, ids)
    return jax.lax.scan(add_block, start, blocks)[0]


def _forward(
    options: KernelOptions, arrays: GradientInputs, ids: LossIds
) -> tuple[Float[Array, ""], GradientInputs]:
    """Returns the sum, and its gradients as the residuals that `_backward` multiplies."""
    operands = make_operands(options, arrays)
    exact = arrays.positive.dtype
    bound = logit_bound(options, operands, arrays, ids)

    def add_block(totals: tuple, block: Block) -> tuple[tuple, tuple]:
        loss, items, scale, bias = totals
        scores = block_scores(operands, arrays, block)
        losses, gradients = block_losses(
            options, arrays, ids, block, scores, bound, differentiate=True
        )
        assert gradients is not None
        # [n, C]: the exponentials, which are in the type of the operands already where it is
        # narrow.
        outer = gradients.candidates.astype(operands.items.dtype)
        product = jnp.matmul(outer, operands.items, preferred_element_type=exact)
        queries = gradients.factor[:, None] * product
        columns = block.columns * (arrays.scale * gradients.factor)[None, :]
        # As [D, C]: the CPU forms this product several times as fast as its transpose.
        items += jnp.matmul(columns.astype(outer.dtype), outer, preferred_element_type=exact)
        # Logits are scale x score, so the derivative by the scale is that by the query along the
        # query.
        scale += jnp.sum(queries * block.queries)
        # A pass over [n, C] that only losses with a bias pay for.
        if options.biased:
            bias += jnp.sum(gradients.factor * gradients.candidates.sum(axis=1))
        loss += jnp.sum(block.weights * losses)
        # Each query is in one block: its gradients are complete here, and are not accumulated.
        rows = (arrays.scale * queries, gradients.positive, gradients.hard, losses)
        return (loss, items, scale, bias), rows

    zero = jnp.zeros((), exact)
    start = (zero, jnp.zeros(arrays.items.shape[::-1], exact), zero, zero)
    start = jax.tree.map(lambda x: x + varying_zero(ids).astype(exact), start)
    blocks = cut_into_blocks(options, operands, arrays, ids)
    (loss, transposed, scale, bias), rows = jax.lax.scan(add_block, start, blocks)
    count = len(ids.positives)
    queries, positive, hard, losses = (jax.lax.collapse(x, 0, 2)[:count] for x in rows)
    # The barrier keeps the transposition out of the loop, where XLA would fold it into the product.
    items = jax.lax.optimization_barrier(transposed).T
    # The derivative by a query's weight is its loss.
    gradients = GradientInputs(queries, items, positive, hard, scale, bias, weights=losses)
    return loss, jax.tree.map(lambda g, x: g.astype(x.dtype), gradients, arrays)


def _backward(
    options: KernelOptions, gradients: GradientInputs, cotangent: Float[Array, ""]
) -> tuple[GradientInputs, None]:
    # All work was done in `_forward`: a sum has one cotangent, and gradients are linear in it.
    return jax.tree.map(lambda g: g * cotangent.astype(g.dtype), gradients), None


_sum_of_blocks.defvjp(_forward, _backward)

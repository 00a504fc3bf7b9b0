"""A retrieval loss against all candidates that never holds their [B, C] scores.

Negatives are the candidates with an id other than the positive's and, if so asked, with another
owner. No place in the batch plays a part: candidates may be the batch's own items, those of every
device, a sample, a queue or the catalogue, or all of them. Memory is O((B + C) D + block x C).

Inside a `shard_map` queries are the device's own and candidates are gathered from all devices
before the call. The sweep then holds no collective, and the sum over the devices of the results is
the loss of the whole batch.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from twotower.kernels.softmax_blocks import KernelOptions, LossIds, LossInputs, sweep, varying_zero
from twotower.objectives.loss import Loss
from twotower.objectives.negatives import Candidates, HardNegatives, Positives

# An owner that no candidate has: nobody is not the same user as another nobody.
_NOBODY = -2


def streaming_loss(
    queries: Float[Array, "B D"] | Float[Array, "B L D"],
    positives: Positives,
    items: Float[Array, "C D"],
    candidates: Candidates,
    *,
    loss: Loss,
    weights: Float[Array, "B"] | Float[Array, "B L"],
    scale: float | Float[Array, ""],
    owners: Int[Array, "B"] | Int[Array, "B L"],
    bias: Float[Array, ""] | None = None,
    hard: HardNegatives | None = None,
    margin: float = 0.0,
    positive_temperature: float = 0.0,
    mask_same_user: bool = True,
    constants: Mapping[str, Any] | None = None,
    block: int = 0,
    dtype: Any = None,
) -> Float[Array, ""]:
    r"""The sum over queries of weight x loss; its first derivatives cost little more than its
    value.

    .. math:: s_c = \mathrm{scale} \; (q \cdot v_c) + \mathrm{bias} - \log E_c, \quad
              s_+ = \mathrm{scale} \; (q \cdot v_+ - \mathrm{margin}) + \mathrm{bias} - \log E_+

    of which a loss has the parts that its `Loss` says. Hard negatives have logits like candidates.

    Args:
        queries: vectors of the queries; `positives`, `weights` and `hard` have the same leading
            axes.
        items: vectors of the candidates.
        scale: 1 / T.
        owners: the identity (user) of each query, or of each row of L queries; negative: nobody.
        bias: of `Loss.biased`; None is 0.
        hard: further negatives of each query alone.
        margin: additive margin, in units of scores; not used where `Loss.own_margin`.
        positive_temperature: of `Loss.bilateral`; 0 takes 1 / scale.
        mask_same_user: other positives of a query's owner are not its negatives.
        constants: of the loss, from `Loss.constants`.
        block: queries compared at once; 0 chooses.
        dtype: of the operands of the matrix products, for example bfloat16; sums are float32 at
            least.
    """
    exact, lead = jnp.promote_types(queries.dtype, jnp.float32), queries.shape[:-1]
    scale = jnp.asarray(scale if loss.scaled else 1.0, exact)
    bias = jnp.asarray(bias if loss.biased and bias is not None else 0.0, exact)
    log_count = functools.partial(_log_count, dtype=exact)

    positive = _dots(queries, positives.vectors, exact) - (0.0 if loss.own_margin else margin)
    positive = (
        positive
        * (1.0 / positive_temperature if loss.bilateral and positive_temperature else scale)
        + bias
    )
    positive -= log_count(positives.log_expected_count, loss.corrects_positive)
    if hard is None:
        hard = HardNegatives(
            queries[..., None, :][..., :0, :],
            positives.ids[..., None][..., :0],
            jnp.zeros((*lead, 0), exact),
        )
    hard_logits = _dots(queries[..., None, :], hard.vectors, exact) * scale + bias
    hard_logits -= log_count(hard.log_expected_count, loss.corrects)
    hard_allowed = (hard.ids >= 0) & (hard.ids != positives.ids[..., None])
    owners = jnp.broadcast_to(owners.reshape(owners.shape + (1,) * (len(lead) - owners.ndim)), lead)
    owners = jnp.where(mask_same_user & (owners >= 0), owners, _NOBODY)

    rows = functools.partial(jax.lax.collapse, start_dimension=0, stop_dimension=len(lead))
    known = LossIds(
        *map(rows, (positives.ids, owners, hard_allowed)),
        candidates._replace(
            log_expected_count=log_count(candidates.log_expected_count, loss.corrects)
        ),
    )
    scored = LossInputs(
        rows(queries),
        items,
        rows(positive),
        rows(hard_logits),
        scale,
        bias,
        rows(weights.astype(exact)),
    )
    scored = jax.tree.map(lambda x: x + varying_zero(known).astype(x.dtype), scored)
    form = KernelOptions(
        functools.partial(loss.of, **(constants or {})),
        loss.of_gap,
        loss.biased,
        block or _block_rows(items.shape[0]),
        dtype,
    )
    return sweep(form, scored, known)


def _block_rows(candidates: int) -> int:
    """Queries in a block: on a CPU few, so that a block's logits stay in the cache; elsewhere
    enough to fill the device."""
    fewest, logits = (256, 2**20) if jax.default_backend() == "cpu" else (1024, 2**26)
    return max(fewest, logits // max(candidates, 1))


def _dots(
    queries: Float[Array, "*a D"], vectors: Float[Array, "*b D"], dtype: Any
) -> Float[Array, "*b"]:
    return jnp.sum(queries.astype(dtype) * vectors.astype(dtype), axis=-1)


def _log_count(values: Float[Array, "*b"], used: bool, dtype: Any) -> Float[Array, "*b"]:
    return jax.lax.stop_gradient(values).astype(dtype) if used else jnp.zeros(values.shape, dtype)

"""The plain reference of `twotower.kernels.streaming_softmax`, with the whole [B, C] matrix."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from twotower.kernels.loss_inputs import LossInputs, LossOptions


def naive_softmax(inputs: LossInputs, options: LossOptions) -> Float[Array, ""]:
    """Returns the result of `streaming_softmax` for queries [B, D], by the whole matrix of
    logits."""
    loss = options.loss
    queries = inputs.queries
    positives = inputs.positives
    candidates = inputs.candidates
    scale = inputs.scale if loss.scaled else 1.0
    bias = 0.0
    if loss.biased and inputs.bias is not None:
        bias = inputs.bias
    positive_scale = scale
    if loss.bilateral and options.positive_temperature:
        positive_scale = 1.0 / options.positive_temperature

    positive = jnp.sum(queries * positives.vectors, axis=-1)
    if not loss.takes_margin:
        positive = positive - options.margin
    # The temperature comes before the correction: log counts are in nats of the final logit.
    positive = positive * positive_scale + bias
    if loss.corrects_positive:
        positive = positive - positives.log_expected_count

    logits = (queries @ candidates.vectors.T) * scale + bias
    if loss.corrects:
        logits = logits - candidates.log_expected_count[None, :]

    is_other = candidates.ids[None, :] != positives.ids[:, None]
    where = (candidates.ids >= 0)[None, :] & is_other
    if options.mask_same_user:
        users = inputs.query_ids[:, None]
        # A negative id is nobody, who is not the same user as another nobody.
        where &= (candidates.query_ids[None, :] != users) | (users < 0)

    # Hard negatives are columns of their own: each query has others.
    hard = inputs.hard
    if hard is not None:
        hard_logits = jnp.einsum("bd,bhd->bh", queries, hard.vectors) * scale + bias
        if loss.corrects:
            hard_logits = hard_logits - hard.log_expected_count
        hard_where = (hard.ids >= 0) & (hard.ids != positives.ids[:, None])
        logits = jnp.concatenate([logits, hard_logits], axis=1)
        where = jnp.concatenate([where, hard_where], axis=1)

    return jnp.sum(inputs.weights * loss.per_query(positive, logits, where=where))

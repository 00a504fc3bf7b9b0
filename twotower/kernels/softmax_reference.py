"""The plain reference of `twotower.kernels.streaming_softmax`, with the whole [B, C] matrix."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from twotower.kernels.loss_inputs import LossInputs, LossOptions


def naive_softmax(inputs: LossInputs, options: LossOptions) -> Float[Array, ""]:
    """Does what `streaming_softmax` does, one array after the other, for queries [B, D]."""
    loss = options.loss
    queries, positives, candidates = inputs.queries, inputs.positives, inputs.candidates
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
        where &= (candidates.query_ids[None, :] != users) | (users < 0)

    hard = inputs.hard
    if hard is not None:
        hard_logits = jnp.einsum("bd,bhd->bh", queries, hard.vectors) * scale + bias
        if loss.corrects:
            hard_logits = hard_logits - hard.log_expected_count
        hard_where = (hard.ids >= 0) & (hard.ids != positives.ids[:, None])
        logits = jnp.concatenate([logits, hard_logits], axis=1)
        where = jnp.concatenate([where, hard_where], axis=1)

    return jnp.sum(inputs.weights * loss.per_query(positive, logits, where=where))

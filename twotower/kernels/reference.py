"""The same loss as `streaming_loss`, written plainly with the whole [B, C] matrix: what tests and
benchmarks compare with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from twotower.objectives.loss import Loss
from twotower.objectives.negatives import Candidates, HardNegatives, Positives


def naive_loss(
    queries: Float[Array, "B D"],
    positives: Positives,
    items: Float[Array, "C D"],
    candidates: Candidates,
    *,
    loss: Loss,
    weights: Float[Array, "B"],
    scale: float | Float[Array, ""],
    owners: Int[Array, "B"],
    bias: Float[Array, ""] | None = None,
    hard: HardNegatives | None = None,
    margin: float = 0.0,
    positive_temperature: float = 0.0,
    mask_same_user: bool = True,
    constants: Mapping[str, Any] | None = None,
) -> Float[Array, ""]:
    """See `twotower.kernels.streaming_softmax.streaming_loss`; B queries in one axis."""
    scale, bias = scale if loss.scaled else 1.0, bias if loss.biased and bias is not None else 0.0
    positive_scale = (
        1.0 / positive_temperature if loss.bilateral and positive_temperature else scale
    )

    positive = jnp.sum(queries * positives.vectors, axis=-1) - (0.0 if loss.own_margin else margin)
    positive = positive * positive_scale + bias
    logits = (queries @ items.T) * scale + bias
    if loss.corrects_positive:
        positive = positive - positives.log_expected_count
    if loss.corrects:
        logits = logits - candidates.log_expected_count[None, :]

    where = (candidates.ids >= 0)[None, :] & (candidates.ids[None, :] != positives.ids[:, None])
    if mask_same_user:
        where &= (candidates.owners[None, :] != owners[:, None]) | (owners[:, None] < 0)
    if hard is not None:
        hard_logits = jnp.einsum("bd,bhd->bh", queries, hard.vectors) * scale + bias
        if loss.corrects:
            hard_logits = hard_logits - hard.log_expected_count
        logits = jnp.concatenate([logits, hard_logits], axis=1)
        where = jnp.concatenate(
            [where, (hard.ids >= 0) & (hard.ids != positives.ids[:, None])], axis=1
        )
    return jnp.sum(weights * loss.of(positive, logits, where=where, **(constants or {})))

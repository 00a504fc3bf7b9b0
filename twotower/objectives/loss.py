"""What a retrieval loss is: a function of one query's logits, and what the logits of that loss are
made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from twotower.config import ObjectiveConfig


def _no_constants(objective: ObjectiveConfig, num_items: int) -> dict[str, float]:
    return {}


class Loss(NamedTuple):
    """A retrieval loss and how its logits are assembled from scores.

    Attributes:
        of: (positive [B], negatives [B, C], *, where [B, C], **constants) -> [B]. A query without
            any allowed negative costs nothing and moves nothing.
        of_gap: for losses that know their negatives by the log of their summed exponentials alone:
            `of` as a function of that log less the positive, [B] -> [B]. Lets the streaming form
            keep exponentials as they are.
        corrects: log expected counts are taken off the negatives' logits.
        corrects_positive: and off the positive's.
        scaled: scores are divided by the temperature.
        biased: a learnable bias is added to every logit.
        bilateral: the positive may have a temperature of its own.
        own_margin: the margin is a constant of the loss, and not taken off the positive's score.
        constants: (options, number of items in the corpus) -> the constants of `of`.
    """

    of: Callable[..., jax.Array]
    of_gap: Callable[[jax.Array], jax.Array] | None = None
    corrects: bool = False
    corrects_positive: bool = False
    scaled: bool = True
    biased: bool = False
    bilateral: bool = False
    own_margin: bool = False
    constants: Callable[[ObjectiveConfig, int], Mapping[str, Any]] = _no_constants


def log_sum_exp(
    logits: Float[Array, "B C"], where: Bool[Array, "B C"]
) -> tuple[Float[Array, "B"], Bool[Array, "B"]]:
    """The log of the summed exponentials of the allowed logits, and whether there is any (0 where
    there is none)."""
    kept = jnp.where(where, logits, -jnp.inf)
    some = where.any(axis=1)
    top = jnp.where(some, jax.lax.stop_gradient(kept.max(axis=1, initial=-jnp.inf)), 0.0)
    total = jnp.exp(kept - top[:, None]).sum(axis=1)
    return top + jnp.log(jnp.where(some, total, 1.0)), some

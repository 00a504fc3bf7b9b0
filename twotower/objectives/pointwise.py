"""Pointwise losses: each row is a question with an answer of its own."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float


def binary_cross_entropy(
    scores: Float[Array, "B"],
    labels: Float[Array, "B"],
    *,
    pos_weight: float | Float[Array, ""] = 1.0,
) -> Float[Array, "B"]:
    r"""Cross-entropy of labels in [0, 1] with the probabilities sigma(s).

    .. math:: \ell = -w_+ \, y \log \sigma(s) - (1 - y) \log(1 - \sigma(s))

    Args:
        scores: logits s.
        labels: y.
        pos_weight: w_+, how many times a row with label 1 counts.

    >>> import jax.numpy as jnp
    >>> binary_cross_entropy(jnp.zeros(2), jnp.array([1.0, 0.0]), pos_weight=2.0)
    Array([1.3862944, 0.6931472], dtype=float32)
    """
    return pos_weight * labels * jax.nn.softplus(-scores) + (1.0 - labels) * jax.nn.softplus(scores)

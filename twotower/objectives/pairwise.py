"""Pairwise losses: a query's positive against each of its negatives, or against the hardest."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# Every loss here takes what `twotower.objectives.loss.Loss.of` says.


def bpr(
    positive: Float[Array, "B"], negatives: Float[Array, "B C"], *, where: Bool[Array, "B C"]
) -> Float[Array, "B"]:
    r"""Bayesian personalised ranking, the mean over negatives of -log sigma(s_+ - s_c).

    Rendle et al., UAI 2009, arXiv 1205.2618.
    """
    return _mean(jax.nn.softplus(negatives - positive[:, None]), where)


def hinge(
    positive: Float[Array, "B"],
    negatives: Float[Array, "B C"],
    *,
    where: Bool[Array, "B C"],
    margin: float,
) -> Float[Array, "B"]:
    """Margin ranking, the mean over negatives of max(0, margin - (s_+ - s_c)); Weston et al., ECML
    2010 without its ranks.

    >>> hinge(jnp.array([1.0]), jnp.array([[0.75, 0.0]]), where=jnp.ones((1, 2), bool), margin=0.5)  # 0.25 and nothing
    Array([0.125], dtype=float32)
    """
    return _mean(jax.nn.relu(margin - positive[:, None] + negatives), where)


def triplet(
    positive: Float[Array, "B"],
    negatives: Float[Array, "B C"],
    *,
    where: Bool[Array, "B C"],
    margin: float,
) -> Float[Array, "B"]:
    """Triplet loss on the hardest negative of the batch, max(0, margin - s_+ + max_c s_c).

    Hermans et al. 2017, arXiv 1703.07737, on similarities. Between unit vectors the squared
    distance is 2 - 2 s: half the margin of squared distances gives half of their loss.
    """
    some = where.any(axis=1)
    hardest = jnp.max(jnp.where(where, negatives, -jnp.inf), axis=1, initial=-jnp.inf)
    return jnp.where(some, jax.nn.relu(margin - positive + jnp.where(some, hardest, 0.0)), 0.0)


def cosine_contrastive(
    positive: Float[Array, "B"],
    negatives: Float[Array, "B C"],
    *,
    where: Bool[Array, "B C"],
    margin: float,
    negative_weight: float,
) -> Float[Array, "B"]:
    r"""Cosine contrastive loss of SimpleX.

    .. math:: \ell = (1 - s_+) + \frac{w}{n} \sum_c \max(0, s_c - m)

    with s the cosine and n allowed negatives. Mao et al., CIKM 2021, arXiv 2109.12613.

    Args:
        margin: m, the similarity below which a negative is left alone.
        negative_weight: w.
    """
    losses = 1.0 - positive + negative_weight * _mean(jax.nn.relu(negatives - margin), where)
    return jnp.where(where.any(axis=1), losses, 0.0)


def _mean(values: Float[Array, "B C"], where: Bool[Array, "B C"]) -> Float[Array, "B"]:
    count = where.sum(axis=1).astype(values.dtype)
    return jnp.sum(values, axis=1, where=where) / jnp.maximum(count, 1.0)

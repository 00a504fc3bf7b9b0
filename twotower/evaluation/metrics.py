"""Ranking metrics: pure, per example. Averaging happens in `twotower.evaluation.evaluate` alone.

The accuracy metrics take `hits` [B, K], whether the item at each rank is a right answer, best
first, and `right` [B], how many right answers the query has in all. `where` [B, K] says which ranks
count: those it leaves out might as well not be in the list, so that masking equals slicing. A query
without right answers scores 0.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Hits = Bool[Array, "B K"]
Right = Int[Array, " B"]
Where = Bool[Array, "B K"] | None


def recall(hits: Hits, right: Right, *, where: Where = None) -> Float[Array, " B"]:
    """Share of the right answers that are in the list: |hits| / |right|.

    >>> recall(jnp.array([[True, False, True]]), jnp.array([4])).tolist()
    [0.5]
    """
    return _divide(_only(hits, where).sum(1), right)


def precision(hits: Hits, right: Right, *, where: Where = None) -> Float[Array, " B"]:
    """Share of the list that is right: |hits| / K. A list that could not be filled is still K
    long."""
    del right
    return _divide(_only(hits, where).sum(1), _ranks(hits, where)[:, -1])


def hit_rate(hits: Hits, right: Right, *, where: Where = None) -> Float[Array, " B"]:
    """1 where the list holds a right answer, else 0. With one right answer a query it is the
    recall."""
    del right
    return _only(hits, where).any(1).astype(jnp.float32)


def ndcg(hits: Hits, right: Right, *, where: Where = None) -> Float[Array, " B"]:
    """Discounted cumulative gain over that of the best possible list, with binary gains:
    sum_k hit_k / log2(k + 1), divided by sum_{k <= min(|right|, K)} 1 / log2(k + 1).

    Järvelin and Kekäläinen, Cumulated gain-based evaluation of IR techniques, TOIS 2002; the ideal
    list is cut at K, as in the evaluation of NGCF and LightGCN.
    """
    ranks = _ranks(hits, where)
    discounts = 1.0 / jnp.log2(jnp.maximum(ranks, 1) + 1.0)
    ideal = _all(hits, where) & (ranks <= right[:, None])
    return _divide((_only(hits, where) * discounts).sum(1), (ideal * discounts).sum(1))


def mrr(hits: Hits, right: Right, *, where: Where = None) -> Float[Array, " B"]:
    """Reciprocal of the rank of the first right answer, 0 where there is none (Voorhees, TREC-8
    question answering)."""
    del right
    return (_only(hits, where) / jnp.maximum(_ranks(hits, where), 1)).max(1)


def average_precision(hits: Hits, right: Right, *, where: Where = None) -> Float[Array, " B"]:
    """Mean of the precision at each right answer: (1 / min(|right|, K)) sum_k hit_k (hits up to k)
    / k.

    Its mean over queries is MAP@K. Dividing by min(|right|, K) lets a perfect list score 1 however
    short it is.
    """
    hits, ranks = _only(hits, where), _ranks(hits, where)
    precisions = jnp.cumsum(hits, axis=1) / jnp.maximum(ranks, 1)
    return _divide((hits * precisions).sum(1), jnp.minimum(right, ranks[:, -1]))


def novelty(
    counts: Int[Array, "B K"], total: Array | int, distinct: Array | int, *, where: Where = None
) -> Float[Array, " B"]:
    """Mean self-information of the recommended items in bits: -log2 p, with p = (count + 1) /
    (total + distinct).

    Zhou et al., Solving the apparent diversity-accuracy dilemma of recommender systems, PNAS 2010.
    One is added to each count so that an item never seen has a finite value.

    Args:
        counts: training rows of the item at each rank.
        total: training rows of all items.
        distinct: items in the corpus, N.
    """
    information = -jnp.log2((counts + 1.0) / (total + distinct))
    return _mean(information, where)


def never_trained(counts: Int[Array, "B K"], *, where: Where = None) -> Float[Array, " B"]:
    """Share of the list that no training row names: such items have whatever vector they started
    with."""
    return _mean((counts == 0).astype(jnp.float32), where)


def coverage(recommended: Bool[Array, " N"]) -> Float[Array, ""]:
    """Share of the corpus that is recommended to anybody. Not per example: it belongs to all lists
    together."""
    return recommended.mean(dtype=jnp.float32)


ACCURACY = {
    "recall": recall,
    "precision": precision,
    "hit_rate": hit_rate,
    "ndcg": ndcg,
    "mrr": mrr,
    "map": average_precision,
}


def _all(hits: Hits, where: Where) -> Bool[Array, "B K"]:
    return jnp.ones_like(hits) if where is None else where


def _only(hits: Hits, where: Where) -> Bool[Array, "B K"]:
    return hits & _all(hits, where)


def _ranks(hits: Hits, where: Where) -> Int[Array, "B K"]:
    """Ranks from 1, not counting the places left out."""
    return jnp.cumsum(_all(hits, where), axis=1)


def _divide(numerator: Array, denominator: Array) -> Float[Array, " B"]:
    return jnp.where(denominator > 0, numerator / jnp.maximum(denominator, 1e-9), 0.0)


def _mean(values: Float[Array, "B K"], where: Where) -> Float[Array, " B"]:
    where = jnp.ones_like(values, bool) if where is None else where
    return _divide(jnp.where(where, values, 0.0).sum(1), where.sum(1))

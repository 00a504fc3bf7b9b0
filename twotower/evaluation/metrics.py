"""Ranking metrics, pure and per query. `twotower.evaluation.evaluate` alone averages them.

The metrics of accuracy take `hits` bool [B, K], whether the item at each rank is relevant, the best
rank first, and `num_relevant` int [B], the number of relevant items of each query in the corpus and
outside of it. A query without a relevant item scores 0.

`where` bool [B, K] says which ranks count. A rank that is left out might as well not be in the
list: masking equals slicing.

Arrays are of NumPy or of JAX, and so are the values: an evaluation measures its lists on the host,
where nothing is compiled; a program of your own may call these under `jax.jit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

Array = np.ndarray | jax.Array


def recall(
    hits: Bool[Array, "B K"],
    num_relevant: Int[Array, " B"],
    *,
    where: Bool[Array, "B K"] | None = None,
) -> Float[Array, " B"]:
    """Returns the share of the relevant items that are in the list: |hits| / |relevant|.

    >>> recall(np.array([[True, False, True]]), np.array([4])).tolist()
    [0.5]
    """
    return _divide(_counted_hits(hits, where).sum(1), num_relevant)


def precision(
    hits: Bool[Array, "B K"],
    num_relevant: Int[Array, " B"],
    *,
    where: Bool[Array, "B K"] | None = None,
) -> Float[Array, " B"]:
    """Returns the share of the list that is relevant: |hits| / K.

    A list that could not be filled is still K long.
    """
    del num_relevant  # all metrics of accuracy are called alike
    # The last rank is the length of the list without the ranks that are left out.
    length = _ranks(hits, where)[:, -1]
    return _divide(_counted_hits(hits, where).sum(1), length)


def hit_rate(
    hits: Bool[Array, "B K"],
    num_relevant: Int[Array, " B"],
    *,
    where: Bool[Array, "B K"] | None = None,
) -> Float[Array, " B"]:
    """Returns 1 where the list holds a relevant item, else 0.

    Where every query has one relevant item it equals the recall.
    """
    del num_relevant
    counted = _counted_hits(hits, where)
    return counted.any(1).astype(_float_type(counted))


def ndcg(
    hits: Bool[Array, "B K"],
    num_relevant: Int[Array, " B"],
    *,
    where: Bool[Array, "B K"] | None = None,
) -> Float[Array, " B"]:
    """Returns the discounted cumulative gain over that of the best possible list.

    With binary gains: sum_k hit_k / log2(k + 1), divided by
    sum_{k <= min(|relevant|, K)} 1 / log2(k + 1).

    Järvelin and Kekäläinen, Cumulated gain-based evaluation of IR techniques, TOIS 2002; the ideal
    list is cut at K, as in the evaluation of NGCF and LightGCN.
    """
    ranks = _ranks(hits, where)
    # A rank that is left out before any that counts is 0, and log2(1) would divide by 0.
    xp = _namespace(hits)
    discounts = 1.0 / xp.log2(xp.maximum(ranks, 1) + 1.0)
    # The ideal list has its relevant items first, as many as there are and fit.
    ideal = _mask(hits, where) & (ranks <= num_relevant[:, None])
    gains = (_counted_hits(hits, where) * discounts).sum(1)
    return _divide(gains, (ideal * discounts).sum(1))


def mrr(
    hits: Bool[Array, "B K"],
    num_relevant: Int[Array, " B"],
    *,
    where: Bool[Array, "B K"] | None = None,
) -> Float[Array, " B"]:
    """Returns the reciprocal of the rank of the first relevant item, 0 where there is none.

    Voorhees, The TREC-8 question answering track report, TREC 1999.
    """
    del num_relevant
    # The first hit has the greatest reciprocal.
    ranks = _namespace(hits).maximum(_ranks(hits, where), 1)
    reciprocals = _counted_hits(hits, where) / ranks
    return reciprocals.max(1)


def average_precision(
    hits: Bool[Array, "B K"],
    num_relevant: Int[Array, " B"],
    *,
    where: Bool[Array, "B K"] | None = None,
) -> Float[Array, " B"]:
    """Returns the mean of the precision at each relevant item.

    (1 / min(|relevant|, K)) sum_k hit_k (hits up to k) / k; its mean over queries is MAP@K.
    Dividing by min(|relevant|, K) lets a perfect list score 1 however short it is.
    """
    ranks = _ranks(hits, where)
    counted = _counted_hits(hits, where)
    xp = _namespace(hits)
    precisions = xp.cumsum(counted, axis=1) / xp.maximum(ranks, 1)
    most_hits = xp.minimum(num_relevant, ranks[:, -1])
    return _divide((counted * precisions).sum(1), most_hits)


def average_precision_of_all(
    hits: Bool[Array, "B K"],
    num_relevant: Int[Array, " B"],
    *,
    where: Bool[Array, "B K"] | None = None,
) -> Float[Array, " B"]:
    """Returns the sum of the precisions at the hits over the number of all relevant items.

    (1 / |relevant|) sum_k hit_k (hits up to k) / k, the map_cut of trec_eval and the map of ranx: a
    perfect list that is shorter than the relevant items are many scores less than 1.
    """
    ranks = _ranks(hits, where)
    counted = _counted_hits(hits, where)
    xp = _namespace(hits)
    precisions = xp.cumsum(counted, axis=1) / xp.maximum(ranks, 1)
    return _divide((counted * precisions).sum(1), num_relevant)


def mrr_of_all(
    hits: Bool[Array, "B K"],
    num_relevant: Int[Array, " B"],
    *,
    where: Bool[Array, "B K"] | None = None,
) -> Float[Array, " B"]:
    """Returns the mean of the reciprocal ranks of all relevant items, 0 of those not in the list.

    `mrr` takes the first one alone; where every query has one relevant item, both are equal.
    """
    ranks = _namespace(hits).maximum(_ranks(hits, where), 1)
    return _divide((_counted_hits(hits, where) / ranks).sum(1), num_relevant)


def ranking_figures(
    hits: np.ndarray, num_relevant: np.ndarray, ks: Sequence[int]
) -> dict[str, np.ndarray]:
    """Returns every metric of `RANKING_METRICS` at several lengths of the lists, in one pass.

    On the host, and without ranks that are left out.

    Args:
        hits: bool [B, K], as above, of the longest lists.
        num_relevant: int [B].
        ks: Lengths, K at most.

    Returns:
        "recall@10" -> float64 [B], and so on.
    """
    # Row by row and rising within a row: the order that hits are asked for in.
    queries, ranks = np.nonzero(hits)
    return hit_figures(queries, ranks, num_relevant, ks)


def hit_figures(
    queries: np.ndarray, ranks: np.ndarray, num_relevant: np.ndarray, ks: Sequence[int]
) -> dict[str, np.ndarray]:
    """Returns what `ranking_figures` does, from the hits alone.

    Hits are few: a length more costs next to nothing.

    Args:
        queries: Query of each hit, int [H], rising.
        ranks: Its rank from 0, int [H], rising within a query.
        num_relevant: int [B].
        ks: Lengths of the lists.
    """
    # Of each hit, the number of hits of its query up to it: they lie together, best first.
    totals = np.bincount(queries, minlength=len(num_relevant))
    # Number of hits of the queries before.
    before = np.cumsum(totals) - totals
    number = np.arange(1, len(queries) + 1) - before[queries]
    reciprocal = 1.0 / (ranks + 1)
    discount = 1.0 / np.log2(ranks + 2.0)
    # The gain of a list whose first 0, 1, ... items are the relevant ones.
    ideal = np.concatenate([[0.0], np.cumsum(1.0 / np.log2(np.arange(max(ks)) + 2.0))])
    figures: dict[str, Any] = {}
    for k in ks:
        listed = ranks < k

        # `listed` is bound now: a closure would see that of the last length.
        def sums(values: np.ndarray, listed: np.ndarray = listed) -> np.ndarray:
            return np.bincount(queries[listed], values[listed], minlength=len(num_relevant))

        found = sums(np.ones(len(ranks)))
        best = np.minimum(num_relevant, k)
        figures[f"recall@{k}"] = _divide(found, num_relevant)
        # By k and not by the length of a list that could not be filled: see `precision`.
        figures[f"precision@{k}"] = found / k
        figures[f"hit_rate@{k}"] = np.minimum(found, 1.0)
        figures[f"ndcg@{k}"] = _divide(sums(discount), ideal[best])
        # The first hit of a query alone counts.
        figures[f"mrr@{k}"] = sums(np.where(number == 1, reciprocal, 0.0))
        precisions = sums(number * reciprocal)
        figures[f"map@{k}"] = _divide(precisions, best)
        figures[f"map_of_all@{k}"] = _divide(precisions, num_relevant)
        figures[f"mrr_of_all@{k}"] = _divide(sums(reciprocal), num_relevant)
    return figures


def means_at(values: np.ndarray, where: np.ndarray, ks: Sequence[int]) -> list[np.ndarray]:
    """Returns the mean of the first numbers of each list, at several lengths.

    Args:
        values: float [B, K], a number for each rank.
        where: bool [B, K], ranks that count.
        ks: Lengths, K at most.

    Returns:
        float64 [B] for each length; 0 where no rank counts.
    """
    # Sums up to each rank once: all lengths are read from them.
    sums = np.cumsum(np.where(where, values, 0.0), axis=1)
    counts = np.cumsum(where, axis=1)
    return [np.asarray(_divide(sums[:, k - 1], counts[:, k - 1])) for k in ks]


def self_information(counts: Array, total: Array | int, num_items: Array | int) -> Array:
    """Returns -log2 p in bits, with p = (count + 1) / (total + num_items); see `novelty`."""
    return -_namespace(counts).log2((counts + 1.0) / (total + num_items))


def novelty(
    counts: Int[Array, "B K"],
    total: Array | int,
    num_items: Array | int,
    *,
    where: Bool[Array, "B K"] | None = None,
) -> Float[Array, " B"]:
    """Returns the mean self-information of the recommended items in bits.

    -log2 p, with p = (count + 1) / (total + num_items): one is added to each count so that an item
    never seen has a finite value.

    Zhou et al., Solving the apparent diversity-accuracy dilemma of recommender systems, PNAS 2010.

    Args:
        counts: Number of training rows of the item at each rank.
        total: Number of training rows of all items.
        num_items: Number of items in the corpus, N.
        where: Ranks that count, which are those that hold an item.
    """
    return _mean(self_information(counts, total, num_items), where)


def never_trained(
    counts: Int[Array, "B K"], *, where: Bool[Array, "B K"] | None = None
) -> Float[Array, " B"]:
    """Returns the share of the list that no training row names.

    Such items still have the vector they were initialised with, or one made of features alone.

    Args:
        counts: Number of training rows of the item at each rank.
        where: Ranks that count.
    """
    return _mean((counts == 0).astype(_float_type(counts)), where)


def coverage(recommended: Bool[Array, " N"]) -> Float[Array, ""] | float:
    """Returns the share of the corpus that is recommended to anybody.

    It belongs to all lists together: the one metric that is not per query.
    """
    return recommended.mean()


def gini(exposures: Int[Array, " N"]) -> float:
    """Returns how unequally often items are recommended: 0 if all are alike, 1 if one has all.

    The Gini coefficient, sum_i (2 i - N - 1) x_i / ((N - 1) sum_i x_i) with rising x, of all items
    of the corpus; 0 where nothing is recommended. It belongs to all lists together, like coverage.

    Args:
        exposures: Number of lists that hold each item.
    """
    rising = np.sort(np.asarray(exposures)).astype(np.float64)
    count = len(rising)
    total = rising.sum()
    # Of one item, or of nothing listed, nothing can be unequal.
    if count < 2 or not total:
        return 0.0
    ranks = 2.0 * np.arange(1, count + 1) - count - 1.0
    return float((ranks * rising).sum() / ((count - 1) * total))


def is_long_tail(counts: Int[Array, " N"], *, head: float = 0.2) -> np.ndarray:
    """Returns which items are not among the share `head` with the most training rows, bool [N].

    The mean over a list is APLT, the average percentage of long-tail items (Abdollahpouri et al.,
    Managing popularity bias in recommender systems with personalized re-ranking, FLAIRS 2019).
    """
    order = np.argsort(-np.asarray(counts), kind="stable")
    tail = np.ones(len(order), bool)
    # By number of items and not of rows: 20 % of the items have most of the rows.
    tail[order[: round(head * len(order))]] = False
    return tail


def popularity_ranks(counts: Int[Array, " N"]) -> np.ndarray:
    """Returns the place of each item by falling number of training rows, from 0, int64 [N].

    The serendipity of a list is the share of its ranks that hold a right answer which is not among
    the K most popular items, those that anybody could have listed (Ge et al., Beyond accuracy,
    RecSys 2010, with popularity as the primitive recommender).
    """
    order = np.argsort(-np.asarray(counts), kind="stable")
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order))
    return ranks


# Metrics of lists besides their hits: what is listed, whether it is right or not.
LIST_METRICS = (
    "novelty",
    "average_popularity",
    "long_tail",
    "serendipity",
    "never_trained",
    "short_list",
)
# Metrics of all lists together.
CORPUS_METRICS = ("coverage", "gini", "repeated_list", "popularity_lift")
# Metrics of accuracy by the name that reports print; all take (hits, num_relevant, where=).
RANKING_METRICS = {
    "recall": recall,
    "precision": precision,
    "hit_rate": hit_rate,
    "ndcg": ndcg,
    "mrr": mrr,
    "map": average_precision,
    "map_of_all": average_precision_of_all,
    "mrr_of_all": mrr_of_all,
}
# Other words for metrics of lists, for the message on one that is not known.
SYNONYMS = {
    "hr": "hit_rate",
    "hits": "hit_rate",
    "hit_ratio": "hit_rate",
    "success_rate": "hit_rate",
    "r": "recall",
    "sensitivity": "recall",
    "p": "precision",
    "dcg": "ndcg",
    "normalized_dcg": "ndcg",
    "rr": "mrr",
    "mean_reciprocal_rank": "mrr",
    "reciprocal_rank": "mrr",
    "ap": "map",
    "average_precision": "map",
    "mean_average_precision": "map",
    "map_cut": "map_of_all",
    "catalogue_coverage": "coverage",
    "item_coverage": "coverage",
}


def _namespace(array: Array) -> Any:
    """Returns the module whose functions take the array: `jax.numpy`, or else `numpy`."""
    # The array API's own way, so that neither library is asked what the other's arrays are.
    return array.__array_namespace__()


def _float_type(array: Array) -> Any:
    """Returns the type of the values: float64 on the host, JAX's default on a device."""
    return _namespace(array).result_type(float)


def _mask(values: Array, where: Bool[Array, "B K"] | None) -> Bool[Array, "B K"]:
    """Returns which ranks count, of lists [B, K]: all of them by default."""
    if where is None:
        return _namespace(values).ones_like(values, dtype=bool)
    return where


def _counted_hits(hits: Bool[Array, "B K"], where: Bool[Array, "B K"] | None) -> Bool[Array, "B K"]:
    return hits & _mask(hits, where)


def _ranks(hits: Bool[Array, "B K"], where: Bool[Array, "B K"] | None) -> Int[Array, "B K"]:
    """Returns ranks from 1, not counting the ranks that are left out."""
    return _namespace(hits).cumsum(_mask(hits, where), axis=1)


def _divide(numerator: Array, denominator: Array) -> Float[Array, " B"]:
    # The quotient is formed everywhere and only then chosen: 0 / 0 would be NaN.
    xp = _namespace(denominator)
    return xp.where(denominator > 0, numerator / xp.maximum(denominator, 1e-9), 0.0)


def _mean(values: Float[Array, "B K"], where: Bool[Array, "B K"] | None) -> Float[Array, " B"]:
    xp = _namespace(values)
    counted = _mask(values, where)
    # Chosen, not multiplied: 0 times an infinite value that is left out would be NaN.
    return _divide(xp.where(counted, values, 0.0).sum(1), counted.sum(1))

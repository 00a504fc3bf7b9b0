"""Rankings that know nothing of the towers: what a model must beat, and for the generated shop what
it cannot."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from twotower.evaluation.evaluate import Scores, dot_scores
from twotower.evaluation.item_to_item import make_item_to_item
from twotower.evaluation.queries import Queries, make_queries
from twotower.pipeline.batches import Rows
from twotower.pipeline.prepare import PreparedData
from twotower.retrieval.user_items import items_of_users

WEEK = 7 * 24 * 3600  # seconds
TOP_SHARE = 0.1  # of the items, in "top quantile"


def make_baselines(
    prepared: PreparedData, queries: Queries, *, seed: int = 0
) -> Mapping[str, Scores]:
    """name -> scores of the queries: random, popularity, popularity_top_quantile, and where the
    data has what they need popularity_last_week (timestamps), item_knn and ease (a log that they
    can manage) and true_preferences (the generator's factors)."""
    num_items, train = len(prepared.items), prepared.positives("train")
    order = popularity_order(train, num_items, seed=seed)
    baselines = {
        "random": random_scores(num_items, seed=seed),
        "popularity": same_for_all(order),
        "popularity_top_quantile": top_quantile_scores(order, seed=seed),
    }
    if train.timestamp is not None:
        last_week = train.timestamp > train.timestamp.max() - WEEK
        baselines["popularity_last_week"] = same_for_all(
            popularity_order(train, num_items, among=last_week, seed=seed)
        )
    known = items_of_users([train], num_users=len(prepared.users))
    tuning = None
    if len(prepared.positives("validation")):  # what training validates with
        evaluation = prepared.config.evaluation
        tuning = make_queries(prepared, "validation", evaluation.query).sample(
            evaluation.validation_queries
        )
    baselines |= make_item_to_item(known, queries, tuning)
    if prepared.truth is not None:
        truth = prepared.truth
        baselines["true_preferences"] = dot_scores(
            truth.user_factors[queries.user], truth.item_factors
        )
    return baselines


def popularity_order(
    train: Rows, num_items: int, *, among: np.ndarray | None = None, seed: int = 0
) -> np.ndarray:
    """int64 [N], the items by falling number of training rows; of equals the one used latest first,
    then as shuffled.

    No two items are equal, so that the rule that puts right answers behind their equals does not
    touch this ranking.

    Args:
        among: bool [rows], the rows to count; None counts all.
    """
    counted = train.item if among is None else train.item[among]
    counts = np.bincount(counted[counted >= 0], minlength=num_items)
    when = np.arange(len(train)) if train.timestamp is None else train.timestamp
    latest = np.full(num_items, np.iinfo(np.int64).min)
    known = train.item >= 0
    np.maximum.at(latest, train.item[known], when[known])
    shuffled = np.random.default_rng(seed).permutation(num_items)
    return np.lexsort((shuffled, -latest.astype(np.float64), -counts))


def same_for_all(order: np.ndarray) -> Scores:
    """Scores that rank the items in `order` for every query."""
    ranks = np.empty(len(order), np.float32)
    # Whole numbers are distinct in float32 up to 2**24 either side of 0.
    ranks[order] = len(order) // 2 - np.arange(len(order))
    return lambda chosen: jnp.broadcast_to(
        jnp.asarray(ranks), (chosen.stop - chosen.start, len(order))
    )


def random_scores(num_items: int, *, seed: int = 0) -> Scores:
    """Scores in [0, 1), of each query its own, whatever the blocks are."""
    key = jax.random.key(seed)

    @jax.jit
    def draw(queries: jax.Array) -> jax.Array:
        return jax.vmap(
            lambda query: jax.random.uniform(jax.random.fold_in(key, query), (num_items,))
        )(queries)

    return lambda chosen: draw(jnp.arange(chosen.start, chosen.stop))


def top_quantile_scores(order: np.ndarray, *, share: float = TOP_SHARE, seed: int = 0) -> Scores:
    """The first `share` of `order` in random order, of each query its own, before all other
    items."""
    top = np.zeros((1, len(order)), np.float32)
    top[0, order[: max(1, round(share * len(order)))]] = 1.0
    draw = random_scores(len(order), seed=seed)
    return lambda chosen: draw(chosen) + jnp.asarray(top)

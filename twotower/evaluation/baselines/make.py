"""Rankings without the towers, which a model must beat.

For the generated shop there is also one that it cannot beat: that by the true preferences.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from absl import logging

from twotower.core.errors import choose
from twotower.evaluation.baselines.item_graph import make_item_graph
from twotower.evaluation.baselines.item_to_item import make_item_to_item
from twotower.evaluation.baselines.popularity import (
    order_scores,
    popularity_order,
    random_scores,
    top_quantile_scores,
)
from twotower.evaluation.evaluate import Scores, dot_scores
from twotower.evaluation.queries import Queries, make_queries
from twotower.pipeline.prepare import PreparedData
from twotower.retrieval.user_items import items_of_users

# All baselines, in the order of a report.
NAMES = (
    "random",
    "popularity",
    "popularity_top_quantile",
    "popularity_last_week",
    "item_graph",
    "item_knn",
    "ease",
    "true_preferences",
)
NO_RIVALS = ("random", "true_preferences")  # those that nobody would use, or can
WEEK = 7 * 24 * 3600  # seconds
MAX_GRAPH_ROWS = 20_000_000  # ten transitions a row, of 12 bytes each


def make_baselines(
    prepared: PreparedData, queries: Queries, *, without: Collection[str] = (), seed: int = 0
) -> Mapping[str, Scores]:
    """Makes the scores of the queries by every baseline that the data allows, by name.

    "random", "popularity" and "popularity_top_quantile" always; "popularity_last_week" where rows
    have timestamps; "item_graph", "item_knn" and "ease" where the log is not too large for them;
    and "true_preferences" where the data was generated.

    Args:
        prepared: Prepared data of a run.
        queries: Queries to score.
        without: Names of baselines to leave out.
        seed: Seed of random orders.

    Raises:
        ConfigError: A name is that of no baseline.
    """
    for name in without:
        choose(dict.fromkeys(NAMES), name, "without_baselines")
    # Fitted on training rows alone, as the model is.
    train = prepared.positives("train")
    num_items = len(prepared.items)
    order = popularity_order(train, num_items, seed=seed)
    baselines = {
        "random": random_scores(num_items, seed=seed),
        "popularity": order_scores(order),
        "popularity_top_quantile": top_quantile_scores(order, seed=seed),
    }
    if train.timestamp is not None:
        # The last week that training rows have; the held-out rows are not read.
        last_week = train.timestamp > train.timestamp.max() - WEEK
        latest = popularity_order(train, num_items, among=last_week, seed=seed)
        baselines["popularity_last_week"] = order_scores(latest)
    train_items = items_of_users([train], num_users=len(prepared.users))
    tuning = None
    if len(prepared.positives("validation")):
        tuning = _tuning_queries(prepared)
    if "item_graph" not in without and len(train) <= MAX_GRAPH_ROWS:
        baselines["item_graph"] = make_item_graph(train_items, queries, tuning)
    elif "item_graph" not in without:
        logging.warning(
            "item_graph is left out: it joins neighbours in %d rows, and more than %d take too "
            "much memory.",
            len(train),
            MAX_GRAPH_ROWS,
        )
    baselines |= make_item_to_item(train_items, queries, tuning, without=without)
    if prepared.truth is not None:
        truth = prepared.truth
        # Factors stand in the order of the users table, a row for each user, not for each query.
        users = truth.user_factors[queries.user]
        baselines["true_preferences"] = dot_scores(users, truth.item_factors)
    return {name: scores for name, scores in baselines.items() if name not in without}


def _tuning_queries(prepared: PreparedData) -> Queries:
    """Returns the queries that training validates with."""
    # The same sample, so that baselines are tuned on as much as the model is.
    evaluation = prepared.config.evaluation
    queries = make_queries(prepared, "validation", evaluation.query)
    return queries.sample(evaluation.validation_queries)

"""Rankings without the towers, which a model must beat.

For the generated shop there is also one that it cannot beat: that by the true preferences.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from absl import logging

from twotower.core.errors import choose
from twotower.evaluation.evaluate import Scores, dot_scores
from twotower.evaluation.item_graph import make_item_graph
from twotower.evaluation.item_to_item import make_item_to_item
from twotower.evaluation.queries import Queries, make_queries
from twotower.pipeline.batches import Rows
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
WEEK = 7 * 24 * 3600  # seconds
MAX_GRAPH_ROWS = 20_000_000  # ten transitions a row, of 12 bytes each
TOP_SHARE = 0.1  # share of the items that count as popular, the "top quantile"


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


def popularity_order(
    train: Rows, num_items: int, *, among: np.ndarray | None = None, seed: int = 0
) -> np.ndarray:
    """Returns the items by falling number of training rows, int64 [N].

    Of items with as many rows the one that was used last comes first, then chance decides. No two
    items are equal, so that the rule that puts relevant items behind their equals does not touch
    this ranking.

    Args:
        train: Training rows.
        num_items: Number of items in the corpus, N.
        among: Rows to count, bool [rows]; None counts all.
        seed: Seed of the order of equals.
    """
    counted_items = train.item
    if among is not None:
        counted_items = counted_items[among]
    # A row outside of the corpus has item -1.
    counts = np.bincount(counted_items[counted_items >= 0], minlength=num_items)
    times = train.timestamp
    if times is None:
        # Without times the order of the log decides.
        times = np.arange(len(train))
    latest = np.full(num_items, np.iinfo(np.int64).min)
    in_corpus = train.item >= 0
    np.maximum.at(latest, train.item[in_corpus], times[in_corpus])
    shuffled = np.random.default_rng(seed).permutation(num_items)
    # The last key is the first to sort by. The least int64 has no negative, hence float64.
    return np.lexsort((shuffled, -latest.astype(np.float64), -counts))


def order_scores(order: np.ndarray) -> Scores:
    """Makes scores that rank the items in `order` for every query."""
    ranks = np.empty(len(order), np.float32)
    # Whole numbers are distinct in float32 up to 2**24 either side of 0.
    ranks[order] = len(order) // 2 - np.arange(len(order))

    def scores(block: slice) -> np.ndarray:
        return np.broadcast_to(ranks, (block.stop - block.start, len(order)))

    return scores


def random_scores(num_items: int, *, seed: int = 0) -> Scores:
    """Makes scores in [0, 1), drawn for each query by its number alone."""

    def draw(query: int) -> np.ndarray:
        # A generator for each query, so that the size of a block does not change what is drawn.
        generator = np.random.Generator(np.random.Philox(key=(seed, query)))
        return generator.random(num_items, dtype=np.float32)

    return lambda block: np.stack([draw(query) for query in range(block.start, block.stop)])


def top_quantile_scores(order: np.ndarray, *, share: float = TOP_SHARE, seed: int = 0) -> Scores:
    """Makes scores that put the first `share` of `order`, shuffled for each query, before all other
    items."""
    num_top = max(1, round(share * len(order)))
    # Random scores are below 1, so that 1 more puts an item before all others.
    bonus = np.zeros((1, len(order)), np.float32)
    bonus[0, order[:num_top]] = 1.0
    draw = random_scores(len(order), seed=seed)
    return lambda block: draw(block) + bonus

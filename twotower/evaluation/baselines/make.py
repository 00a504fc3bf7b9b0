"""Rankings without the towers, which a model must beat.

For the generated shop there is also one that it cannot beat: that by the true preferences.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from pathlib import Path

from absl import logging

from twotower.core.arrays import Ragged
from twotower.core.errors import ConfigError, choose
from twotower.core.install import install_line
from twotower.evaluation.baselines.als import MAX_PAIRS, has_implicit, make_als
from twotower.evaluation.baselines.content import (
    category_scores,
    content_scores,
    describe_words,
    find_categories,
    word_vectors,
)
from twotower.evaluation.baselines.item_graph import make_item_graph
from twotower.evaluation.baselines.item_to_item import make_item_to_item
from twotower.evaluation.baselines.popularity import (
    order_scores,
    popularity_order,
    random_scores,
    top_quantile_scores,
)
from twotower.evaluation.baselines.tuning import Baselines, Choice, FitCache, data_hash
from twotower.evaluation.evaluate import dot_scores
from twotower.evaluation.queries import Queries, make_queries
from twotower.pipeline.prepare import PreparedData
from twotower.retrieval.user_items import items_of_users

# All baselines, in the order of a report.
NAMES = (
    "random",
    "popularity",
    "popularity_top_quantile",
    "popularity_last_week",
    "popularity_window",
    "popularity_in_categories",
    "last_item_words",
    "item_graph",
    "item_knn",
    "ease",
    "als",
    "true_preferences",
)
NO_RIVALS = ("random", "true_preferences")  # those that nobody would use, or can
WEEK = 7 * 24 * 3600  # seconds
HOURS = {"h": 1, "d": 24, "w": 7 * 24}  # of the units of a window
MAX_GRAPH_ROWS = 20_000_000  # ten transitions a row, of 12 bytes each


@dataclasses.dataclass(frozen=True)
class BaselineOptions:
    """Options of the baselines that are measured beside a model.

    Attributes:
        without: Names of baselines to leave out.
        popularity_window: Seconds before the end of training whose rows "popularity_window"
            counts; 0 leaves it out.
        quantile_threshold: Share of the items that are less popular than those that
            "popularity_top_quantile" shuffles.
    """

    without: tuple[str, ...] = ()
    popularity_window: int = 0
    quantile_threshold: float = 0.9


ALL_BASELINES = BaselineOptions()


def parse_window(text: str) -> int:
    """Returns the seconds of a window such as "7d", "12h" or "4w"; 0 of ""."""
    if not text:
        return 0
    # A fraction is not read: 0.5d is 12h.
    found = re.fullmatch(r"(\d+)([hdw])", text.strip())
    if found is None or not int(found[1]):
        raise ConfigError(
            f"--popularity_window={text} is no span of time. Write hours, days or weeks: 12h, 7d."
        )
    return int(found[1]) * HOURS[found[2]] * 3600


def make_baselines(
    prepared: PreparedData,
    queries: Queries,
    options: BaselineOptions = ALL_BASELINES,
    *,
    seed: int = 0,
    folder: Path | None = None,
) -> Baselines:
    """Makes the scores of the queries by every baseline that the data allows, by name.

    "random", "popularity" and "popularity_top_quantile" always; "popularity_last_week" and
    "popularity_window" where rows have timestamps; "popularity_in_categories" and "last_item_words"
    where items have texts; "item_graph", "item_knn", "ease" and "als" where the log is not too
    large for them; and "true_preferences" where the data was generated.

    Args:
        prepared: Prepared data of a run.
        queries: Queries to score.
        options: Which to make, and how.
        seed: Seed of random orders.
        folder: Folder that keeps what is fitted; None keeps nothing.

    Raises:
        ConfigError: A name is that of no baseline.
    """
    without = options.without
    for name in without:
        choose(dict.fromkeys(NAMES), name, "without_baselines")
    baselines = _popular(prepared, queries, options, seed)
    baselines.join(_by_content(prepared, queries, seed, without))
    baselines.join(_fitted(prepared, queries, without, folder))
    if prepared.truth is not None:
        truth = prepared.truth
        # Factors stand in the order of the users table, a row for each user, not for each query.
        users = truth.user_factors[queries.user]
        baselines["true_preferences"] = dot_scores(users, truth.item_factors)
    # In the order of a report, whatever order they were made in.
    kept = Baselines((name, baselines[name]) for name in NAMES if name in baselines)
    for name in without:
        kept.pop(name, None)
    kept.choices = {name: one for name, one in baselines.choices.items() if name in kept}
    return kept


def _popular(
    prepared: PreparedData, queries: Queries, options: BaselineOptions, seed: int
) -> Baselines:
    # Fitted on training rows alone, as the model is.
    train = prepared.positives("train")
    num_items = queries.num_items
    order = popularity_order(train, num_items, seed=seed)
    share = 1.0 - options.quantile_threshold
    baselines = Baselines()
    # Cheap ones are always made, and left out at the end.
    baselines["random"] = random_scores(num_items, seed=seed)
    baselines["popularity"] = order_scores(order)
    top = top_quantile_scores(order, share=share, seed=seed)
    baselines.add("popularity_top_quantile", top, Choice(f"the top {share:.3g} of the items"))
    if train.timestamp is None:
        return baselines
    windows = {"popularity_last_week": WEEK, "popularity_window": options.popularity_window}
    for name, seconds in windows.items():
        if not seconds:
            continue
        # The last rows that training has; the held-out ones are not read.
        is_late = train.timestamp > train.timestamp.max() - seconds
        latest = popularity_order(train, num_items, among=is_late, seed=seed)
        days = Choice(f"the last {seconds / (24 * 3600):g} days of training")
        baselines.add(name, order_scores(latest), days)
    return baselines


def _by_content(
    prepared: PreparedData, queries: Queries, seed: int, without: Collection[str]
) -> Baselines:
    baselines = Baselines()
    items = prepared.items
    if "popularity_in_categories" not in without:
        found = find_categories(items)
        if found is not None:
            column, categories = found
            # The same seed as "popularity", so that both rank equals alike.
            order = popularity_order(prepared.positives("train"), len(items), seed=seed)
            scores = category_scores(categories, order, queries)
            baselines.add("popularity_in_categories", scores, Choice(f"by {column}"))
    if "last_item_words" not in without:
        vectors = word_vectors(items)
        if vectors is not None:
            baselines.add(
                "last_item_words", content_scores(vectors, queries), describe_words(items)
            )
    return baselines


def _fitted(
    prepared: PreparedData, queries: Queries, without: Collection[str], folder: Path | None
) -> Baselines:
    baselines = Baselines()
    train = training_lists(prepared)
    tuning = tuning_queries(prepared)
    cache = open_cache(prepared, folder, train, tuning)
    # Graph, neighbours and factors are left out beyond a size: a comparison may not take longer
    # than the training.
    if "item_graph" not in without and train.values.size <= MAX_GRAPH_ROWS:
        baselines.add("item_graph", *make_item_graph(train, queries, tuning, cache=cache))
    elif "item_graph" not in without:
        logging.warning(
            "item_graph is left out: it joins neighbours in %d rows, and more than %d take too "
            "much memory.",
            train.values.size,
            MAX_GRAPH_ROWS,
        )
    baselines.join(make_item_to_item(train, queries, tuning, without=without, cache=cache))
    if "als" in without:
        return baselines
    # Said, and no error: nobody asked for this baseline by its name.
    if not has_implicit():
        logging.info("als is left out: it needs the extra 'als' (%s).", install_line("als"))
    elif train.values.size > MAX_PAIRS:
        logging.warning(
            "als is left out: it factorises %d pairs, and more than %d take too long.",
            train.values.size,
            MAX_PAIRS,
        )
    else:
        baselines.add("als", *make_als(train, queries, tuning, cache=cache))
    return baselines


def training_lists(prepared: PreparedData) -> Ragged:
    """Returns the distinct items of each user in training, the latest last."""
    return items_of_users([prepared.positives("train")], num_users=len(prepared.users))


def open_cache(
    prepared: PreparedData, folder: Path | None, train: Ragged, tuning: Queries | None
) -> FitCache:
    """Returns the models that were fitted on this data before."""
    if folder is None:
        return FitCache(None)
    # By the data and not by the run: another model on the same data finds the same baselines.
    return FitCache(folder, data_hash(train, len(prepared.items), tuning))


def tuning_queries(prepared: PreparedData) -> Queries | None:
    """Returns the queries that training validates with; None without validation rows."""
    # Without validation rows nothing may choose: test rows would flatter the baseline.
    if not len(prepared.positives("validation")):
        return None
    # The same sample, so that baselines are tuned on as much as the model is.
    evaluation = prepared.config.evaluation
    sample = evaluation.validation_queries
    return make_queries(prepared, "validation", evaluation.query, sample=sample)

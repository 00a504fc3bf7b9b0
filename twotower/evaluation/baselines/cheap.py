"""The best of the baselines that cost little beside a training, on its validation rows.

`evaluate --baselines` measures all of them, over the test rows.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from twotower.evaluation.baselines.make import (
    NO_RIVALS,
    BaselineOptions,
    make_baselines,
    training_lists,
)
from twotower.evaluation.baselines.tuning import FITTED
from twotower.evaluation.evaluate import Scores, evaluate_masked
from twotower.evaluation.intervals import paired_intervals
from twotower.evaluation.queries import Queries
from twotower.pipeline.prepare import PreparedData

# What takes a few seconds of processor time; measured in experiments/benchmarks/RESULTS.md.
MAX_EASE_ITEMS = 2_000  # inverts a matrix of items by items, once for each of a few ridges
MAX_ITEM_PAIRS = 10**8  # pairs of two items of one user, which item-kNN and EASE count
MAX_KNN_ITEMS = 10_000  # counts the pairs of items by items
MAX_GRAPH_ROWS = 2_000_000  # ten transitions a row
MAX_WORDS_ITEMS = 20_000  # items whose titles are compared


@dataclasses.dataclass(frozen=True)
class Rival:
    """The best cheap baseline beside a model.

    Attributes:
        name: Name of the baseline, such as "item_knn".
        value: Its figure.
        low, high: Ends of the interval of the model's figure less this one, over the same users.
        tried: Number of baselines that were measured.
        left_out: Name of a baseline that was not measured -> reason.
    """

    name: str
    value: float
    low: float
    high: float
    tried: int
    left_out: dict[str, str]


def too_dear(prepared: PreparedData) -> dict[str, str]:
    """Returns the baselines that would take long beside a training, and why."""
    train = training_lists(prepared)
    pairs = int((train.lengths.astype(float) ** 2).sum())
    items = len(prepared.items)
    left_out = {"als": "it factorises all rows many times"}
    if pairs > MAX_ITEM_PAIRS:
        counted = f"{pairs:,} pairs of items of one user are more than {MAX_ITEM_PAIRS:,}"
        left_out |= {"item_knn": counted, "ease": counted}
    if items > MAX_KNN_ITEMS:
        left_out["item_knn"] = f"{items:,} items are more than {MAX_KNN_ITEMS:,}"
    if items > MAX_EASE_ITEMS:
        left_out["ease"] = f"{items:,} items are more than {MAX_EASE_ITEMS:,}"
    if len(train.values) > MAX_GRAPH_ROWS:
        left_out["item_graph"] = f"{len(train.values):,} rows are more than {MAX_GRAPH_ROWS:,}"
    if items > MAX_WORDS_ITEMS:
        left_out["last_item_words"] = f"{items:,} items are more than {MAX_WORDS_ITEMS:,}"
    return left_out


def find_rival(
    prepared: PreparedData, model: Scores, queries: Queries, metric: str, workdir: Path
) -> Rival:
    """Measures the cheap baselines, and compares the model with the best of them.

    Their settings are chosen by validation rows, as the model's checkpoint was; what is fitted is
    kept for `evaluate`.

    Args:
        prepared: Data of the run.
        model: Scores of the model.
        queries: Queries of its validations.
        metric: Name of a figure of rankings, such as "ndcg@10".
        workdir: Folder of the run.
    """
    left_out = too_dear(prepared)
    options = BaselineOptions(without=(*NO_RIVALS, *left_out))
    rankings = make_baselines(prepared, queries, options, folder=workdir / FITTED)
    ks = (int(metric.partition("@")[2]),)
    best = ""
    value = -np.inf
    columns = {"model": evaluate_masked(model, queries, ks)}
    for name, scores in rankings.items():
        found = evaluate_masked(scores, queries, ks)
        # Of equals the first stays, which is the simplest.
        if found.figures[metric] > value:
            best, value = name, found.figures[metric]
            columns = {"model": columns["model"], name: found}
    values = {name: {metric: found.resampled[metric]} for name, found in columns.items()}
    where = columns["model"].is_averaged
    _, differences = paired_intervals(values, queries.user, where, first="model")
    low, high = differences.get(best, {}).get(metric, [0.0, 0.0])
    return Rival(best, float(value), low, high, len(rankings), left_out)

"""Figures of a run: the model beside baselines, and the index of its bundle beside exact search.

`twotower.evaluation.report.text` prints them.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa

from twotower.core.arrays import evenly_spaced, pad_rows
from twotower.core.files import atomic
from twotower.data.report import describe_unreachable
from twotower.evaluation.audits.examine import examine
from twotower.evaluation.baselines.make import ALL_BASELINES, BaselineOptions, make_baselines
from twotower.evaluation.baselines.popularity import random_scores
from twotower.evaluation.baselines.tuning import FITTED, Baselines
from twotower.evaluation.evaluate import (
    Evaluation,
    Scores,
    evaluate_both,
    evaluate_masked,
    model_scores,
    rows_of_scores,
)
from twotower.evaluation.further import FurtherMetrics, item_values
from twotower.evaluation.heads import label_tasks, make_head_metrics
from twotower.evaluation.intervals import Ends, paired_intervals
from twotower.evaluation.queries import TRAIN_QUERIES, Queries, make_queries, usual_targets
from twotower.evaluation.query_table import (
    item_slice_path,
    item_slice_table,
    query_table,
    query_table_path,
    record_name,
    write_query_table,
)
from twotower.evaluation.slices import (
    Cells,
    Slice,
    column_slice,
    default_slices,
    label_queries,
    measure_slices,
)
from twotower.index.exact import ExactIndex
from twotower.index.recall import list_recall
from twotower.index.vectors import append_coordinate, log_counts
from twotower.objectives.labels import LABEL
from twotower.retrieval.embed import embed_rows
from twotower.retrieval.export import served_model
from twotower.retrieval.retriever import Retriever
from twotower.towers.two_tower import TwoTower
from twotower.training.run import Run

INDEX_QUERIES = 1_000  # users that the index is measured with
INDEX_K = 10  # length of the lists that the index is measured with
SINGLE_QUERIES = 100  # number of these users that are searched for one by one

# Figures that no interval is given for, and why: a wrong one would be worse.
NO_INTERVAL = {
    "auc_of_all": "it compares the scores of different users, all of which would have to be kept",
    "calibration_error": "it is a sum of distances, which the noise of a resample only adds to",
}

SUFFIXES = ("", "_unmasked")  # of the names of figures with seen items masked, and without

# Names -> figures, or further names, as JSON holds them.
Measured = dict[str, Any]


def measure_run(
    run: Run,
    *,
    ks: Sequence[int],
    split: str = "test",
    targets: str = "",
    baselines: bool = True,
    baseline_options: BaselineOptions = ALL_BASELINES,
    max_queries: int = 0,
    popularity_weights: Sequence[float] = (),
    slices: Sequence[str] = (),
    further_metrics: Sequence[str] = (),
    keep_queries: bool = False,
) -> Measured:
    """Measures the model of a run, and baselines, over the whole corpus.

    Vectors are cut to `config.retrieval.dim`, as a bundle has them. "_unmasked" marks figures of
    lists that may hold seen items.

    Args:
        run: A loaded run.
        ks: Lengths of the lists.
        split: "test", "validation" or "train".
        targets: Rows of a user that are to be found, see `make_queries`; "" for those of the
            configuration.
        baselines: Whether to measure them.
        baseline_options: Which to measure, and how.
        max_queries: Greatest number of queries, evenly spaced, and of labelled rows of each head; 0
            takes all.
        popularity_weights: Factors by which the log count of an item is added to its score. Each is
            measured with seen items masked.
        slices: Columns of users, items or rows whose values are measured apart, besides what
            always is; see `twotower.evaluation.slices`.
        further_metrics: Metrics that take longer: "auc", "diversity" (by the item vectors of the
            model) and "distinct.COLUMN" (distinct values of a column of items in a list).
        keep_queries: Whether the figures of every query are written to the folder of the run, see
            `query_table`.

    Returns:
        {"protocol": {...}, "answers": {"outside_corpus": ..., "greatest_recall": ...}, "model":
        {"recall@10": ...}, "model_intervals": {"recall@10": [low, high]}, "baselines": {name: ...},
        "baseline_intervals": {name: {"recall@10": [low, high]}}, "baseline_differences" likewise,
        the model less the baseline over the same users; and these with "_unmasked"; for items and
        users that training never saw "new_items" and "new_users", each {"model": ..., "random":
        ...}, and "new_items_intervals" likewise; for a loss on labels "labels": {"auc": ...,
        "intervals": {"auc": [low, high]}, "calibration_curve": [...]}; for a model with heads
        "heads": {name: {"auc": ..., "intervals": ...}}; "without_intervals": {figure: reason}; with
        baselines "baseline_choices": {name:
        {"setting": ..., "tried": number of settings that validation chose from}}; for further test
        rows "test_set", see `twotower.pipeline.prepare.FurtherRows`; with `popularity_weights`
        "popularity_weights": {"0.05": {"recall@10": ...}} and "popularity_weights_intervals";
        "audits", see `twotower.evaluation.audits.base.audit_table`; and "health", see
        `twotower.evaluation.audits.health`.
    """
    # Heads read whole vectors, which are not cut for a bundle.
    whole_model = run.model
    # Rankings are those of the vectors that a bundle would serve.
    run = dataclasses.replace(run, model=served_model(run))
    every_query = make_queries(
        run.prepared,
        split,
        run.config.evaluation.query,
        targets=targets,
        max_queries=max_queries,
    )
    queries = every_query.sample(max_queries)
    parts = default_slices(queries, run.prepared.train.user)
    # Before anything is ranked: a misspelt column is refused at once.
    parts |= {name: column_slice(run.prepared, queries, split, name) for name in slices}
    further = _further(run, further_metrics)
    rankings: dict[str, Scores] = {
        "model": model_scores(run.prepared, run.model, run.weights, queries)
    }
    made = Baselines()
    if baselines:
        made = make_baselines(run.prepared, queries, baseline_options, folder=run.workdir / FITTED)
        rankings |= made
    available = len(every_query)
    if split == "train" and every_query.seen_list is not None:
        # Its queries are a sample already.
        available = len(run.prepared.positives(split))
    measured: Measured = {"protocol": _protocol(run, split, targets, queries, available)}
    if run.prepared.further is not None:
        measured["test_set"] = dataclasses.asdict(run.prepared.further)
    measured |= describe_choices(made)
    if run.model is not whole_model:
        measured["protocol"]["dim"] = run.model.dim
    measured["answers"] = measure_answers(
        every_query, split, has_item_table=run.prepared.has_catalogue
    )
    masked = _measure_rankings(rankings, queries, ks, further, measured)
    keep = None
    # Of masked lists alone: runs are compared by these.
    if keep_queries:
        protocol = measured["protocol"] | {"ks": list(ks)}
        _write_queries(run, queries, masked, protocol, parts)
        keep = _ItemSlices(run, queries)
    measured["slices"] = measure_slices(parts, queries, masked, ks, keep=keep)
    if keep is not None:
        keep.write(record_name(measured["protocol"]))
    measured |= _measure_new(rankings["model"], run.prepared.train.user, queries, ks)
    if popularity_weights:
        measured |= measure_popularity_weights(rankings["model"], queries, ks, popularity_weights)
    measured |= _measure_labels(run, whole_model, split, max_queries)
    measured |= without_intervals(measured)
    measured |= examine(run, whole_model, every_query, queries, measured, masked["model"])
    return measured


def _measure_rankings(
    rankings: Mapping[str, Scores],
    queries: Queries,
    ks: Sequence[int],
    further: FurtherMetrics,
    measured: Measured,
) -> dict[str, Evaluation]:
    """Writes the figures of rankings into `measured`, and returns their lists with seen masked."""
    masked: dict[str, Evaluation] = {}
    values: dict[str, dict[str, Mapping[str, np.ndarray]]] = {suffix: {} for suffix in SUFFIXES}
    is_averaged: dict[str, np.ndarray] = {}
    # Papers report either mode, and the two are not comparable: both are always measured.
    for name, scores in rankings.items():
        evaluations = evaluate_both(scores, queries, ks, further=further)
        masked[name] = evaluations[0]
        for suffix, evaluation in zip(SUFFIXES, evaluations):
            values[suffix][name] = evaluation.resampled
            # Those of masked lists are kept anyway; of the others half the bytes are enough, since
            # resamples are summed in float32.
            if evaluation is not evaluations[0]:
                values[suffix][name] = {
                    key: column.astype(np.float32) for key, column in evaluation.resampled.items()
                }
            # The same of all rankings: it is the queries that have an answer or none.
            is_averaged[suffix] = evaluation.is_averaged
            if name != "model":
                others = measured.setdefault(f"baselines{suffix}", {})
                others[name] = evaluation.figures
                continue
            measured[f"model{suffix}"] = evaluation.figures
    # When all are measured, so that one draw of counts weighs the model and every baseline.
    for suffix in SUFFIXES:
        intervals, differences = paired_intervals(
            values[suffix], queries.user, is_averaged[suffix], first="model"
        )
        measured[f"model_intervals{suffix}"] = intervals.pop("model", {})
        if len(rankings) > 1:
            measured[f"baseline_intervals{suffix}"] = intervals
            measured[f"baseline_differences{suffix}"] = differences
    return masked


def _write_queries(
    run: Run,
    queries: Queries,
    masked: Mapping[str, Evaluation],
    protocol: Measured,
    slices: Mapping[str, Slice],
) -> None:
    """Writes the figures of every query into the folder of a run."""
    table = query_table(
        run.prepared.users["user_id"],
        queries,
        masked,
        protocol,
        label_queries(slices, queries),
        item_ids=run.prepared.items["item_id"],
    )
    write_query_table(table, query_table_path(run.workdir, record_name(protocol)))


class _ItemSlices:
    """The figures of slices of items, which are written beside those of the queries."""

    def __init__(self, run: Run, queries: Queries):
        self._run = run
        self._queries = queries
        self._tables: list[pa.Table] = []

    def __call__(self, name: str, cells: Cells) -> None:
        user_ids = self._run.prepared.users["user_id"]
        self._tables.append(item_slice_table(user_ids, self._queries, name, cells))

    def write(self, name: str) -> None:
        """Writes them into the folder of the run, under the name of an evaluation."""
        path = item_slice_path(self._run.workdir, name)
        write_query_table(pa.concat_tables(self._tables), path)


def _further(run: Run, names: Sequence[str]) -> FurtherMetrics:
    """Returns what the named metrics read."""
    values = item_values(run.prepared.items, names)
    vectors = None
    if "diversity" in names:
        # Those of the model for baselines too, whose lists are then compared by one measure.
        features = run.prepared.features["item"]
        vectors = np.asarray(embed_rows(run.model, run.weights, "item", features))
    return FurtherMetrics("auc" in names, vectors, values)


def _measure_labels(run: Run, model: TwoTower, split: str, max_rows: int) -> Measured:
    """Measures a loss on labels and the heads, where there are any, on the rows of a split."""
    # Training rows are sampled by default, as there are many and nobody reports on them.
    if split == "train":
        max_rows = max_rows or TRAIN_QUERIES
    if not label_tasks(run.config.objective):
        return {}
    measure = make_head_metrics(run.prepared, model, split, max_rows=max_rows, in_full=True)
    tasks = measure(run.weights)
    measured: Measured = {}
    if LABEL in tasks:
        measured["labels"] = tasks.pop(LABEL)
    if run.config.objective.heads:
        measured["heads"] = tasks
    return measured


def without_intervals(measured: Mapping[str, Any]) -> Measured:
    """Returns {"without_intervals": {figure: reason}} of the figures measured that have none."""
    tasks = [measured.get("labels", {}), *measured.get("heads", {}).values()]
    names = {name for figures in (measured["model"], *tasks) for name in figures}
    reasons = {name: text for name, text in NO_INTERVAL.items() if name in names}
    return {"without_intervals": reasons} if reasons else {}


def measure_answers(queries: Queries, split: str, *, has_item_table: bool) -> Measured:
    """Measures how many right answers any ranking of the corpus could find.

    Args:
        queries: All queries of a split.
        split: Name of the split.
        has_item_table: Whether items come from a table of their own.

    Returns:
        "all" and "outside_corpus", numbers of right answers; "greatest_recall", the recall of a
        perfect ranking without an end, from 0 to 1; and where answers are outside "warning", a
        sentence with the cure.
    """
    answers = queries.num_relevant
    total = int(answers.sum())
    outside = int(queries.missing.sum())
    is_asked = answers > 0
    found = queries.relevant.lengths[is_asked] / answers[is_asked]
    recall = 0.0
    if len(found):
        recall = float(found.mean())
    measured: Measured = {"all": total, "outside_corpus": outside, "greatest_recall": recall}
    if outside:
        measured["warning"] = describe_unreachable(
            outside, total, recall, part=split, has_item_table=has_item_table
        )
    return measured


def _measure_new(
    scores: Scores, trained: np.ndarray, queries: Queries, ks: Sequence[int]
) -> Measured:
    """Measures relevant items, and queries of users, that training never saw, where there are any.

    They rank the whole corpus with seen items masked, by the model and at random.

    Args:
        scores: Scores of the model, of any rows of the queries.
        trained: Users of training rows.
        queries: All queries.
        ks: Lengths of the lists.
    """
    measured: Measured = {}
    # A user of any training row is known, whether the row is positive or not.
    is_new = ~np.isin(queries.user, trained)
    parts = {
        "new_items": (queries.keep_new_items(), np.ones(len(queries), bool)),
        "new_users": (queries, is_new),
    }
    for name, (all_queries, is_asked) in parts.items():
        # Few queries are left of many: the others would only be scored.
        rows = np.flatnonzero(is_asked & (all_queries.num_relevant > 0))
        part = all_queries.take(rows)
        if not len(part):
            continue
        # Chance is the bar: popularity ranks every new item last.
        rankings = {
            "model": rows_of_scores(scores, rows),
            "random": random_scores(part.num_items),
        }
        found = {ranking: evaluate_masked(scores, part, ks) for ranking, scores in rankings.items()}
        measured[name] = {ranking: one.figures for ranking, one in found.items()}
        measured[f"{name}_intervals"] = _intervals_of(found, part)
    return measured


def _intervals_of(evaluations: Mapping[str, Evaluation], queries: Queries) -> Ends:
    """Returns the intervals of rankings of the same queries by one draw of counts."""
    first = next(iter(evaluations))
    values = {name: one.resampled for name, one in evaluations.items()}
    where = evaluations[first].is_averaged
    intervals, _ = paired_intervals(values, queries.user, where, first=first)
    return intervals


def measure_popularity_weights(
    score_block: Scores, queries: Queries, ks: Sequence[int], weights: Sequence[float]
) -> Measured:
    """Measures lists with popularity weighed: recall against coverage and novelty.

    Args:
        score_block: Scores of the model, see `evaluate`.
        queries: Queries with their relevant and their seen items.
        ks: Lengths of the lists.
        weights: Factors by which the log count of an item is added to its score.

    Returns:
        "popularity_weights", the metrics by weight, seen items masked; and
        "popularity_weights_intervals" likewise.
    """
    log_popularity = log_counts(queries.counts)
    found: dict[str, Evaluation] = {}
    for weight in weights:
        # The default binds this turn's weight: a closure would see the last one.
        def weighed_scores(block: slice, weight: float = weight) -> jax.Array | np.ndarray:
            scores = score_block(block)
            # On a mesh there are more columns than items.
            bonus = weight * pad_rows(log_popularity, scores.shape[1])
            return scores + bonus[None, :]

        found[f"{weight:g}"] = evaluate_masked(weighed_scores, queries, ks)
    return {
        "popularity_weights": {name: one.figures for name, one in found.items()},
        "popularity_weights_intervals": _intervals_of(found, queries),
    }


def measure_index(retriever: Retriever, users: np.ndarray) -> Measured:
    """Measures the index of a bundle against exact search.

    Args:
        retriever: A loaded bundle.
        users: Rows of its users table, whose vectors are searched with.

    Returns:
        recall@10, queries per second in one batch, and the median time of a single query in
        milliseconds. The times depend on the machine, and are of the index alone: without encoding
        users or dropping seen items.
    """
    bundle = retriever.bundle
    index = bundle.index
    queries = np.asarray(bundle.user_vectors[evenly_spaced(users, INDEX_QUERIES)])
    k = min(INDEX_K, len(bundle.vectors))
    # Of the stored vectors: rounding them is no error of the index.
    _, truth = ExactIndex(bundle.vectors).search(queries, k)
    # An index with the popularity knob has one coordinate more; 0 asks for the plain dot product.
    if index.dim > queries.shape[1]:
        queries = append_coordinate(queries, 0.0)
    # As many as the truth has: a small corpus has fewer than k.
    _, rows = index.search(queries, truth.shape[1])
    batch_seconds = _median_seconds(lambda: index.search(queries, INDEX_K), repeats=5)
    single_seconds = []
    for query in queries[:SINGLE_QUERIES]:
        one_query = query[None]
        seconds = _median_seconds(lambda q=one_query: index.search(q, INDEX_K), repeats=1)
        single_seconds.append(seconds)
    # The first tenth warms caches and compiles.
    warm_seconds = single_seconds[len(single_seconds) // 10 :]
    return {
        "kind": index.kind,
        f"recall@{INDEX_K}": list_recall(rows, truth),
        "queries_per_second": round(len(queries) / batch_seconds, 1),
        "single_query_ms": round(1e3 * float(np.median(warm_seconds)), 4),
        "queries": len(queries),
        "items": len(bundle.vectors),
        "step": bundle.manifest.get("step"),
    }


def write_metrics(measured: Mapping[str, Any], path: Path) -> None:
    """Writes figures as JSON, whole or not at all; those of no query as null."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(_null_where_unasked(measured), indent=2) + "\n")


def _null_where_unasked(tree: Any) -> Any:
    """Returns figures in which those that no query is behind are None, and not 0."""
    if isinstance(tree, (list, tuple)):
        return [_null_where_unasked(value) for value in tree]
    if not isinstance(tree, Mapping):
        return tree
    # Counts are whole numbers and stay: that there are none is what they say.
    is_unasked = tree.get("queries") == 0
    return {
        name: None if is_unasked and isinstance(value, float) else _null_where_unasked(value)
        for name, value in tree.items()
    }


def describe_choices(baselines: Baselines) -> Measured:
    """Returns the settings of baselines as "baseline_choices"; {} where none has any."""
    choices = {name: dataclasses.asdict(one) for name, one in baselines.choices.items()}
    return {"baseline_choices": choices} if choices else {}


def _protocol(run: Run, split: str, targets: str, queries: Queries, available: int) -> Measured:
    """Returns what a reader needs to repeat the figures, or to compare them with others."""
    # Of unusual ones alone: figures of before there were any compare with those of today.
    unusual = {}
    if run.prepared.further is not None:
        unusual["test_set"] = run.prepared.further.name
    if targets:
        unusual["targets"] = targets
    config = run.config
    asked_for = targets or usual_targets(split, config.split)
    query = {"": config.evaluation.query, "all": "user"}.get(asked_for, asked_for)
    return {
        "split": split,
        "query": query,
        "step": run.step,
        "items": queries.num_items,
        "asked": len(queries),
        "available": available,
    } | unusual


def _median_seconds(call: Callable[[], object], *, repeats: int) -> float:
    """Returns the median wall-clock time of a call."""
    # The median, which another program on the machine hardly moves.
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))

"""What is reported of a run: the model beside baselines, the index beside exact search, as JSON and
as a table."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from twotower.core.arrays import evenly_spaced, pad_rows
from twotower.core.files import atomic
from twotower.core.tables import format_table
from twotower.evaluation.baselines import make_baselines, random_scores
from twotower.evaluation.evaluate import Scores, evaluate, model_scores
from twotower.evaluation.heads import METRICS as HEAD_METRICS
from twotower.evaluation.heads import make_head_metrics
from twotower.evaluation.metrics import ACCURACY
from twotower.evaluation.queries import Queries, make_queries
from twotower.index.exact import ExactIndex
from twotower.index.popularity import log_counts, widened
from twotower.index.tuning import overlap
from twotower.retrieval.export import served_model
from twotower.retrieval.retriever import Retriever
from twotower.training.run import Run

INDEX_QUERIES = 1_000
INDEX_K = 10
PRINTED_AT_EVERY_K = ("recall", "ndcg")
METRICS = (*ACCURACY, "coverage", "novelty", "never_trained")

Measured = dict[str, Any]


def measure_run(
    run: Run,
    *,
    ks: Sequence[int],
    split: str = "test",
    baselines: bool = True,
    most: int = 0,
    popularity_weights: Sequence[float] = (),
) -> Measured:
    """Metrics of the model, and of the baselines, with seen items masked and ("_unmasked") without;
    of vectors cut to `config.retrieval.dim`, as a bundle has them.

    Args:
        ks: list lengths.
        split: "test" or "validation".
        baselines: whether to measure them.
        most: ask at most this many queries, evenly spaced, and of each head as many rows; 0 asks
            all.
        popularity_weights: times the log count of an item is added to its score; each is measured,
            seen items masked.

    Returns:
        {"protocol": how it was measured, "model": {"recall@10": ...}, "model_unmasked": ...,
        "baselines": {name: ...}, "baselines_unmasked": ..., of items and users that training never
        saw "new_items" and "new_users", each {"model": ..., "random": ...}, of a model with heads
        "heads": {name: {"auc": ...}}, and with `popularity_weights` "popularity_weights": {"0.05":
        {"recall@10": ...}}}
    """
    whole, run = run.model, dataclasses.replace(run, model=served_model(run))
    every = make_queries(run.prepared, split, run.config.evaluation.query)
    queries = every.sample(most)
    rankings = {"model": model_scores(run.prepared, run.model, run.weights, queries)}
    if baselines:
        rankings |= make_baselines(run.prepared, queries)
    measured: Measured = {"protocol": _protocol(run, split, queries, len(every))}
    if run.model is not whole:
        measured["protocol"]["dim"] = run.model.dim
    for suffix, mask_seen in (("", True), ("_unmasked", False)):
        values = {
            name: evaluate(scores, queries, ks, mask_seen=mask_seen)
            for name, scores in rankings.items()
        }
        measured[f"model{suffix}"] = values.pop("model")
        if baselines:
            measured[f"baselines{suffix}"] = values
    measured |= _measure_new(run, queries, ks)
    if popularity_weights:
        measured["popularity_weights"] = frontier(
            rankings["model"], queries, ks, popularity_weights
        )
    if run.config.objective.heads:
        measured["heads"] = make_head_metrics(run.prepared, whole, split, most=most)(run.weights)
    return measured


def _measure_new(run: Run, queries: Queries, ks: Sequence[int]) -> Measured:
    """{"new_items": right answers that training never saw, "new_users": queries of users that it
    never saw}, as far as there are any: the model's metrics over the whole corpus with seen items
    masked, and a random ranking's."""
    measured: Measured = {}
    parts = {
        "new_items": queries.of_new_items(),
        "new_users": queries.of_new_users(run.prepared.train.user),
    }
    for name, part in parts.items():
        part = part.take(np.flatnonzero(part.num_right > 0))
        if len(part):
            rankings = {
                "model": model_scores(run.prepared, run.model, run.weights, part),
                "random": random_scores(part.num_items),
            }
            measured[name] = {
                kind: evaluate(scores, part, ks, mask_seen=True)
                for kind, scores in rankings.items()
            }
    return measured


def frontier(
    scores_of: Scores, queries: Queries, ks: Sequence[int], weights: Sequence[float]
) -> Measured:
    """What each weight of popularity gives, by weight: recall against coverage and novelty."""
    logs, found = log_counts(queries.counts), {}
    for weight in weights:

        def weighed(chosen: slice, weight: float = weight) -> Any:
            scores = scores_of(chosen)
            return scores + weight * pad_rows(logs, scores.shape[1])[None, :]

        found[f"{weight:g}"] = evaluate(weighed, queries, ks, mask_seen=True)
    return found


def measure_index(retriever: Retriever, users: np.ndarray) -> Measured:
    """The index of a bundle against exact search, on the vectors of `users` (rows of its users
    table).

    Returns:
        recall@10, queries per second in one batch, and the median time of a single query in
        milliseconds. These two are of this machine, and of the index alone: without encoding users
        or dropping seen items.
    """
    bundle = retriever.bundle
    queries = retriever.encode_users(
        bundle.users.take(pa.array(evenly_spaced(users, INDEX_QUERIES)))
    )
    truth = ExactIndex(bundle.vectors).search(queries, min(INDEX_K, len(bundle.vectors)))[1]
    if bundle.index.dim > queries.shape[1]:  # popularity is not weighed here
        queries = widened(queries, 0.0)
    found = bundle.index.search(queries, truth.shape[1])[1]
    batch = _seconds(lambda: bundle.index.search(queries, INDEX_K), repeats=5)
    singles = [
        _seconds(lambda q=q: bundle.index.search(q[None], INDEX_K), repeats=1)
        for q in queries[:100]
    ]
    return {
        "kind": bundle.index.kind,
        f"recall@{INDEX_K}": overlap(found, truth),
        "queries_per_second": round(len(queries) / batch, 1),
        "single_query_ms": round(1e3 * float(np.median(singles[len(singles) // 10 :])), 4),
        "queries": len(queries),
        "items": len(bundle.vectors),
        "step": bundle.manifest.get("step"),
    }


def write_metrics(measured: Mapping[str, Any], path: Path) -> None:
    """Writes JSON, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(measured, indent=2) + "\n")


def format_report(measured: Mapping[str, Any], ks: Sequence[int]) -> str:
    """Tables of what `measure_run` and `measure_index` gave, and a line for each comparison."""
    protocol = measured["protocol"]
    each = {"user": "user", "interaction": "held-out interaction"}[protocol["query"]]
    where = f"exact over all {protocol['items']:,} items" + (
        f", vectors cut to {protocol['dim']}" if "dim" in protocol else ""
    )
    lines = [f"Step {protocol['step']} on {protocol['split']}: one query per {each}, {where}."]
    if protocol["asked"] < protocol["available"]:
        lines.append(
            f"A sample: {protocol['asked']:,} of {protocol['available']:,} queries were asked."
        )
    for suffix, title in (("", "Seen items masked"), ("_unmasked", "Nothing masked")):
        model, others = measured[f"model{suffix}"], measured.get(f"baselines{suffix}", {})
        without = model["queries_without_answer"]
        note = f", {without:,} without an answer that is left" if without else ""
        lines += [
            "",
            f"{title} ({model['queries']:,} queries{note}):",
            format_metrics({"model": model, **others}, ks),
        ]
        lines += _comparisons(model, others, min(ks))
    for name, what in (
        ("new_items", "Right answers that training never saw"),
        ("new_users", "Users that training never saw"),
    ):
        if name in measured:
            asked = measured[name]["model"]["queries"]
            lines += [
                "",
                f"{what} ({asked:,} queries, seen items masked):",
                format_metrics(measured[name], ks),
            ]
    if "popularity_weights" in measured:
        columns = {
            f"weight {weight}": values for weight, values in measured["popularity_weights"].items()
        }
        lines += ["", "Popularity weighed, seen items masked:", format_metrics(columns, ks)]
    if measured.get("heads"):
        lines += ["", "Heads, over the rows that have a label:", format_heads(measured["heads"])]
    if "index" in measured:
        lines += ["", _index_line(measured["index"])]
    return "\n".join(lines)


def format_metrics(columns: Mapping[str, Mapping[str, float]], ks: Sequence[int]) -> str:
    """Returns a table with a column for each ranking and a row for each metric.

    Recall and NDCG have a row for every K, the others one for the shortest lists alone; the JSON
    file has all.
    """
    rows = []
    for name in METRICS:
        for k in ks if name in PRINTED_AT_EVERY_K else ks[:1]:
            metric = f"{name}@{k}"
            rows.append([metric, *(f"{values[metric]:.4f}" for values in columns.values())])
    titles = [name.replace("popularity_", "").replace("_", " ") for name in columns]
    return format_table(rows, ["", *titles], align="lr")


def format_heads(heads: Mapping[str, Mapping[str, float]]) -> str:
    """Returns a table with a column for each head and a row for each metric; "-" where a metric is
    not defined."""
    rows = []
    for name in HEAD_METRICS:
        values = [measured.get(name) for measured in heads.values()]
        rows.append([name, *("-" if value is None else f"{value:.4f}" for value in values)])
    rows.append(["rows", *(f"{measured['rows']:,}" for measured in heads.values())])
    return format_table(rows, ["", *heads], align="lr")


def _comparisons(
    model: Mapping[str, float], others: Mapping[str, Mapping[str, float]], k: int
) -> list[str]:
    lines, name = [], f"recall@{k}"
    popularity = others.get("popularity", {}).get(name, 0.0)
    if popularity:
        lines.append(f"{name}: {model[name] / popularity:.2f} times popularity's.")
    best = others.get("true_preferences", {}).get(name, 0.0)
    if best:
        lines.append(
            f"{name}: {model[name] / best:.0%} of what ranking by the true preferences reaches."
        )
    return lines


def _index_line(index: Mapping[str, Any]) -> str:
    return (
        f"Index ({index['kind']}, {index['items']:,} items, step {index['step']}): "
        f"recall@{INDEX_K} {index[f'recall@{INDEX_K}']:.4f} against exact, "
        f"{index['queries_per_second']:,.0f} queries/s in a batch, {index['single_query_ms']:.3f} ms for one."
    )


def _protocol(run: Run, split: str, queries: Queries, available: int) -> Measured:
    return {
        "split": split,
        "query": run.config.evaluation.query,
        "step": run.step,
        "items": queries.num_items,
        "asked": len(queries),
        "available": available,
    }


def _seconds(call: Callable[[], Any], *, repeats: int) -> float:
    """Median wall-clock time."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times))

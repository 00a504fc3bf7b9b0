"""The audits and the health of a run that was measured, wired."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from twotower.core.arrays import evenly_spaced
from twotower.evaluation.audits import health
from twotower.evaluation.audits.base import Audit, audit_table
from twotower.evaluation.audits.data import (
    audit_duplicates,
    audit_leakage,
    audit_never_trained,
    audit_shortcut,
    audit_ties,
    audit_unreachable,
)
from twotower.evaluation.audits.model import (
    audit_collapse,
    audit_hubness,
    audit_norms,
    audit_signal,
)
from twotower.evaluation.evaluate import Evaluation, query_vectors
from twotower.evaluation.queries import EARLIER_PARTS, Queries
from twotower.pipeline.prepare import PreparedData
from twotower.retrieval.embed import embed_rows
from twotower.retrieval.user_items import items_of_users
from twotower.towers.two_tower import TwoTower
from twotower.training.run import Run

AUDIT_USERS = 2_000  # whose vectors are looked at, at most
AUDIT_ITEMS = 10_000  # likewise


def examine(
    run: Run,
    whole_model: TwoTower,
    every_query: Queries,
    queries: Queries,
    measured: Mapping[str, Any],
    evaluation: Evaluation,
) -> dict[str, Any]:
    """Returns the audits and the health of a run: {"audits": {...}, "health": {...}}.

    Args:
        run: The run, whose vectors are cut as a bundle has them.
        whole_model: Pair of towers, whose vectors are not cut.
        every_query: All queries of a split.
        queries: Those that were measured.
        measured: Figures of `twotower.evaluation.measure.measure_run`.
        evaluation: The model's lists, with seen items masked.
    """
    # Names what was measured, which may be training rows: audits ask what came before that part.
    split = measured["protocol"]["split"]
    vectors = sample_vectors(run, queries)
    data = audit_data(run.prepared, every_query, split, measured["answers"])
    model = audit_model(run, queries, measured, evaluation, vectors)
    k = min(evaluation.exposures)
    return {
        "audits": audit_table([*data, *model]),
        "health": {
            # With the whole vectors: the loss saw them, while a bundle may hold a cut of them.
            **health.training_health(run.prepared, whole_model, run.weights),
            **health.vector_health(vectors.by_side, queries.counts[vectors.rows]),
            "hubness": health.hub_histogram(evaluation.exposures[k], k),
        },
    }


def audit_data(
    prepared: PreparedData, queries: Queries, split: str, answers: Mapping[str, Any]
) -> list[Audit]:
    """Returns the audits of the data, in the order in which a reader must know them.

    Args:
        prepared: Prepared data of the run.
        queries: All queries of a split.
        split: Name of the split.
        answers: Result of `twotower.evaluation.measure.measure_answers`.
    """
    config = prepared.config
    earlier = [prepared.positives(part) for part in EARLIER_PARTS[split]]
    # Training rows have none before them: how often users come back, they tell themselves.
    known = earlier or [prepared.positives(split)]
    known_rows = sum(int((rows.item >= 0).sum()) for rows in known)
    lists = queries.seen
    if queries.seen_list is not None or not earlier:
        # The lists of queries overlap: those of the users are told apart.
        lists = items_of_users(known, num_users=len(prepared.users))
    natural = 1 - len(lists.values) / max(known_rows, 1)
    return [
        audit_unreachable(answers),
        audit_leakage(prepared.raw, config),
        audit_never_trained(queries),
        audit_ties(prepared.positives(split), earlier, config.split),
        audit_duplicates(queries, natural),
    ]


def audit_model(
    run: Run,
    queries: Queries,
    measured: Mapping[str, Any],
    evaluation: Evaluation,
    vectors: SampledVectors,
) -> list[Audit]:
    """Returns the audits of the model, likewise.

    Args:
        run: The run that was measured.
        queries: Queries that it was measured by.
        measured: Figures of `twotower.evaluation.measure.measure_run`.
        evaluation: The model's lists, with seen items masked.
        vectors: Vectors of some of the queries' users and of some items.
    """
    prepared = run.prepared
    k = min(evaluation.exposures)
    metric = f"recall@{k}"
    baselines = measured.get("baselines", {})
    recall = measured["model"][metric]
    # Without intervals the figure stands for both of its ends.
    interval = measured["model_intervals"].get(metric, [recall, recall])
    found = [audit_signal(queries, metric, k, interval, baselines)]
    # A log that is too large for the graph leaves it out, and the comparison with it.
    if "item_graph" in baselines:
        train = prepared.positives("train")
        sequences = items_of_users([train], num_users=len(prepared.users))
        graph = baselines["item_graph"][metric]
        found.append(audit_shortcut(queries, sequences, metric, interval, graph))
    found += [
        audit_collapse(vectors.by_side),
        audit_hubness(evaluation.exposures[k], k),
        audit_norms(
            vectors.items, queries.counts[vectors.rows], normalized=run.config.model.normalize
        ),
    ]
    return found


class SampledVectors(NamedTuple):
    """Vectors of some users and items.

    Attributes:
        users: Vectors of queries' users, float32 [Q, D].
        items: Vectors of items, float32 [M, D].
        rows: Rows of these items in the corpus, int [M].
    """

    users: np.ndarray
    items: np.ndarray
    rows: np.ndarray

    @property
    def by_side(self) -> dict[str, np.ndarray]:
        """The vectors by "users" and "items"."""
        return {"users": self.users, "items": self.items}


def sample_vectors(run: Run, queries: Queries) -> SampledVectors:
    """Embeds at most `AUDIT_USERS` users of the queries and `AUDIT_ITEMS` items."""
    # The same items in every evaluation, so that a change is one of the model.
    rows = evenly_spaced(np.arange(queries.num_items), AUDIT_ITEMS)
    features = {name: values[rows] for name, values in run.prepared.features["item"].items()}
    items = embed_rows(run.model, run.weights, "item", features)
    # Users as they ask, with the history that the query gives them, not all users of the log.
    users = query_vectors(run.prepared, run.model, run.weights, queries.sample(AUDIT_USERS))
    return SampledVectors(users, items, rows)

"""How well heads predict labels: pure functions of logits, labels and weights, and their values for
the held-out rows of a run.

All are NaN where they are not defined (no row with label 1, say); what is not defined is not
reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from twotower.core.arrays import evenly_spaced
from twotower.core.errors import ScoreError
from twotower.objectives.heads import head_logits
from twotower.pipeline.batches import Rows
from twotower.pipeline.prepare import PreparedData
from twotower.retrieval.embed import embed_rows

BINS = 15  # of probabilities, as Guo et al. have
BLOCK_ROWS = 2**17  # embedded at once

HeadMetrics = dict[str, dict[str, float]]
# (logits [N], labels [N], weights [N]) -> a number
Metric = Callable[[np.ndarray, np.ndarray, np.ndarray], float]


def auc(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    """The chance that a row with label 1 is above one with label 0, equals counting half: the area
    under the ROC curve.

    sum_{i: y=1} sum_{j: y=0} w_i w_j ([s_i > s_j] + [s_i = s_j] / 2) / (sum_{i: y=1} w_i sum_{j:
    y=0} w_j), exact, by sorting; Hanley and McNeil, Radiology 1982.

    >>> auc(np.array([3.0, 1.0, 1.0]), np.array([1.0, 1.0, 0.0]), np.ones(3))
    0.75
    """
    _, place = np.unique(logits, return_inverse=True)
    ones, zeros = (np.bincount(place, weights * (labels == value)) for value in (1, 0))
    below = np.cumsum(zeros) - zeros
    return _ratio((ones * (below + zeros / 2)).sum(), ones.sum() * zeros.sum())


def log_loss(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    """Mean of -log of the probability that was given to the label, in nats."""
    return _mean(np.logaddexp(0, logits) - labels * logits, weights)


def accuracy(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    """Share of rows whose label has the larger probability; 1 is predicted from one half on."""
    return _mean((logits >= 0) == (labels == 1), weights)


def precision(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    """Share of the rows predicted 1 that are."""
    return _mean(labels == 1, weights * (logits >= 0))


def recall(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    """Share of the rows with label 1 that are predicted so."""
    return _mean(logits >= 0, weights * (labels == 1))


def calibration(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    """Mean probability over the share of label 1; 1 is right on the whole (He et al., Practical
    lessons, ADKDD 2014, inverse)."""
    return _ratio(np.sum(weights * _sigmoid(logits)), np.sum(weights * labels))


def calibration_error(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    """Expected calibration error: rows in `BINS` bins of equal width by probability, sum_b W_b / W
    |mean p - mean y| in bin b.

    Guo et al., On calibration of modern neural networks, ICML 2017.
    """
    probabilities = _sigmoid(logits)
    bins = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    return _ratio(
        np.abs(np.bincount(bins, weights * (probabilities - labels))).sum(), weights.sum()
    )


METRICS: Mapping[str, Metric] = {
    "auc": auc,
    "log_loss": log_loss,
    "accuracy": accuracy,
    "precision": precision,
    "recall": recall,
    "calibration": calibration,
    "calibration_error": calibration_error,
}


def make_head_metrics(
    prepared: PreparedData, model: Any, part: str, *, most: int = 0
) -> Callable[[Any], HeadMetrics]:
    """weights -> {head: {metric: value, "rows": how many}} over the labelled rows of a part whose
    item is in the corpus.

    Args:
        model: a `TwoTower`; the weights' `params["heads"]` are those of `multitask.init_heads`.
        part: "train", "validation" or "test".
        most: use at most this many rows of each head, evenly spaced, always the same; 0 uses all.

    Raises (when called):
        ScoreError: a logit is NaN.
    """
    heads, rows = prepared.config.objective.heads, getattr(prepared, part)
    chosen = {name: _labelled(rows, head.label, most) for name, head in heads.items()}
    asked = np.unique(np.concatenate([*chosen.values(), np.zeros(0, np.int64)]))
    apply = jax.jit(lambda params, users, items: head_logits(heads, params, users, items))

    def measure(weights: Any) -> HeadMetrics:
        logits = _logits(prepared, model, weights, rows.take(asked), apply) if len(asked) else {}
        found = {}
        for name, places in chosen.items():
            if not len(places):
                continue
            own = logits[name][np.searchsorted(asked, places)]
            if np.isnan(own).any():
                raise ScoreError(f"Logits of head {name!r} are NaN; they cannot be measured.")
            found[name] = measure_head(
                own, rows.labels[heads[name].label][places], rows.weight[places]
            )
        return found

    return measure


def measure_head(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """Every metric that is defined, and "rows", how many were measured. Sums are in float64."""
    values = [np.asarray(x, np.float64) for x in (logits, labels, weights)]
    found = {name: metric(*values) for name, metric in METRICS.items()}
    return {name: value for name, value in found.items() if not np.isnan(value)} | {
        "rows": len(logits)
    }


def flat(measured: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """{"click/auc": ...} of what `make_head_metrics` gives, without the numbers of rows."""
    return {
        f"{head}/{name}": x
        for head, values in measured.items()
        for name, x in values.items()
        if name != "rows"
    }


def _labelled(rows: Rows, label: str, most: int) -> np.ndarray:
    """int64, the places of rows that have a label, a weight and an item of the corpus."""
    places = np.flatnonzero(~np.isnan(rows.labels[label]) & (rows.weight > 0) & (rows.item >= 0))
    return evenly_spaced(places, most) if most else places


def _logits(
    prepared: PreparedData, model: Any, weights: Any, rows: Rows, apply: Callable
) -> dict[str, np.ndarray]:
    """Head -> [N], a block of rows at a time."""
    items, place = np.unique(rows.item, return_inverse=True)
    item_vectors = embed_rows(
        model, weights, "item", {n: x[items] for n, x in prepared.features["item"].items()}
    )
    parts = []
    for start in range(0, len(rows), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        context = {name: x[block] for name, x in rows.context.items()}
        users = embed_rows(
            model, weights, "user", prepared.user_features(rows.user[block], context)
        )
        parts.append(
            jax.device_get(apply(weights.params["heads"], users, item_vectors[place[block]]))
        )
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


def _mean(values: np.ndarray, weights: np.ndarray) -> float:
    return _ratio(np.sum(weights * values), weights.sum())


def _ratio(a: float, b: float) -> float:
    return float(a / b) if b > 0 else float("nan")

"""Metrics of heads: how well their logits predict the labels of the held-out rows of a run.

Each metric is a pure function of logits, labels and weights, float [N] each. It is NaN where it is
not defined (where no row has label 1, say); such values are left out of what is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import numpy as np

from twotower.core.arrays import evenly_spaced
from twotower.core.errors import ScoreError
from twotower.objectives.heads import head_logits
from twotower.pipeline.batches import Rows
from twotower.pipeline.prepare import PreparedData
from twotower.retrieval.embed import embed_rows
from twotower.towers.two_tower import TwoTower, Weights

NUM_BINS = 15  # of probabilities, as Guo et al. have
BLOCK_ROWS = 2**17  # rows embedded at once

# Head -> metric -> value.
HeadMetrics = dict[str, dict[str, float]]
# (logits [N], labels [N], weights [N]) -> a number
Metric = Callable[[np.ndarray, np.ndarray, np.ndarray], float]


def auc(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    """Returns the area under the ROC curve, exact, by sorting.

    It is the chance that a row with label 1 lies above one with label 0, equals counting half:
    sum_{i: y=1} sum_{j: y=0} w_i w_j ([s_i > s_j] + [s_i = s_j] / 2) divided by
    sum_{i: y=1} w_i sum_{j: y=0} w_j.

    Hanley and McNeil, The meaning and use of the area under a ROC curve, Radiology 1982.

    >>> auc(np.array([3.0, 1.0, 1.0]), np.array([1.0, 1.0, 0.0]), np.ones(3))
    0.75
    """
    _, rank = np.unique(logits, return_inverse=True)
    positives = np.bincount(rank, weights * (labels == 1))
    negatives = np.bincount(rank, weights * (labels == 0))
    negatives_below = np.cumsum(negatives) - negatives
    ordered_pairs = (positives * (negatives_below + negatives / 2)).sum()
    return _ratio(ordered_pairs, positives.sum() * negatives.sum())


def log_loss(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    """Returns the mean of -log of the probability that was given to the label, in nats."""
    return _mean(np.logaddexp(0, logits) - labels * logits, weights)


def binary_accuracy(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    """Returns the share of rows whose label is the likelier one; at one half that is 1."""
    return _mean((logits >= 0) == (labels == 1), weights)


def binary_precision(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    """Returns the share of the rows predicted to be 1 that are."""
    return _mean(labels == 1, weights * (logits >= 0))


def binary_recall(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    """Returns the share of the rows with label 1 that are predicted to be."""
    return _mean(logits >= 0, weights * (labels == 1))


def calibration(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    """Returns the mean probability over the share of label 1, which is 1 where both agree.

    He et al., Practical lessons from predicting clicks on ads, ADKDD 2014 (who print the inverse).
    """
    return _ratio(np.sum(weights * _sigmoid(logits)), np.sum(weights * labels))


def calibration_error(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    """Returns the expected calibration error over bins of equal width by probability.

    sum_b W_b / W |mean p - mean y| over the `NUM_BINS` bins b.

    Guo et al., On calibration of modern neural networks, ICML 2017.
    """
    probabilities = _sigmoid(logits)
    bins = np.minimum((probabilities * NUM_BINS).astype(int), NUM_BINS - 1)
    errors = np.bincount(bins, weights * (probabilities - labels))
    return _ratio(np.abs(errors).sum(), weights.sum())


HEAD_METRICS: Mapping[str, Metric] = {
    "auc": auc,
    "log_loss": log_loss,
    "accuracy": binary_accuracy,
    "precision": binary_precision,
    "recall": binary_recall,
    "calibration": calibration,
    "calibration_error": calibration_error,
}


def make_head_metrics(
    prepared: PreparedData, model: TwoTower, part: str, *, max_rows: int = 0
) -> Callable[[Weights], HeadMetrics]:
    """Makes the function from weights to the metrics of every head.

    A head is measured on the rows of a part that have its label and a weight, and whose item is in
    the corpus. Its metrics stand beside "rows", the number of these.

    Args:
        prepared: prepared data of a run.
        model: the model; the heads' own weights are `weights.params["heads"]`.
        part: "train", "validation" or "test".
        max_rows: number of rows of each head at most, evenly spaced, always the same; 0 takes all.

    Raises (when called):
        ScoreError: a logit is NaN.
    """
    heads = prepared.config.objective.heads
    rows = getattr(prepared, part)
    measured = {name: _labelled(rows, head.label, max_rows) for name, head in heads.items()}
    # Each row is embedded once, however many heads it has labels for.
    union = np.unique(np.concatenate([*measured.values(), np.zeros(0, np.int64)]))
    apply = jax.jit(lambda params, users, items: head_logits(heads, params, users, items))

    def measure(weights: Weights) -> HeadMetrics:
        if not len(union):
            return {}
        logits = _logits(prepared, model, weights, rows.take(union), apply)
        metrics = {}
        for name, positions in measured.items():
            if not len(positions):
                continue
            own = logits[name][np.searchsorted(union, positions)]
            if np.isnan(own).any():
                raise ScoreError(f"Logits of head {name!r} are NaN; they cannot be measured.")
            labels = rows.labels[heads[name].label][positions]
            metrics[name] = measure_head(own, labels, rows.weight[positions])
        return metrics

    return measure


def measure_head(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """Returns every metric that is defined, summed in float64, and the number of "rows"."""
    values = [np.asarray(x, np.float64) for x in (logits, labels, weights)]
    metrics = {name: metric(*values) for name, metric in HEAD_METRICS.items()}
    defined = {name: value for name, value in metrics.items() if not np.isnan(value)}
    return defined | {"rows": len(logits)}


def flatten_metrics(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Returns the metrics of all heads as {"click/auc": ...}, without the numbers of rows."""
    return {
        f"{head}/{name}": value
        for head, values in metrics.items()
        for name, value in values.items()
        if name != "rows"
    }


def _labelled(rows: Rows, label: str, max_rows: int) -> np.ndarray:
    """Returns the positions, int64, of rows that have a label, a weight and an item."""
    is_labelled = ~np.isnan(rows.labels[label])
    positions = np.flatnonzero(is_labelled & (rows.weight > 0) & (rows.item >= 0))
    return evenly_spaced(positions, max_rows) if max_rows else positions


def _logits(
    prepared: PreparedData, model: TwoTower, weights: Weights, rows: Rows, apply: Callable
) -> dict[str, np.ndarray]:
    """Returns the logits [N] of each head, computed a block of rows at a time."""
    items, item_of_row = np.unique(rows.item, return_inverse=True)
    features = {name: x[items] for name, x in prepared.features["item"].items()}
    item_vectors = embed_rows(model, weights, "item", features)
    blocks = []
    for start in range(0, len(rows), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        context = {name: x[block] for name, x in rows.context.items()}
        user_features = prepared.user_features(rows.user[block], context)
        users = embed_rows(model, weights, "user", user_features)
        logits = apply(weights.params["heads"], users, item_vectors[item_of_row[block]])
        blocks.append(jax.device_get(logits))
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


def _mean(values: np.ndarray, weights: np.ndarray) -> float:
    return _ratio(np.sum(weights * values), weights.sum())


def _ratio(a: float, b: float) -> float:
    return float(a / b) if b > 0 else float("nan")

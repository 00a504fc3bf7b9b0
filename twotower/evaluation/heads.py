"""Metrics of labels: how well the logits of heads, or of a loss on labels, predict held-out rows.

Each metric is a pure function of logits, labels and weights, float [N] each. It is NaN where it is
not defined (without a row of label 1, say); such values are left out of the report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from twotower.config import ObjectiveConfig
from twotower.core.arrays import evenly_spaced
from twotower.core.errors import ScoreError
from twotower.evaluation.intervals import interval_table
from twotower.objectives.heads import head_logits
from twotower.objectives.labels import LABEL, label_logit, learns_label
from twotower.pipeline.batches import InteractionRows
from twotower.pipeline.prepare import PreparedData
from twotower.retrieval.embed import embed_rows
from twotower.towers.two_tower import TwoTower, Weights

NUM_BINS = 15  # bins of probabilities, as Guo et al. have
# Rows whose logits are computed at once: the vectors of a long log need not be held together.
BLOCK_ROWS = 2**17

TowerVectors = np.ndarray | jax.Array
# Head -> metric -> value, or a curve.
HeadMetrics = dict[str, dict[str, Any]]
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
    # Equal logits share a rank: pairs of equals count half.
    _, rank = np.unique(logits, return_inverse=True)
    positives = np.bincount(rank, weights * (labels == 1))
    negatives = np.bincount(rank, weights * (labels == 0))
    negatives_below = np.cumsum(negatives) - negatives
    negatives_behind = negatives_below + negatives / 2
    ordered_pairs = (positives * negatives_behind).sum()
    return _ratio(ordered_pairs, positives.sum() * negatives.sum())


def log_loss(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    """Returns the mean of -log of the probability of the label, in nats."""
    # From the logit, not the probability, whose log is infinite where it rounds to 0.
    return _mean(np.logaddexp(0, logits) - labels * logits, weights)


def binary_accuracy(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    """Returns the share of rows whose label is the likelier one; at probability 1/2 that is 1."""
    return _mean((logits >= 0) == (labels == 1), weights)


def binary_precision(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    """Returns the share of rows with label 1 among those that are predicted to have it."""
    return _mean(labels == 1, weights * (logits >= 0))


def binary_recall(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    """Returns the share of the rows with label 1 that are predicted to have it."""
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
    bins = _bins(probabilities)
    # The sum over a bin of p - y is W_b (mean p - mean y).
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


def calibration_curve(
    logits: np.ndarray, labels: np.ndarray, weights: np.ndarray
) -> list[dict[str, float]]:
    """Returns the mean probability beside the share of label 1, in bins of equal width.

    Returns:
        For each bin with rows, rising: "from" and "to", its ends; "rows"; "predicted", the mean
        probability; "observed", the share of label 1.
    """
    values = [np.asarray(x, np.float64) for x in (logits, labels, weights)]
    probabilities = _sigmoid(values[0])
    bins = _bins(probabilities)
    curve = []
    for number in range(NUM_BINS):
        inside = bins == number
        weight = values[2][inside]
        if not weight.sum():
            continue
        point = {
            "from": number / NUM_BINS,
            "to": (number + 1) / NUM_BINS,
            "rows": int(inside.sum()),
            "predicted": _mean(probabilities[inside], weight),
            "observed": _mean(values[1][inside], weight),
        }
        curve.append(point)
    return curve


def _bins(probabilities: np.ndarray) -> np.ndarray:
    # A probability of 1 belongs to the last bin.
    return np.minimum((probabilities * NUM_BINS).astype(int), NUM_BINS - 1)


def label_tasks(objective: ObjectiveConfig) -> dict[str, str]:
    """Returns the column of the label of each task: of every head, and of a loss on labels."""
    tasks = {name: head.label for name, head in objective.heads.items()}
    if learns_label(objective):
        tasks[LABEL] = objective.label
    return tasks


def make_head_metrics(
    prepared: PreparedData,
    model: TwoTower,
    part: str,
    *,
    max_rows: int = 0,
    in_full: bool = False,
) -> Callable[[Weights], HeadMetrics]:
    """Makes the function from weights to the metrics of every head, and of a loss on labels.

    A head is measured on the rows of a part that have its label and a weight, and whose item is in
    the corpus. "rows", their number, stands beside its metrics. A loss on labels is one more head,
    named "label".

    Args:
        prepared: Prepared data of a run.
        model: The model; the heads' own weights are `weights.params["heads"]`.
        part: "train", "validation" or "test".
        max_rows: Greatest number of rows of each head, evenly spaced and always the same; 0 takes
            all.
        in_full: Whether "intervals" of the metrics stand beside them, and the "calibration_curve"
            of the label.

    Raises (when called):
        ScoreError: a logit is NaN.
    """
    objective = prepared.config.objective
    tasks = label_tasks(objective)
    rows = getattr(prepared, part)
    measured = {name: _labelled(rows, label, max_rows) for name, label in tasks.items()}
    # Each row is embedded once, however many heads it has labels for.
    union = np.unique(np.concatenate([*measured.values(), np.zeros(0, np.int64)]))
    heads = objective.heads
    apply_heads = jax.jit(lambda params, users, items: head_logits(heads, params, users, items))

    def apply(
        params: Mapping[str, Any], users: TowerVectors, items: TowerVectors
    ) -> dict[str, Any]:
        logits: dict[str, Any] = {}
        if heads:
            logits = dict(apply_heads(params["heads"], users, items))
        logit = label_logit(objective, model, params)
        if logit is not None:
            scores = np.einsum("bd,bd->b", np.asarray(users), np.asarray(items))
            logits[LABEL] = logit.scale * scores + logit.offset
        return logits

    def measure(weights: Weights) -> HeadMetrics:
        # A part without labels, or a model without heads, costs nothing.
        if not len(union):
            return {}
        logits = _logits(prepared, model, weights, rows.take(union), apply)
        metrics = {}
        for name, positions in measured.items():
            if not len(positions):
                continue
            # `union` is sorted, and holds every position of every head.
            labelled_logits = logits[name][np.searchsorted(union, positions)]
            # A sort would put NaN above all else and give a figure all the same.
            if np.isnan(labelled_logits).any():
                raise ScoreError(f"Logits of head {name!r} are NaN; they cannot be measured.")
            labels = rows.labels[tasks[name]][positions]
            weight = rows.weight[positions]
            metrics[name] = measure_head(labelled_logits, labels, weight)
            if in_full:
                metrics[name] |= _in_full(
                    labelled_logits, labels, weight, rows.user[positions], name
                )
        return metrics

    return measure


def _in_full(
    logits: np.ndarray, labels: np.ndarray, weights: np.ndarray, users: np.ndarray, name: str
) -> dict[str, Any]:
    """Returns the intervals of the metrics of a task, and the curve of the label's."""
    columns = resampled_columns(logits, labels, weights)
    everyone = np.ones(len(users), bool)
    found: dict[str, Any] = {"intervals": interval_table(columns, users, everyone)}
    if name == LABEL:
        found["calibration_curve"] = calibration_curve(logits, labels, weights)
    return found


def measure_head(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """Returns every metric that is defined, summed in float64, and the number of "rows"."""
    values = [np.asarray(x, np.float64) for x in (logits, labels, weights)]
    metrics: dict[str, Any] = {}
    for name, metric in HEAD_METRICS.items():
        value = metric(*values)
        # NaN marks a metric that is not defined, and JSON has no NaN.
        if not np.isnan(value):
            metrics[name] = value
    return metrics | {"rows": len(logits)}


def resampled_columns(
    logits: np.ndarray, labels: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Returns numbers of the rows whose mean is a metric, and moves as the metric does.

    They are the metric and how far each row moves it, by its derivative: for a ratio R of sums of
    a and b the row adds (a - R b) / sum b; for AUC the share of the other label's rows that are in
    order with it, less AUC.

    DeLong, DeLong and Clarke-Pearson, Comparing the areas under two or more correlated receiver
    operating characteristic curves, Biometrics 1988. The calibration error is a sum of distances,
    which has no derivative where they are 0, and is left out.

    Returns:
        Metric -> float64 [N], of those that are defined.
    """
    z, y, w = (np.asarray(x, np.float64) for x in (logits, labels, weights))
    is_one = (y == 1).astype(float)
    is_likely = (z >= 0).astype(float)
    ratios = {
        "log_loss": (w * (np.logaddexp(0, z) - y * z), w),
        "accuracy": (w * (is_likely == is_one), w),
        "precision": (w * is_likely * is_one, w * is_likely),
        "recall": (w * is_likely * is_one, w * is_one),
        "calibration": (w * _sigmoid(z), w * y),
    }
    columns = {}
    for name, (above, below) in ratios.items():
        if below.sum() > 0:
            ratio = above.sum() / below.sum()
            columns[name] = ratio + len(z) * (above - ratio * below) / below.sum()
    area = auc(z, y, w)
    if not np.isnan(area):
        _, rank = np.unique(z, return_inverse=True)
        positives = np.bincount(rank, w * is_one)
        negatives = np.bincount(rank, w * (y == 0))
        behind = (np.cumsum(negatives) - negatives / 2)[rank] / negatives.sum()
        ahead = 1 - (np.cumsum(positives) - positives / 2)[rank] / positives.sum()
        moved = w * is_one * (behind - area) / positives.sum()
        moved += w * (y == 0) * (ahead - area) / negatives.sum()
        columns["auc"] = area + len(z) * moved
    return columns


def flatten_metrics(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Returns the metrics of all heads as {"click/auc": ...}, without the numbers of rows."""
    flat = {}
    for head, values in metrics.items():
        for name, value in values.items():
            # The number of rows is the same at every step: nothing to plot.
            if name != "rows":
                flat[f"{head}/{name}"] = value
    return flat


def _labelled(rows: InteractionRows, label: str, max_rows: int) -> np.ndarray:
    """Returns the positions, int64, of rows that have a label, a weight and an item."""
    is_labelled = ~np.isnan(rows.labels[label])
    # An item outside of the corpus has no vector.
    positions = np.flatnonzero(is_labelled & (rows.weight > 0) & (rows.item >= 0))
    if max_rows:
        positions = evenly_spaced(positions, max_rows)
    return positions


def _logits(
    prepared: PreparedData,
    model: TwoTower,
    weights: Weights,
    rows: InteractionRows,
    apply: Callable,
) -> dict[str, np.ndarray]:
    """Returns the logits [N] of each head, computed a block of rows at a time."""
    # Each item is embedded once; a user differs from row to row by its context.
    items, item_of_row = np.unique(rows.item, return_inverse=True)
    features = {name: x[items] for name, x in prepared.features["item"].items()}
    item_vectors = embed_rows(model, weights, "item", features)
    blocks = []
    for start in range(0, len(rows), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        context = {name: x[block] for name, x in rows.context.items()}
        user_features = prepared.user_features(rows.user[block], context)
        users = embed_rows(model, weights, "user", user_features)
        logits = apply(weights.params, users, item_vectors[item_of_row[block]])
        blocks.append(jax.device_get(logits))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *blocks)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    # 1 / (1 + exp(-x)) would overflow for a very negative logit.
    return np.exp(-np.logaddexp(0, -x))


def _mean(values: np.ndarray, weights: np.ndarray) -> float:
    return _ratio(np.sum(weights * values), weights.sum())


def _ratio(a: float, b: float) -> float:
    """Returns a / b, or NaN, which marks a metric as not defined."""
    if b > 0:
        return float(a / b)
    return float("nan")

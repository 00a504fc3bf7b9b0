"""Health of a model and of its training: signs that show before the figures fall.

The temperature, what batches offer as negatives, the lengths and the spread of vectors, and the
items that stand in many lists.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from twotower.core.arrays import Ragged
from twotower.evaluation.audits.model import effective_rank
from twotower.pipeline.batches import InteractionRows
from twotower.pipeline.prepare import PreparedData
from twotower.retrieval.user_items import items_of_users
from twotower.towers.two_tower import TwoTower, Weights
from twotower.training.candidates import NegativeSampling, corpus_size
from twotower.training.state import Trainer

BATCHES = 8  # batches that are drawn
# All queries of a batch of 8,192 would be compared with all its items, 67 million pairs.
BATCH_QUERIES = 512  # queries of each that are looked at
DECILES = 10


def training_health(
    prepared: PreparedData, model: TwoTower, weights: Weights
) -> dict[str, float | dict[str, Any]]:
    """Returns the temperature and what batches offer as negatives, by name.

    Args:
        prepared: Prepared data of a run.
        model: Pair of towers, whose vectors are not cut.
        weights: Weights of the run.

    Returns:
        {"temperature": ...}; for a loss with negatives "expected_counts", see `expected_counts`;
        and where rows are the examples, not packed sequences, "batches", see `batch_rates`.
    """
    health: dict[str, float | dict[str, Any]] = {
        "temperature": float(model.temperature(weights.params))
    }
    trainer = Trainer.build(prepared.config, model, corpus_size(prepared))
    # Small data makes smaller batches, and so fewer negatives than were configured.
    sampling = trainer.scaled_to(prepared.num_examples).sampling
    # A loss on labels draws nothing.
    if not sampling.candidates:
        return health
    train = prepared.positives("train")
    counts = np.bincount(train.item, minlength=len(prepared.items))
    health["expected_counts"] = expected_counts(sampling, counts)
    # The batches below are drawn by rows; packed sequences mix their rows by other rules.
    if prepared.packing is not None:
        return health
    seen = items_of_users([train], num_users=len(prepared.users))
    is_masked = prepared.config.objective.mask_same_user
    batches = batch_rates(train, seen, size=sampling.batch_size, masks_same_user=is_masked)
    health["batches"] = batches | {"candidates": sampling.candidates}
    return health


def batch_rates(
    train: InteractionRows,
    seen: Ragged,
    *,
    size: int,
    masks_same_user: bool,
    seed: int = 0,
) -> dict[str, float]:
    """Returns rates of the in-batch candidates of some batches drawn from training rows.

    Args:
        train: Positive training rows.
        seen: Items of each user among these.
        size: Number B of rows of a batch.
        masks_same_user: Whether other positives of a query's user are left out of its negatives.
        seed: Seed of the batches.

    Returns:
        "size"; "duplicate_rate", share of a batch's items that it has already; "masked_rate", share
        of the other rows' items that are no negatives of a query, as they are its own item or of
        its user; and "false_negative_rate", share of its negatives that its user has in training.
    """
    # Not those that training drew: rates of any batches will do, and the same ones each time.
    generator = np.random.default_rng(seed)
    size = min(size, len(train))
    duplicates = []
    masked = []
    false = []
    for _ in range(BATCHES):
        # A pass has each row once.
        rows = generator.choice(len(train), size, replace=False)
        users = train.user[rows]
        items = train.item[rows]
        duplicates.append(1 - len(np.unique(items)) / size)
        query = np.arange(min(size, BATCH_QUERIES))
        is_other = np.arange(size)[None, :] != query[:, None]
        is_masked = items[query, None] == items[None, :]
        if masks_same_user:
            is_masked |= users[query, None] == users[None, :]
        is_negative = is_other & ~is_masked
        # The mask knows the rows of the batch alone: the other items of a user stay as false
        # negatives.
        is_known = _hold(seen.take(users[query]), items)
        masked.append((is_other & is_masked).sum() / max(is_other.sum(), 1))
        false.append((is_negative & is_known).sum() / max(is_negative.sum(), 1))
    return {
        "size": size,
        "duplicate_rate": float(np.mean(duplicates)),
        "masked_rate": float(np.mean(masked)),
        "false_negative_rate": float(np.mean(false)),
    }


def _hold(lists: Ragged, values: np.ndarray) -> np.ndarray:
    """Returns whether each list has each value, bool [R, M].

    Args:
        lists: R lists.
        values: int [M].
    """
    # What the lists hold is looked up among the values: far fewer than all pairs.
    distinct, position = np.unique(values, return_inverse=True)
    column = np.searchsorted(distinct, lists.values)
    column = np.minimum(column, len(distinct) - 1)
    is_asked = distinct[column] == lists.values
    held = np.zeros((len(lists), len(distinct)), bool)
    held[lists.rows[is_asked], column[is_asked]] = True
    return held[:, position]


def expected_counts(sampling: NegativeSampling, counts: np.ndarray) -> dict[str, Any]:
    """Returns how often a step is expected to have an item as a candidate, by popularity.

    Of the sources that all queries share; those of one query alone are not counted.

    Args:
        sampling: Sources of negatives.
        counts: Number of training rows of each item, int [N].

    Returns:
        "least" and "greatest" of all items, and "deciles", the mean of each tenth of the items from
        the least popular on.
    """
    config = sampling.config
    expected = np.zeros(len(counts))
    # The whole catalogue is scored, and nothing is drawn.
    if config.catalogue:
        expected += 1.0
    else:
        draws = sampling.batch_size * config.in_batch + config.queue
        expected += draws * counts / max(counts.sum(), 1)
    expected += config.uniform / len(counts)
    if config.popularity:
        # An item without a row must weigh 0 for any alpha, 0 included, where 0 ** 0 is 1.
        powers = np.where(counts > 0, np.maximum(counts, 1e-300) ** config.alpha, 0.0)
        expected += config.popularity * powers / max(powers.sum(), 1e-300)
    deciles = [float(expected[part].mean()) for part in _popularity_deciles(counts)]
    return {"least": float(expected.min()), "greatest": float(expected.max()), "deciles": deciles}


def vector_health(vectors: Mapping[str, np.ndarray], counts: np.ndarray) -> dict[str, Any]:
    """Returns the spread of vectors, and the lengths of those of items by popularity.

    Args:
        vectors: "users" and "items", float [N, D] each, or a sample of them.
        counts: Number of training rows of each of these items, int [N].

    Returns:
        {"effective_rank": {"users": ..., "items": ..., "dim": ...}, "norms": {"deciles": [...]}},
        in which each tenth of the items, from the least popular on, has its greatest count "rows",
        and the "low", "median" and "high" length: the 10th, 50th and 90th percentile.
    """
    ranks = {name: effective_rank(values) for name, values in vectors.items()}
    dim = vectors["items"].shape[1]
    lengths = np.linalg.norm(vectors["items"], axis=1)
    deciles = []
    for part in _popularity_deciles(counts):
        low, median, high = np.quantile(lengths[part], [0.1, 0.5, 0.9])
        deciles.append(
            {
                "rows": int(counts[part].max()),
                "low": float(low),
                "median": float(median),
                "high": float(high),
            }
        )
    return {"effective_rank": {**ranks, "dim": dim}, "norms": {"deciles": deciles}}


def hub_histogram(exposures: np.ndarray, k: int) -> dict[str, Any]:
    """Returns the number of items by the number of lists that hold them.

    Args:
        exposures: Number of lists that hold each item, int [N].
        k: Length of the lists.

    Returns:
        "k", and "lists" and "items" of equal length: items that stand in at least so many lists,
        and in fewer than the next number says: 0, 1, 2, 4, 8, ...
    """
    # Doubling: most items stand in few lists, and a hub stands in thousands.
    edges = [0, 1]
    while edges[-1] <= exposures.max(initial=0):
        edges.append(2 * edges[-1])
    # The last bin is open: it has all items that stand in more lists than its edge.
    numbers, _ = np.histogram(exposures, [*edges[:-1], np.inf])
    return {"k": k, "lists": edges[:-1], "items": numbers.tolist()}


def _popularity_deciles(counts: np.ndarray) -> list[np.ndarray]:
    """Returns the items from the least popular on in ten parts, fewer where there are fewer."""
    # Stable: equals are many among the least popular, and must fall into the same tenth each time.
    order = np.argsort(counts, kind="stable")
    return np.array_split(order, min(DECILES, len(order)))

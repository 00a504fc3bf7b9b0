"""Recall and NDCG of approximate lists against exact ones, also by popularity of the items."""

from __future__ import annotations

import numpy as np

from twotower.core.arrays import pair_keys

NUM_DECILES = 10


def isin_lists(values: np.ndarray, lists: np.ndarray) -> np.ndarray:
    """Marks the values [Q, K] that stand in the same row of `lists` [Q, M]: bool [Q, K].

    Args:
        values: int [Q, K] below 2^31, of any integer type; -1, for no item, stands nowhere.
        lists: int [Q, M], likewise.
    """
    # Of an unsigned type, as ScaNN's rows are, -1 would be a number that may stand somewhere.
    values = np.asarray(values).astype(np.int32)
    # One `isin` over keys (query, value) in the place of a loop over queries.
    query = np.arange(len(values))[:, None]
    is_listed = np.isin(pair_keys(query, values), pair_keys(query, lists))
    return is_listed & (values >= 0)


def list_recall(rows: np.ndarray, truth: np.ndarray) -> float:
    """Returns the mean share of the exact lists that was found.

    Args:
        rows: int [Q, M], lists that were found.
        truth: int [Q, K], exact lists.
    """
    # Of nothing, nothing is missing: a corpus without items passes any target.
    if not truth.size:
        return 1.0
    return float(isin_lists(truth, rows).mean())


def list_ndcg(rows: np.ndarray, truth: np.ndarray) -> float:
    """Returns the mean NDCG of lists `rows` [Q, K]; all items of `truth` [Q, K] are equally right.

    One of two right items, in the second position: 1 / log2(3) of 1 + 1 / log2(3).

    >>> round(list_ndcg(np.array([[4, 9]]), np.array([[9, 3]])), 4)
    0.3869
    """
    if not truth.size:
        return 1.0
    gains = 1 / np.log2(np.arange(rows.shape[1]) + 2)
    gained = isin_lists(rows, truth) @ gains
    return float(gained.mean() / gains[: truth.shape[1]].sum())


def recall_by_decile(
    rows: np.ndarray, truth: np.ndarray, popularity: np.ndarray
) -> tuple[float | None, ...]:
    """Returns the recall of the true items in each tenth of the corpus, the least popular first.

    Args:
        rows: int [Q, M], lists that were found.
        truth: int [Q, K], exact lists.
        popularity: Popularity of each item, [N].

    Returns:
        One recall a decile; None where no true item is in it.
    """
    # By rank, not by count: the deciles are equally large however the counts are spread. Stable,
    # so that items of one count are in the same deciles each time.
    rank = np.empty(len(popularity), np.int64)
    rank[np.argsort(popularity, kind="stable")] = np.arange(len(popularity))
    decile = rank[truth] * NUM_DECILES // len(popularity)
    is_listed = isin_lists(truth, rows)
    # `minlength`, because the last deciles may hold no true item.
    total = np.bincount(decile.ravel(), minlength=NUM_DECILES)
    hits = np.bincount(decile[is_listed], minlength=NUM_DECILES)
    return tuple(round(float(h / n), 4) if n else None for h, n in zip(hits, total))

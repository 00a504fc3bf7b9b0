"""Intervals of figures, by a bootstrap over users.

A resample counts each user as often as a Poisson variable of mean 1 says: of many users, that is
drawing them with replacement. All figures share the counts.

Chamandy et al., Estimating uncertainty for massive data streams, Google technical report 2012.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

RESAMPLES = 1_000
LEVEL = 0.95  # share of the intervals that hold the mean of all users there might be
_BLOCK = 2**21  # counts that are drawn at once
# Poisson counts of mean 1 by 16 random bits: each is as often in the table as it is probable.
_PROBABILITIES = [math.exp(-1) / math.factorial(count) for count in range(9)]
_ENDS = np.round(2**16 * np.cumsum(_PROBABILITIES)).astype(int)
_COUNTS = np.searchsorted(_ENDS, np.arange(2**16), side="right").astype(np.float32)


def resampled_means(
    values: np.ndarray,
    users: np.ndarray,
    *,
    where: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> np.ndarray:
    """Returns the means of every figure in each resample of the users.

    Args:
        values: float [Q, M], M figures of each query.
        users: int [Q], row of the user of each query; all queries of a user count alike.
        where: bool [Q], queries that are averaged; all by default.
        resamples: Number R of resamples.
        seed: Seed of the counts.

    Returns:
        float64 [R, M]; fewer than R where a resample of very few users counts none of them. Equal
        seeds and users give equal counts, whatever the figures are.
    """
    if where is not None:
        values = values[where]
        users = users[where]
    # Users by the order of their rows, so that the counts are theirs and not the queries'.
    names, owner = np.unique(users, return_inverse=True)
    sums = np.zeros((len(names), values.shape[1] + 1))
    # Sums of a user's queries: one row of numbers for each count.
    np.add.at(sums, owner, np.column_stack([values, np.ones(len(values))]))
    generator = np.random.default_rng(seed)
    totals = np.zeros((resamples, sums.shape[1]))
    size = max(1, _BLOCK // resamples)
    for start in range(0, len(names), size):
        part = sums[start : start + size]
        bits = generator.integers(0, 2**16, (len(part), resamples), dtype=np.uint16)
        totals += _COUNTS[bits].T @ part.astype(np.float32)
    # One that counts nobody has no mean.
    totals = totals[totals[:, -1] > 0]
    return totals[:, :-1] / totals[:, -1:]


def interval(means: np.ndarray, *, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Returns the lower and the upper end of the interval of each figure, float64 [M] each.

    Args:
        means: float [R, M], see `resampled_means`.
        level: Share of the resamples that lie within.
    """
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail], axis=0)
    return low, high


def interval_table(
    values: Mapping[str, np.ndarray], users: np.ndarray, where: np.ndarray, *, seed: int = 0
) -> dict[str, list[float]]:
    """Returns the ends of the interval of the mean of each figure, low and high, by its name.

    Args:
        values: Name -> float [Q].
        users: int [Q], row of the user of each query.
        where: bool [Q], queries that are averaged.
        seed: Seed of the counts.
    """
    if not where.any():
        return {}
    stacked = np.column_stack(list(values.values()))
    low, high = interval(resampled_means(stacked, users, where=where, seed=seed))
    return {name: [float(low[i]), float(high[i])] for i, name in enumerate(values)}

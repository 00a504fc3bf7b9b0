"""Intervals of figures, by a bootstrap over users.

A resample counts each user as often as a Poisson variable of mean 1 says: of many users, that is
drawing them with replacement. All figures share the counts.

Chamandy et al., Estimating uncertainty for massive data streams, Google technical report 2012.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

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
    return _resampled(list(values.T), users, where, resamples, seed)


def _resampled(
    columns: Sequence[np.ndarray],
    users: np.ndarray,
    where: np.ndarray | None,
    resamples: int,
    seed: int,
) -> np.ndarray:
    """Returns the resampled means [R, M] of M columns [Q], which need not lie beside each other."""
    rows = np.arange(len(users)) if where is None else np.flatnonzero(where)
    # Users by the order of their rows, so that the counts are theirs and not the queries'.
    names, owner = np.unique(users[rows], return_inverse=True)
    # The queries of a user beside each other, whose sums are one row of numbers for each count.
    rows = rows[np.argsort(owner, kind="stable")]
    first = np.append(0, np.cumsum(np.bincount(owner, minlength=len(names))))
    generator = np.random.default_rng(seed)
    totals = np.zeros((resamples, len(columns) + 1))
    size = max(1, _BLOCK // resamples)
    for start in range(0, len(names), size):
        end = min(start + size, len(names))
        # By blocks: the columns of a dozen rankings are never copied whole.
        some = rows[first[start] : first[end]]
        part = np.column_stack([*(column[some] for column in columns), np.ones(len(some))])
        part = np.add.reduceat(part, first[start:end] - first[start], axis=0)
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
    intervals, _ = paired_intervals({"": values}, users, where, first="", seed=seed)
    return intervals.get("", {})


# Ranking -> figure -> lower and upper end.
Ends = dict[str, dict[str, list[float]]]


def paired_intervals(
    values: Mapping[str, Mapping[str, np.ndarray]],
    users: np.ndarray,
    where: np.ndarray,
    *,
    first: str,
    seed: int = 0,
) -> tuple[Ends, Ends]:
    """Returns the intervals of several rankings of the same queries, by counts drawn once for all.

    Args:
        values: Ranking -> figure -> float [Q].
        users: int [Q], row of the user of each query.
        where: bool [Q], queries that are averaged.
        first: Ranking that the others are compared with.
        seed: Seed of the counts.

    Returns:
        Intervals of the mean of each figure; and by the name of each other ranking those of the
        difference, `first` less the other, over the same users: what both find hard cancels out.
        Both are empty where no query is averaged.
    """
    if not where.any():
        return {}, {}
    columns = [(ranking, name) for ranking, figures in values.items() for name in figures]
    sampled = _resampled(
        [values[ranking][name] for ranking, name in columns], users, where, RESAMPLES, seed
    )
    position = {column: number for number, column in enumerate(columns)}
    pairs = [
        (ranking, name) for ranking, name in columns if ranking != first and name in values[first]
    ]
    own = [position[first, name] for _, name in pairs]
    others = [position[pair] for pair in pairs]
    return (
        _by_ranking(columns, sampled),
        _by_ranking(pairs, sampled[:, own] - sampled[:, others]),
    )


def _by_ranking(columns: Sequence[tuple[str, str]], sampled: np.ndarray) -> Ends:
    """Returns the ends of the columns [R, M] of resampled means by ranking and figure."""
    table: Ends = {}
    if columns:
        for (ranking, name), low, high in zip(columns, *interval(sampled)):
            table.setdefault(ranking, {})[name] = [float(low), float(high)]
    return table

"""Hard negatives: for each user, the items that the model itself ranks high and that the user is
not known to like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from twotower.core.ragged import Ragged
from twotower.index.exact import ExactIndex
from twotower.objectives.pools import Pools, empty_pools
from twotower.pipeline.prepare import PreparedData
from twotower.retrieval.embed import embed_rows
from twotower.retrieval.user_items import items_of_users, latest_rows

BLOCK = 8_192  # users ranked at once
PAIRS = 2**18  # known positives scored at once

Mine = Callable[[Any], Pools]


def make_mine(prepared: PreparedData, model: Any) -> Mine:
    """weights -> pools, for the training loop. Known are the training rows alone: later ones must
    not tell it anything.

    Users are asked as they stood at their latest training row. A user without a positive has an
    empty pool.
    """
    negatives, train, num_users = (
        prepared.config.objective.negatives,
        prepared.train,
        len(prepared.users),
    )
    known = items_of_users([prepared.positives("train")], num_users=num_users)
    asked = np.flatnonzero(known.lengths)
    latest = latest_rows([train], num_users=num_users)[asked]
    features = prepared.user_features(
        asked, {name: values[latest] for name, values in train.context.items()}
    )
    ranks, margin = negatives.mined_ranks, negatives.mined_margin

    def run(weights: Any) -> Pools:
        users = embed_rows(model, weights, "user", features)
        items = embed_rows(model, weights, "item", prepared.features["item"])
        found = mine(users, items, known.take(asked), ranks=ranks, margin=margin)
        pools = empty_pools(num_users, ranks[1] - ranks[0])
        for name, values in found.items():
            pools[name][asked] = values
        return pools

    return run


def mine(
    users: np.ndarray,
    items: np.ndarray,
    known: Ragged,
    *,
    ranks: tuple[int, ...],
    margin: float = -1.0,
) -> Pools:
    """The items of exact ranks [first, last) of each user.

    Args:
        users: float [Q, D].
        items: float [N, D].
        known: for each user its known positives: they are neither ranked nor returned.
        ranks: (first, last), from 0.
        margin: items that score above the mean of the user's positives less this are left out, as
            likely positives that nobody recorded (the margin of positive-aware mining, Moreira et
            al. 2024, arXiv 2407.15831); negative keeps them.

    Returns:
        Pools of Q users with last - first places, the hardest item first.

    Raises:
        QueryError: a vector is not finite.
    """
    first, last = ranks
    index = ExactIndex(items)
    pools = empty_pools(len(users), last - first)
    for start in range(0, len(users), BLOCK):
        chosen = np.arange(start, min(start + BLOCK, len(users)))
        exclude = known.take(chosen)
        scores, rows = (
            part[:, first:] for part in index.search(users[chosen], last, exclude=exclude)
        )
        keep = rows >= 0
        if margin >= 0:
            keep &= scores <= _mean_positive(users[chosen], items, exclude)[:, None] - margin
        order = np.argsort(~keep, axis=1, kind="stable")  # those kept in front, in their order
        pools["items"][chosen] = np.take_along_axis(np.where(keep, rows, -1), order, axis=1)
        pools["sizes"][chosen] = keep.sum(axis=1)
    return pools


def _mean_positive(users: np.ndarray, items: np.ndarray, known: Ragged) -> np.ndarray:
    """float [Q], the mean score of each user's positives; infinite without any."""
    rows, values = known.rows, known.values
    sums = np.zeros(len(users))
    for start in range(0, len(values), PAIRS):
        row, value = rows[start : start + PAIRS], values[start : start + PAIRS]
        sums += np.bincount(
            row, np.einsum("pd,pd->p", users[row], items[value]), minlength=len(users)
        )
    return np.where(known.lengths > 0, sums / np.maximum(known.lengths, 1), np.inf)

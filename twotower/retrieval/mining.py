"""Hard negatives: items that the model ranks high for a user who is not known to like them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from twotower.core.arrays import Ragged
from twotower.index.exact import ExactIndex
from twotower.objectives.negatives import Pools, empty_pools
from twotower.pipeline.prepare import PreparedData
from twotower.retrieval.embed import embed_rows
from twotower.retrieval.user_items import items_of_users, latest_rows
from twotower.towers.two_tower import TwoTower, Weights

USER_BLOCK = 8_192  # users ranked at once
PAIR_BLOCK = 2**18  # known positives scored at once

Miner = Callable[[Weights], Pools]


def make_miner(prepared: PreparedData, model: TwoTower) -> Miner:
    """Returns a function of the weights that mines pools of hard negatives, for the training loop.

    The items that a user likes are those of its training rows: later rows must not leak into
    training. A user's vector is that of its latest training row. A user without a positive has an
    empty pool.
    """
    negatives = prepared.config.objective.negatives
    train = prepared.train
    num_users = len(prepared.users)
    known = items_of_users([prepared.positives("train")], num_users=num_users)
    # Prepared once: only the weights change between two rounds of mining.
    users = np.flatnonzero(known.lengths)
    latest = latest_rows([train], num_users=num_users)[users]
    context = {name: values[latest] for name, values in train.context.items()}
    features = prepared.user_features(users, context)

    def mine(weights: Weights) -> Pools:
        mined = mine_hard_negatives(
            embed_rows(model, weights, "user", features),
            embed_rows(model, weights, "item", prepared.features["item"]),
            known.take(users),
            ranks=negatives.mined_ranks,
            margin=negatives.mined_margin,
        )
        # A row a user again: training looks pools up by user.
        pools = empty_pools(num_users, mined["items"].shape[1])
        for name, values in mined.items():
            pools[name][users] = values
        return pools

    return mine


def mine_hard_negatives(
    users: np.ndarray,
    items: np.ndarray,
    known: Ragged,
    *,
    ranks: tuple[int, ...],
    margin: float = -1.0,
) -> Pools:
    """Returns the items of exact ranks [first, last) of each user, less its known positives.

    Args:
        users: float [Q, D], user vectors.
        items: float [N, D], item vectors.
        known: Known positives of each user: they are neither ranked nor returned.
        ranks: (first, last), from 0.
        margin: Items that score above the mean of the user's positives less this are left out, as
            likely positives that nobody recorded (the margin of positive-aware mining, Moreira et
            al. 2024, arXiv 2407.15831); negative keeps them.

    Returns:
        Pools of Q users with room for last - first items, the hardest item first.

    Raises:
        QueryError: A vector is not finite.
    """
    first, last = ranks
    index = ExactIndex(items)
    pools = empty_pools(len(users), last - first)
    for start in range(0, len(users), USER_BLOCK):
        block = np.arange(start, min(start + USER_BLOCK, len(users)))
        positives = known.take(block)
        scores, rows = index.search(users[block], last, exclude=positives)
        # The very first ranks hold the items that the user likes most likely, recorded or not.
        scores = scores[:, first:]
        rows = rows[:, first:]
        keep = rows >= 0
        if margin >= 0:
            limits = _mean_positive_scores(users[block], items, positives) - margin
            keep &= scores <= limits[:, None]
        # Those kept move to the front, in their order. Of a small corpus there are few ranks.
        order = np.argsort(~keep, axis=1, kind="stable")
        kept = np.take_along_axis(np.where(keep, rows, -1), order, axis=1)
        pools["items"][block, : kept.shape[1]] = kept
        pools["sizes"][block] = keep.sum(axis=1)
    return pools


def _mean_positive_scores(users: np.ndarray, items: np.ndarray, positives: Ragged) -> np.ndarray:
    """Returns float64 [Q], the mean score of each user's positives; infinite without any."""
    # In blocks of pairs: [pairs, D] of all positives could be larger than the tables.
    all_users = positives.rows
    sums = np.zeros(len(users))
    for start in range(0, len(all_users), PAIR_BLOCK):
        user = all_users[start : start + PAIR_BLOCK]
        item = positives.values[start : start + PAIR_BLOCK]
        scores = np.einsum("pd,pd->p", users[user], items[item])
        sums += np.bincount(user, scores, minlength=len(users))
    # No item lies above an infinite mean: without positives there is nothing to compare with.
    means = sums / np.maximum(positives.lengths, 1)
    return np.where(positives.lengths > 0, means, np.inf)

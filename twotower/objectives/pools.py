"""Pools of hard negatives, one for each user, built on the host: {"items": int32 [U, P], "sizes":
int32 [U]}.

The first "sizes" items of a row are in use, the others are -1. The shape of mined pools never
changes, so that a step is traced once; `twotower.objectives.negatives.draw_pool` draws from mined
and explicit pools.
"""

from __future__ import annotations

import numpy as np

from twotower.core.ragged import pair_keys
from twotower.pipeline.batches import Rows

Pools = dict[str, np.ndarray]

# Greatest number of items in a user's explicit pool.
MAX_EXPLICIT_ITEMS = 64


def empty_pools(users: int, size: int) -> Pools:
    """Makes pools without items, with room for `size` of each user."""
    return {"items": np.full((users, size), -1, np.int32), "sizes": np.zeros(users, np.int32)}


def build_pools(users: np.ndarray, items: np.ndarray, *, num_users: int, size: int) -> Pools:
    """Makes pools of the first `size` distinct items of each user.

    Args:
        users: Users of the pairs, int [M], in any order.
        items: Items of the pairs, int [M], the first choice of a user before the next.
        num_users: U.
        size: P.
    """
    pools = empty_pools(num_users, size)
    # Position of the first occurrence of each pair: the order of choice decides which ones are
    # kept.
    _, first = np.unique(pair_keys(users, items), return_index=True)
    # By user, and within a user in the order of the pairs.
    first = first[np.lexsort((first, users[first]))]
    users = users[first]
    items = items[first]
    column = np.arange(len(users)) - np.searchsorted(users, users)
    kept = column < size
    pools["items"][users[kept], column[kept]] = items[kept]
    pools["sizes"][:] = np.minimum(np.bincount(users, minlength=num_users), size)
    return pools


def explicit_pools(
    rows: Rows, label: np.ndarray, *, num_users: int, size: int = MAX_EXPLICIT_ITEMS
) -> Pools:
    """Makes pools of the items that each user was shown and did not take: those of its latest rows
    whose label is 0.

    An item that the user took in another training row (label 1) is left out.

    Args:
        rows: Training rows.
        label: Label of each row, float32 [N]: 1, 0, or NaN where missing.
        num_users: U.
        size: Greatest number of items of a user; P is less if no user has as many.
    """
    if rows.timestamp is None:
        order = np.arange(len(rows))
    else:
        order = np.argsort(rows.timestamp, kind="stable")
    keys = pair_keys(rows.user, rows.item)
    # An item outside the corpus has -1. NaN labels are neither 0 nor 1.
    refused = (label == 0) & (rows.item >= 0) & ~np.isin(keys, keys[label == 1])
    latest = order[refused[order]][::-1]
    # The user is the upper half of a pair's key; see `pair_keys`.
    users_of_pairs = np.unique(keys[latest]) >> 32
    longest = int(np.bincount(users_of_pairs, minlength=1).max(initial=1))
    size = min(size, max(longest, 1))
    return build_pools(rows.user[latest], rows.item[latest], num_users=num_users, size=size)

"""Pools of hard negatives, one a user, built on the host: {"items": int32 [U, P], "sizes": int32
[U]}.

The first "sizes" places of a row are in use, the others hold -1. The shape of mined pools never
changes, so that a step is traced once; `twotower.objectives.negatives.draw_pool` draws from either
kind.
"""

from __future__ import annotations

import numpy as np

from twotower.core.ragged import pair_keys
from twotower.pipeline.batches import Rows

Pools = dict[str, np.ndarray]

EXPLICIT = 64  # most items kept for a user


def empty_pools(users: int, size: int) -> Pools:
    """Pools of nothing, with places for `size` items."""
    return {"items": np.full((users, size), -1, np.int32), "sizes": np.zeros(users, np.int32)}


def build_pools(users: np.ndarray, items: np.ndarray, *, num_users: int, size: int) -> Pools:
    """The first `size` distinct items of each user, in the order given.

    Args:
        users, items: int [M], the pairs, a user's first choice first.
    """
    pools = empty_pools(num_users, size)
    _, first = np.unique(pair_keys(users, items), return_index=True)
    first = first[np.lexsort((first, users[first]))]  # by user, and in the order given
    users, items = users[first], items[first]
    place = np.arange(len(users)) - np.searchsorted(users, users)
    kept = place < size
    pools["items"][users[kept], place[kept]] = items[kept]
    pools["sizes"][:] = np.minimum(np.bincount(users, minlength=num_users), size)
    return pools


def explicit_pools(rows: Rows, label: np.ndarray, *, num_users: int, size: int = EXPLICIT) -> Pools:
    """What each user was shown and did not take: the items of its latest rows whose label is 0.

    An item that the user took in another training row (label 1) is left out.

    Args:
        rows: of training.
        label: float32 [N] of `rows`: 1, 0, or NaN where missing.
        size: items kept for a user, at most; fewer places are made where no user has as many.
    """
    order = (
        np.arange(len(rows))
        if rows.timestamp is None
        else np.argsort(rows.timestamp, kind="stable")
    )
    keys = pair_keys(rows.user, rows.item)
    refused = (label == 0) & (rows.item >= 0) & ~np.isin(keys, keys[label == 1])
    latest = order[refused[order]][::-1]
    users, items = rows.user[latest], rows.item[latest]
    distinct = np.unique(keys[latest]) >> 32
    most = int(np.bincount(distinct, minlength=1).max(initial=1))
    return build_pools(users, items, num_users=num_users, size=min(size, max(most, 1)))

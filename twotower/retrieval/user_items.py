"""The interactions of each user in order of time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from twotower.core.arrays import Ragged, pair_keys, stable_argsort
from twotower.pipeline.batches import InteractionRows

# Rows that are looked through at once.
_BLOCK = 2**22


def items_of_users(
    parts: Sequence[InteractionRows], *, num_users: int, asked: np.ndarray | None = None
) -> Ragged:
    """Returns the distinct items of each user in all `parts`, the latest last.

    Args:
        parts: Rows of the log.
        num_users: Number U of lists.
        asked: Users whose lists are wanted, int [Q]; those of others are empty, and take no memory.
            None wants all.
    """
    if asked is not None:
        is_asked = np.zeros(num_users, bool)
        is_asked[asked] = True
        parts = [_rows_of(part, is_asked) for part in parts]
    user = _joined([part.user for part in parts])
    item = _joined([part.item for part in parts])
    times = _joined_times(parts)
    # Most logs are in order already, and no copy of them is made.
    if times is not None and not (times[:-1] <= times[1:]).all():
        order = stable_argsort(times)
        user = user[order]
        item = item[order]
    # -1 stands for an item that is not in the corpus.
    if item.size and item.min() < 0:
        is_known = item >= 0
        user = user[is_known]
        item = item[is_known]
    lists = Ragged.from_pairs(user, item, num_rows=num_users)
    return lists.distinct(keep="last")


def _rows_of(rows: InteractionRows, is_asked: np.ndarray) -> InteractionRows:
    """Returns users, items and times of the rows of some users.

    Args:
        rows: Rows of the log, which may be mapped.
        is_asked: Mask bool [U] of the users.
    """
    found = [np.zeros(0, np.int64)]
    for start in range(0, len(rows), _BLOCK):
        found.append(start + np.flatnonzero(is_asked[rows.user[start : start + _BLOCK]]))
    index = np.concatenate(found)
    times = None
    if rows.timestamp is not None:
        times = rows.timestamp[index]
    return InteractionRows(rows.user[index], rows.item[index], rows.weight[index], times, {})


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Returns arrays one after the other; a single one as it is, which may be mapped."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def rows_of_items(parts: Sequence[InteractionRows], items: Ragged) -> np.ndarray:
    """Returns the latest row of each user with each item, among the joined parts, int64 [pairs].

    Args:
        parts: Rows that the lists were made of.
        items: Distinct items of each user, as `items_of_users` returns them.
    """
    user = np.concatenate([part.user for part in parts])
    item = np.concatenate([part.item for part in parts])
    latest_first = time_order(parts)[::-1]
    # `unique` gives the first position of each pair, which is its latest row.
    keys, first = np.unique(pair_keys(user, item)[latest_first], return_index=True)
    position = np.searchsorted(keys, pair_keys(items.rows, items.values))
    return latest_first[first[position]]


def latest_rows(parts: Sequence[InteractionRows], *, num_users: int) -> np.ndarray:
    """Returns the position of each user's latest row among the joined parts, int64 [num_users].

    It is -1 of a user without rows.
    """
    order = time_order(parts)
    user = np.concatenate([part.user for part in parts])
    latest = np.full(num_users, -1, np.int64)
    latest[user[order]] = order  # of a user's rows the last is written last
    return latest


def time_order(parts: Sequence[InteractionRows]) -> np.ndarray:
    """Returns the positions of the joined rows in order of time, int64 [rows of all parts].

    Rows of one time keep the order of the log, and so do all rows where a part with rows has no
    timestamps.
    """
    times = _joined_times(parts)
    if times is None:
        return np.arange(sum(len(part) for part in parts))
    # Stable: up to a quarter of MovieLens' last items share their time with the one before.
    return stable_argsort(times)


def _joined_times(parts: Sequence[InteractionRows]) -> np.ndarray | None:
    """Returns the times of the joined rows; None where a part with rows has none."""
    # A part without rows has no times either, and says nothing of the others.
    times = [part.timestamp for part in parts if len(part)]
    known = [part for part in times if part is not None]
    if not known or len(known) < len(times):
        return None
    return _joined(known)

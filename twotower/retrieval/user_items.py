"""The interactions of each user in order of time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from twotower.core.ragged import Ragged
from twotower.pipeline.batches import Rows


def items_of_users(parts: Sequence[Rows], *, num_users: int) -> Ragged:
    """Returns the distinct items of each user in all `parts`, the latest last."""
    user = np.concatenate([part.user for part in parts])
    item = np.concatenate([part.item for part in parts])
    order = time_order(parts)
    order = order[item[order] >= 0]
    lists = Ragged.from_pairs(user[order], item[order], num_rows=num_users)
    return lists.distinct(keep="last")


def latest_rows(parts: Sequence[Rows], *, num_users: int) -> np.ndarray:
    """Returns int64 [num_users], the position of each user's latest row among the joined `parts`;
    -1 without any."""
    order = time_order(parts)
    user = np.concatenate([part.user for part in parts])
    latest = np.full(num_users, -1, np.int64)
    latest[user[order]] = order  # of a user's rows the last is written last
    return latest


def time_order(parts: Sequence[Rows]) -> np.ndarray:
    """Returns int64 [rows of all parts], their positions in order of time; rows of one time, and
    all rows where a part has no timestamps, keep the order of the log."""
    times = [part.timestamp for part in parts if part.timestamp is not None]
    if len(times) < len(parts):
        return np.arange(sum(len(part) for part in parts))
    return np.argsort(np.concatenate(times), kind="stable")

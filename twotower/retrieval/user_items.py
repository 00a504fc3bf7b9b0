"""What users did, the latest last."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from twotower.core.ragged import Ragged
from twotower.pipeline.batches import Rows


def items_of_users(parts: Sequence[Rows], *, num_users: int) -> Ragged:
    """The distinct items of each user in all `parts`, the latest last."""
    user, item = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("user", "item")
    )
    order = time_order(parts)
    order = order[item[order] >= 0]
    return Ragged.from_pairs(user[order], item[order], num_rows=num_users).distinct(keep="last")


def latest_rows(parts: Sequence[Rows], *, num_users: int) -> np.ndarray:
    """int64 [num_users], the place of each user's latest row among the joined `parts`; -1 without
    any."""
    order = time_order(parts)
    latest = np.full(num_users, -1, np.int64)
    latest[np.concatenate([part.user for part in parts])[order]] = (
        order  # of a user's rows the last is written last
    )
    return latest


def time_order(parts: Sequence[Rows]) -> np.ndarray:
    """int64 [rows of all parts], places in order of time; of equals, and without timestamps, as
    they stand."""
    if any(part.timestamp is None for part in parts):
        return np.arange(sum(len(part) for part in parts))
    return np.argsort(np.concatenate([part.timestamp for part in parts]), kind="stable")

"""Why an item is recommended: the score that it loses when an event of the history is left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pyarrow as pa

from twotower.features.base import join_lists
from twotower.features.history import HistoryFeature

# Raw rows of users -> encoded features, [B, ...] each; `UserRows.encode` is one.
EncodeUsers = Callable[[pa.Table], Mapping[str, np.ndarray]]
# Encoded features of users -> their vectors, float32 [B, D].
EmbedUsers = Callable[[Mapping[str, np.ndarray]], np.ndarray]


def explain(
    history: HistoryFeature | None,
    encode: EncodeUsers,
    embed: EmbedUsers,
    row: pa.Table,
    items: np.ndarray,
) -> np.ndarray:
    """Returns what each event of a user's history adds to the scores of items.

    The user is embedded once whole and once without each event, in one batch; all else that is
    known of the user stays. Differences do not add up to the score: events also act together.

    Args:
        history: History that the user tower reads; None where it reads none.
        encode: Encoder of raw rows.
        embed: The user tower.
        row: Raw row of the user, as `UserRows.take` returns it, the latest event last.
        items: Vectors of the items, float32 [K, D].

    Returns:
        float32 [E, K], the score of each item less its score without the event: above 0 where the
        event speaks for the item. The events are the last E that the tower reads, in their order; E
        is 0 where there are none.
    """
    nothing = np.zeros((0, len(items)), np.float32)
    if history is None or history.column not in row.column_names:
        return nothing
    events = join_lists(row[history.column]).flatten()
    # What is older than the tower reads counts for nothing.
    events = events.slice(max(0, len(events) - history.max_length))
    count = len(events)
    if not count:
        return nothing
    # The whole history, and then each one without one event.
    kept = np.ones((count + 1, count), bool)
    kept[np.arange(1, count + 1), np.arange(count)] = False
    offsets = np.append(0, np.cumsum(kept.sum(1))).astype(np.int32)
    taken = events.take(pa.array(np.nonzero(kept)[1]))
    rows = row.take(pa.array(np.zeros(count + 1, np.int64)))
    lists = pa.ListArray.from_arrays(pa.array(offsets), taken)
    rows = rows.set_column(rows.column_names.index(history.column), history.column, lists)
    scores = embed(encode(rows)) @ items.T
    return scores[:1] - scores[1:]

"""Why an item is recommended: the score that it loses when an event of the history is left out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from twotower.core.arrays import pad_rows
from twotower.features.base import join_lists

if TYPE_CHECKING:  # a bundle loads the kinds of features that it has
    from twotower.features.history import HistoryFeature
    from twotower.retrieval.requests import RequestRows
    from twotower.retrieval.retriever import Retriever

# Raw rows of users -> encoded features, [B, ...] each; `UserRows.encode` is one.
EncodeUsers = Callable[[pa.Table], Mapping[str, np.ndarray]]
# Encoded features of users -> their vectors, float32 [B, D].
EmbedUsers = Callable[[Mapping[str, np.ndarray]], np.ndarray]


class Reason(NamedTuple):
    """The event of a history without which an item would lose most of its score.

    Attributes:
        item_id: Id of the item of the event.
        lost: Score of the item less its score without the event, above 0.
        event: Kind of the event; None where it is not known.
        timestamp: Time of the event in seconds since 1970; None where it is not known.
    """

    item_id: str
    lost: float
    event: str | None = None
    timestamp: int | None = None


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
    events = _events_read(history, row)
    count = len(events)
    if history is None or not count:
        return np.zeros((0, len(items)), np.float32)
    # The whole history, and then each one without one event.
    kept = np.ones((count + 1, count), bool)
    kept[np.arange(1, count + 1), np.arange(count)] = False
    offsets = np.append(0, np.cumsum(kept.sum(1))).astype(np.int32)
    # Row by row, as `np.nonzero` gives them: the histories lie one after the other.
    taken = events.take(pa.array(np.nonzero(kept)[1]))
    # All else of the user stays as it is.
    rows = row.take(pa.array(np.zeros(count + 1, np.int64)))
    lists = pa.ListArray.from_arrays(pa.array(offsets), taken)
    rows = rows.set_column(rows.column_names.index(history.column), history.column, lists)
    scores = embed(encode(rows)) @ items.T
    return scores[:1] - scores[1:]


def find_reasons(
    history: HistoryFeature | None,
    encode: EncodeUsers,
    embed: EmbedUsers,
    row: pa.Table,
    items: np.ndarray,
) -> list[Reason | None]:
    """Returns the reason of each of K items; None where no event speaks for it.

    Args:
        history: As in `explain`.
        encode: As in `explain`.
        embed: The user tower. It is called with one number of rows for all users, those behind the
            user's own being zeros, so that it is compiled once.
        row: As in `explain`.
        items: Vectors of the items, float32 [K, D].
    """
    if history is None:
        return [None] * len(items)
    size = history.max_length + 1

    def embed_padded(features: Mapping[str, np.ndarray]) -> np.ndarray:
        # Histories have any length; each would be compiled anew, which takes seconds.
        padded = {name: pad_rows(values, size) for name, values in features.items()}
        count = len(next(iter(features.values())))
        return embed(padded)[:count]

    lost = explain(history, encode, embed_padded, row, items)
    events: list[Mapping[str, Any]] = []
    # Histories hold ids alone where nothing else of an event is read.
    for event in _events_read(history, row).to_pylist():
        events.append(event if isinstance(event, dict) else {"item_id": event})
    return choose_reasons(events, lost)


def explain_user(
    retriever: Retriever,
    shown: Sequence[str],
    user: Any = None,
    *,
    rows: RequestRows | None = None,
    events: Sequence[Any] | None = None,
) -> list[Reason | None]:
    """Returns the reasons of items of a list that a retriever recommends to a user.

    Args:
        retriever: Retriever that made the list.
        shown: Ids of the items; one that is not there any more has no reason.
        user: Argument of `Retriever.recommend`, as are the others.
        rows: Argument of `Retriever.recommend`.
        events: Argument of `Retriever.recommend`.
    """
    return find_reasons(
        retriever.bundle.encoder.spec.history,
        retriever.user_rows.encode,
        functools.partial(retriever.bundle.towers.embed, "user"),
        retriever.read_user(user, rows=rows, events=events),
        retriever.vectors_now(shown),
    )


def explain_likeness(
    retriever: Retriever, shown: Sequence[str], items: Sequence[Any], unlike: Sequence[Any] = ()
) -> list[Reason | None]:
    """Returns the reasons of items of a list that are like examples: the example of each.

    Args:
        retriever: Retriever that made the list by `items_like`.
        shown: Ids of the items; one that is not there any more has no reason.
        items: Examples.
        unlike: Examples to stay away from.
    """
    away = np.zeros(retriever.bundle.towers.dim, np.float32)
    if unlike:
        away = _at_length_one(retriever.vectors_now(unlike)).mean(axis=0)
    lost = likeness_lost(retriever.vectors_now(items), away, retriever.vectors_now(shown))
    return choose_reasons([{"item_id": str(example)} for example in items], lost)


def choose_reasons(events: Sequence[Mapping[str, Any]], lost: np.ndarray) -> list[Reason | None]:
    """Returns the event that adds most to the score of each item, None where none adds anything.

    >>> choose_reasons([{"item_id": "a"}, {"item_id": "b"}], np.array([[0.5, -1.0], [0.25, -2.0]]))
    [Reason(item_id='a', lost=0.5, event=None, timestamp=None), None]

    Args:
        events: E events: mappings with an item_id, and an event and a timestamp where they are
            known.
        lost: Array that `explain` returns, [E, K].
    """
    reasons: list[Reason | None] = [None] * lost.shape[1]
    if not len(lost):
        return reasons
    for column, row in enumerate(lost.argmax(axis=0).tolist()):
        event = events[row]
        # An event that speaks against an item is no reason for it.
        if lost[row, column] <= 0 or event["item_id"] is None:
            continue
        reasons[column] = Reason(
            event["item_id"],
            float(lost[row, column]),
            event.get("event"),
            event.get("timestamp"),
        )
    return reasons


def likeness_lost(liked: np.ndarray, unlike: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Returns what each example adds to the cosines of items to the mean of all examples.

    Args:
        liked: Vectors of L examples, float32 [L, D].
        unlike: Mean direction of the examples to stay away from, float32 [D]; zeros without any.
        items: Vectors of the items, float32 [K, D].

    Returns:
        float32 [L, K]: the cosine of each item, less that without the example; of a single example
        the whole cosine.
    """
    units = _at_length_one(liked)
    others = units.sum(axis=0) - units
    without = _at_length_one(others / max(1, len(liked) - 1) - unlike)
    if len(liked) == 1:
        # Without its only example a list has no direction at all.
        without = np.zeros_like(units)
    whole = _at_length_one((units.mean(axis=0) - unlike)[None, :])
    return (whole - without) @ _at_length_one(items).T


def _at_length_one(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(lengths, 1e-30)


def _events_read(history: HistoryFeature | None, row: pa.Table) -> pa.Array:
    """Returns the events of a user that the tower reads, the latest last."""
    if history is None or history.column not in row.column_names:
        return pa.nulls(0)
    events = join_lists(row[history.column]).flatten()
    # What is older than the tower reads counts for nothing.
    return events.slice(max(0, len(events) - history.max_length))

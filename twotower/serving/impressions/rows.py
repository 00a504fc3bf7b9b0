"""Impressions with what came of them: labels of what was shown, and rows that a model learns from.

An event that names a recommendation belongs to that. Another one belongs to the last time before it
at which its user was shown its item, if that was not too long ago.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from twotower.core.arrow import pc
from twotower.core.errors import ConfigError, did_you_mean

WINDOW_SECONDS = 86_400.0
EVENTS = pa.schema(
    {
        "user_id": pa.string(),
        "item_id": pa.string(),
        "event": pa.string(),
        "timestamp": pa.int64(),  # seconds since 1970
        "recommendation_id": pa.string(),
    }
)


def read_events(path: Path | str) -> pa.Table:
    """Returns the events that a server was sent, in the order in which they came.

    Raises:
        ConfigError: The file holds none.
    """
    if not Path(path).is_file():
        raise ConfigError(
            f"--events={path} is no file. Name the one that the server keeps its events in: "
            "beside the bundle, NAME.events."
        )
    # Read alone: the server may be writing to it, and an empty file must not be made of a wrong
    # name.
    connection = sqlite3.connect(f"file:{Path(path).absolute()}?mode=ro", uri=True)
    try:
        rows = connection.execute(
            f"SELECT {', '.join(EVENTS.names)} FROM events ORDER BY n"
        ).fetchall()
    except sqlite3.Error as error:
        raise ConfigError(f"--events={path} holds no events of a server: {error}.") from None
    finally:
        connection.close()
    # Without rows there are no columns to turn round.
    columns = list(zip(*rows)) or [()] * len(EVENTS.names)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, EVENTS)]
    return pa.Table.from_arrays(arrays, schema=EVENTS)


def join_events(
    impressions: pa.Table,
    events: pa.Table,
    *,
    kinds: Sequence[str] = (),
    seconds: float = WINDOW_SECONDS,
) -> pa.Table:
    """Returns the impressions with the column label: 1 where an event came of one, else 0.

    Args:
        impressions: Table of `read_impressions`.
        events: Table of `read_events`.
        kinds: Kinds of events that count; () for all.
        seconds: Time after an impression in which an event without a recommendation belongs to it.

    Raises:
        ConfigError: No event is of one of the kinds.
    """
    # Refused: a misspelt kind would give labels of 0 alone, and a model that learns nothing.
    for kind in kinds:
        known = pc.unique(events["event"]).drop_null().to_pylist()
        if kind not in known:
            raise ConfigError(
                f"--kinds: no event is {kind!r}{did_you_mean(kind, known)} There are: "
                f"{', '.join(known) or 'none with a kind'}."
            )
    if kinds:
        events = events.filter(pc.is_in(events["event"], value_set=pa.array(kinds)))
    labels = np.zeros(len(impressions), np.int8)
    is_named = pc.is_valid(events["recommendation_id"])
    # By its item too: of a list that was answered all items have one id.
    labels[_rows_of_named(impressions, events.filter(is_named))] = 1
    labels[_rows_before(impressions, events.filter(pc.invert(is_named)), seconds)] = 1
    return impressions.append_column("label", pa.array(labels))


def training_rows(labelled: pa.Table, *, all_lists: bool = False) -> pa.Table:
    """Returns rows that `tt.fit` reads with `objective.label`: what came of what was shown.

    Items that were shown and left are the explicit negatives. Of an item that a user was shown in
    several lists each is a row.

    Args:
        labelled: Table of `join_events`.
        all_lists: Whether lists of which nothing came count: nobody may have looked at them.

    Returns:
        Columns user_id, item_id, timestamp (seconds), label, position and propensity, of known
        users, in the order of time.
    """
    # Nobody's clicks teach nothing of a user.
    is_kept = pc.is_valid(labelled["user_id"])
    if not all_lists:
        lists = labelled["recommendation_id"].filter(pc.equal(labelled["label"], 1))
        is_seen = pc.is_in(labelled["recommendation_id"], value_set=pc.unique(lists))
        is_kept = pc.and_(is_kept, is_seen)
    kept = labelled.filter(is_kept).sort_by("time")
    micros = kept["time"].cast(pa.int64())
    columns = {name: kept[name] for name in ("user_id", "item_id")}
    # Whole seconds, as events have them: the log that is learned from has one unit.
    columns["timestamp"] = pc.divide(micros, 1_000_000)
    columns |= {name: kept[name] for name in ("label", "position", "propensity")}
    return pa.table(columns)


def _rows_of_named(impressions: pa.Table, events: pa.Table) -> np.ndarray:
    """Returns the rows of the impressions that events name, int64."""
    shown, named = _codes(impressions, events, ["recommendation_id", "item_id"])
    return np.flatnonzero(np.isin(shown, named))


def _rows_before(impressions: pa.Table, events: pa.Table, seconds: float) -> np.ndarray:
    """Returns the row of the last impression of each event's user and item, int64.

    Events without one in the time before them have none.
    """
    shown, came = _codes(impressions, events, ["user_id", "item_id"])
    codes = np.concatenate([shown, came])
    times = np.concatenate(
        [
            impressions["time"].cast(pa.int64()).to_numpy() / 1e6,
            # Events have whole seconds: one may seem to come before what it followed.
            events["timestamp"].to_numpy() + 1.0,
        ]
    )
    is_event = np.arange(len(codes)) >= len(shown)
    # Stable: an impression comes before an event of the same time.
    order = np.lexsort((times, codes))
    # The last impression at or before each position of the order.
    positions = np.where(is_event[order], -1, np.arange(len(order)))
    last = np.maximum.accumulate(positions) if len(order) else positions
    of_events = np.flatnonzero(is_event[order] & (last >= 0))
    # Of any pair: whether it is the pair of the event is asked below.
    rows = order[last[of_events]]
    found = order[of_events]
    is_near = times[found] - times[rows] <= seconds + 1
    return rows[(codes[rows] == codes[found]) & (codes[found] >= 0) & is_near]


def _codes(one: pa.Table, other: pa.Table, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns one number for each pair of values of two tables, int64; -1 where one is missing."""
    codes = np.zeros(len(one) + len(other), np.int64)
    is_missing = np.zeros(len(codes), bool)
    for name in names:
        values = pa.concat_arrays(
            [one[name].combine_chunks().cast(pa.string()), other[name].combine_chunks()]
        )
        encoded = values.dictionary_encode()
        is_missing |= np.asarray(values.is_null())
        indices = pc.fill_null(encoded.indices, 0).to_numpy(zero_copy_only=False)
        # A pair as one number, as the digits of a number stand for its parts: sorting and searching
        # then know one column.
        codes = codes * max(1, len(encoded.dictionary)) + indices
    codes[is_missing] = -1
    return codes[: len(one)], codes[len(one) :]

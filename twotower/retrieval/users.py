"""Raw rows of users, known or sent with a request, in the form that the user tower reads."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from twotower.core.arrow import pc
from twotower.features.encoder import Encoder
from twotower.retrieval.live.segments import ReadValues, values_reader
from twotower.retrieval.requests import (
    OUR_NAMES,
    PLAIN,
    Forms,
    HistoryColumn,
    IdColumn,
    Naming,
    PlainValue,
    ReadColumn,
    Row,
    TimeColumn,
    feature_readers,
    read_row,
    read_rows,
    row_table,
)

USER_BLOCK = 65_536  # users encoded at once


class UserRows:
    """The known users of a bundle.

    Attributes:
        row_by_id: Row of each user id in the table of users.
        forms: Forms of ids and times in requests.
    """

    def __init__(self, encoder: Encoder, users: pa.Table, forms: Forms = PLAIN):
        """Keeps the users.

        Args:
            encoder: Encoder of the features.
            users: Columns user_id and the raw columns of the user features.
            forms: Forms of ids and times in requests.
        """
        self.forms = forms
        self._encoder = encoder
        self._users = users
        ids = users["user_id"].to_pylist()
        self.row_by_id: dict[str, int] = {user: row for row, user in enumerate(ids)}

    @functools.cached_property
    def columns(self) -> list[str]:
        """Names of the raw columns that rows may have: those of the user features, and the id."""
        own: list[str] = []
        for feature in self._encoder.spec.user.values():
            own += feature.columns_read
        # A request may always say who and when, even where no feature reads it.
        return list(dict.fromkeys(["user_id", *own, "timestamp"]))

    @property
    def reads_history(self) -> bool:
        """Whether the model reads the events of a user."""
        return self._encoder.spec.history is not None

    def read(self, rows: Any, naming: Naming = OUR_NAMES) -> pa.Table:
        """Returns the rows of a request in the form in which the table of users has its own.

        Args:
            rows: Table, frame, mapping or list of mappings, see `twotower.retrieval.requests`.
            naming: Names of their columns.

        Raises:
            ConfigError: They are no rows, a name is unknown, or a value is not what its column
                holds.
        """
        return read_rows(rows, self.columns, naming, self._readers_of(naming), key="user_id")

    def read_one(self, rows: Any, naming: Naming = OUR_NAMES) -> Row | None:
        """Returns the columns of a single row as `encode_one` takes them; see `read_row`."""
        return read_row(rows, self.columns, naming, self._readers_of(naming))

    def beside_stored(self, user: str, row: Row, brought: Collection[str]) -> Row:
        """Returns the columns of a row of a request, and those that are stored of its user beside.

        Args:
            user: Id of a known user.
            row: Columns that the request brings, as `read_one` gives them.
            brought: Names of the columns that the request brings, also of those that it says are
                missing.
        """
        number = self.row_by_id[user]
        columns: dict[str, PlainValue | pa.ChunkedArray] = {}
        for name, read in self._stored_readers.items():
            if name in brought:
                continue
            # Of a text as it is; all else goes the way of tables.
            value = None if read is None else read([number])[0]
            is_plain = getattr(self._all_readers.get(name), "is_plain", None)
            if value is not None and is_plain is not None and is_plain(value):
                columns[name] = value
            else:
                columns[name] = self._users[name].slice(number, 1)
        return {**columns, **row, "user_id": user}

    def encode_one(self, row: Row) -> dict[str, np.ndarray]:
        """Returns the encoded features of one row, [1, ...] each, as `encode` does.

        Args:
            row: Columns of the row; missing ones are left out.
        """
        arrays: dict[str, np.ndarray] = {}
        for feature in self._encoder.spec.user.values():
            columns = [name for name in self._columns_of[feature.name] if name in row]
            encoded = None
            if not columns:
                # The same for every request, and so encoded once.
                encoded = self._missing[feature.name]
            # Straight from the value: a table of one row costs more than all else of an answer.
            elif len(columns) == 1 and not isinstance(row[columns[0]], pa.ChunkedArray):
                fitted = self._encoder.fitted[feature.key]
                encoded = feature.encode_value(fitted, row[columns[0]])
            if encoded is None:
                rows = self._fill_times(row_table({name: row[name] for name in columns}))
                encoded = self._encoder.encode("user", rows, [feature.name])
            arrays |= encoded
        return arrays

    def encode(self, rows: pa.Table) -> dict[str, np.ndarray]:
        """Returns the encoded features of raw rows.

        A missing column is a missing value in every row; a missing time is the newest of the log.
        """
        return self._encoder.encode("user", self._fill_times(rows))

    def encode_all(self) -> Iterator[dict[str, np.ndarray]]:
        """Yields the encoded features of all known users, in blocks.

        One block at a time: padded histories of all users could be larger than their vectors.
        """
        for start in range(0, len(self._users), USER_BLOCK):
            yield self.encode(self.slice(start, start + USER_BLOCK))

    def slice(self, start: int, stop: int) -> pa.Table:
        """Returns the raw features of the known users [start, stop), as `take` does."""
        return self._without_times(self._users.slice(start, stop - start))

    def take(self, ids: Sequence[str]) -> pa.Table:
        """Returns the raw features of users by id; of those not known the id alone."""
        # A null row, of an unknown user, makes every column null.
        rows = pa.array([self.row_by_id.get(user) for user in ids], pa.int64())
        columns = {name: self._users[name].take(rows) for name in self._users.column_names}
        columns["user_id"] = pa.array(ids, pa.string())
        return self._without_times(pa.table(columns))

    def with_events(
        self, user: str | None, given: pa.Table | None, events: Sequence[Any], naming: Naming
    ) -> tuple[pa.Table, list[str]]:
        """Returns the row of a user with what was stored, what a request says, and later events.

        Args:
            user: Id of the user, known or not; None for nobody.
            given: One row of the request, as `read` gives it: its columns take the place of the
                stored ones.
            events: Further events, as a history has them, the latest last.
            naming: Names of the fields of events.

        Returns:
            The row, in the form in which the table of users has its own, and the ids of the items
            in `events`.

        Raises:
            ConfigError: An event cannot be read.
        """
        stored = self.take([user]) if user in self.row_by_id else self.unknown([user])
        columns = dict(zip(stored.column_names, stored.columns))
        if given is not None:
            # After the stored ones: a request knows better than the bundle.
            columns |= dict(zip(given.column_names, given.columns))
        if user is not None:
            columns["user_id"] = pa.chunked_array([[user]])
        history = self._encoder.spec.history
        reader = HistoryColumn("events", "events", self.forms, naming)
        # Their own reader, whatever the model reads: items of events are never recommended again.
        (read,) = reader([list(events)]).to_pylist()
        read = [event if isinstance(event, dict) else {"item_id": event} for event in read]
        read = [event for event in read if event["item_id"] is not None]
        if history is not None and read:
            columns[history.column] = _joined(columns.get(history.column), read)
            times = [event["timestamp"] for event in read if event.get("timestamp") is not None]
            # The request is made after the last event, not at the end of the log.
            if self._newest is not None and "timestamp" not in columns:
                columns["timestamp"] = pa.chunked_array([[max(self._newest, *times, 0)]])
        return pa.table(columns), [event["item_id"] for event in read]

    def unknown(self, ids: Sequence[str | None]) -> pa.Table:
        """Returns the rows of users of whom nothing is known but the id."""
        return pa.Table.from_arrays([pa.array(ids, pa.string())], ["user_id"])

    def history_items(self, rows: pa.Table) -> list[str]:
        """Returns the ids of the items in the histories of raw rows."""
        history = self._encoder.spec.history
        # A request need not bring one.
        if history is None or history.column not in rows.column_names:
            return []
        items = []
        # An event is an item id, or a struct of it and its other columns; histories may be null.
        for events in rows[history.column].to_pylist():
            for event in events or ():
                item = event["item_id"] if isinstance(event, dict) else event
                if item is not None:
                    items.append(item)
        return items

    def history_of(self, row: Row) -> list[str]:
        """Returns the ids of the items in the history of a single row."""
        history = self._encoder.spec.history
        if history is None or history.column not in row:
            return []
        value = row[history.column]
        # Plain ids, which `read_row` leaves as they are.
        if isinstance(value, list):
            return value
        return self.history_items(row_table({history.column: value}))

    def _without_times(self, rows: pa.Table) -> pa.Table:
        """Drops the times at which users were last seen: a recommendation is made now."""
        if self._newest is None:
            return rows
        return rows.drop_columns(["timestamp"])

    def _fill_times(self, table: pa.Table) -> pa.Table:
        """Sets the newest time of the log in rows that lack a time.

        No row was trained without one, so the tower has learned nothing for a missing time.
        """
        if self._newest is None or not len(table):
            return table
        if "timestamp" not in table.column_names:
            return table.append_column("timestamp", pa.repeat(self._newest, len(table)))
        times = pc.fill_null(table["timestamp"].cast(pa.int64()), self._newest)
        position = table.column_names.index("timestamp")
        return table.set_column(position, "timestamp", times)

    def _readers_of(self, naming: Naming) -> Mapping[str, ReadColumn]:
        """Returns the readers of all columns, that of a history for names of its events."""
        history = self._encoder.spec.history
        if history is None:
            return self._readers
        # Nearly all requests: their readers are made once.
        if naming is OUR_NAMES:
            return self._all_readers
        reader = HistoryColumn(history.column, history.location, self.forms, naming)
        return {**self._readers, history.column: reader}

    @functools.cached_property
    def _all_readers(self) -> dict[str, ReadColumn]:
        """The readers of all columns under our names."""
        return dict(self._readers_of(Naming()))

    @functools.cached_property
    def _stored_readers(self) -> dict[str, ReadValues | None]:
        """The function that reads each stored column that holds texts; None of the others.

        The times at which users were last seen are left out: a recommendation is made now.
        """
        readers: dict[str, ReadValues | None] = {}
        for name in self._users.column_names:
            if name not in self.columns or name in ("user_id", "timestamp"):
                continue
            readers[name] = None
            if pa.types.is_string(self._users[name].type):
                readers[name] = values_reader(self._users[name])
        return readers

    @functools.cached_property
    def _columns_of(self) -> dict[str, tuple[str, ...]]:
        """The columns that each user feature reads."""
        features = self._encoder.spec.user.items()
        columns = {name: feature.columns_read for name, feature in features}
        history = self._encoder.spec.history
        if history is not None and history.request_gap:
            # The time from the last event to the request is read with the history.
            columns[history.name] += ("timestamp",)
        return columns

    @functools.cached_property
    def _missing(self) -> dict[str, dict[str, np.ndarray]]:
        """The arrays of each user feature for a row without its columns."""
        rows = self._fill_times(self.unknown([None]))
        encode = self._encoder.encode
        return {name: encode("user", rows, [name]) for name in self._encoder.spec.user}

    @functools.cached_property
    def _readers(self) -> dict[str, ReadColumn]:
        """The readers of all columns but that of a history, whose events have their own names."""
        return feature_readers(self._encoder, "user") | {
            "user_id": IdColumn("user_id", self.forms.user_id),
            "timestamp": TimeColumn("timestamp", self.forms.time),
        }

    @functools.cached_property
    def _newest(self) -> int | None:
        """The newest time of the log in seconds; None where no feature reads a query's time."""
        history = self._encoder.spec.history
        columns = []
        for name in self._encoder.context:
            columns += self._encoder.spec.user[name].columns_read
        if "timestamp" not in columns and not (history and history.request_gap):
            return None
        # Of the known users, whose rows have the time at which they were last seen.
        return pc.max(self._users["timestamp"]).as_py()


def _joined(stored: pa.ChunkedArray | None, events: Sequence[Mapping[str, Any]]) -> pa.ChunkedArray:
    """Returns a history of one user with further events behind it, in the type that it has."""
    before = []
    kind = None
    if stored is not None and not pa.types.is_null(stored.type):
        (history,) = stored.to_pylist()
        before = history or []
        kind = stored.type
    # Of a history of plain ids, kinds and times are read by nothing.
    if kind is not None and not pa.types.is_struct(kind.value_type):
        return pa.chunked_array([[[*before, *(event["item_id"] for event in events)]]], kind)
    # Nothing is stored: the events bring their own type.
    if kind is None:
        return pa.chunked_array([[list(events)]])
    return pa.chunked_array([[[*before, *events]]], kind)

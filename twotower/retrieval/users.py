"""Raw rows of users, known or sent with a request, in the form that the user tower reads."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa

from twotower.core.arrow import pc
from twotower.features.encoder import Encoder
from twotower.features.timestamp import as_seconds

USER_BLOCK = 65_536  # users encoded at once


class UserRows:
    """The known users of a bundle.

    Attributes:
        row_by_id: Row of each user id in the table of users.
    """

    def __init__(self, encoder: Encoder, users: pa.Table):
        """Keeps the users.

        Args:
            encoder: Encoder of the features.
            users: Columns user_id and the raw columns of the user features.
        """
        self._encoder = encoder
        self._users = users
        ids = users["user_id"].to_pylist()
        self.row_by_id: dict[str, int] = {user: row for row, user in enumerate(ids)}

    @property
    def columns(self) -> list[str]:
        """Names of the raw columns that rows may have: those of the user features, and the id."""
        own = [feature.column for feature in self._encoder.spec.user.values()]
        return list(dict.fromkeys(["user_id", *own, "timestamp"]))

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
                    items.append(str(item))
        return items

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
        # In the unit of the log, whatever type of time the rows have.
        seconds, missing = as_seconds(table["timestamp"], "rows, column 'timestamp'")
        times = pa.array(np.where(missing, self._newest, seconds))
        position = table.column_names.index("timestamp")
        return table.set_column(position, "timestamp", times)

    @functools.cached_property
    def _newest(self) -> int | None:
        """The newest time of the log in seconds; None where no feature reads a query's time."""
        history = self._encoder.spec.history
        columns = []
        for name in self._encoder.context:
            columns += self._encoder.spec.user[name].columns_read
        if "timestamp" not in columns and not (history and history.request_gap):
            return None
        return pc.max(self._users["timestamp"]).as_py()


def as_table(rows: pa.Table | Sequence[Mapping]) -> pa.Table:
    """Returns raw rows as an Arrow table."""
    if isinstance(rows, pa.Table):
        return rows
    return pa.Table.from_pylist([dict(row) for row in rows], schema=_schema(rows))


def _schema(rows: Sequence[Mapping]) -> pa.Schema | None:
    """Returns the columns of all rows with their types; None without any.

    Arrow by itself takes the columns of the first row alone.
    """
    # A dict keeps the order of the first appearance; a set would not.
    names = list(dict.fromkeys(name for row in rows for name in row))
    if not names:
        return None
    fields = []
    for name in names:
        # Of all values: the first may be missing, or whole where others are not.
        values = pa.array([row.get(name) for row in rows])
        fields.append((name, values.type))
    return pa.schema(fields)

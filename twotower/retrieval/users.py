"""Users as the user tower reads them: raw rows, stored or given, encoded."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa

from twotower.core.arrow import pc
from twotower.features.encoder import Encoder
from twotower.features.timestamp import as_seconds

BLOCK = 65_536  # users encoded at once


class UserRows:
    """The known users of a bundle.

    Args:
        encoder: of the features.
        users: user_id and the raw columns of the user features.
    """

    def __init__(self, encoder: Encoder, users: pa.Table):
        self._encoder, self._users = encoder, users
        self.places: dict[str, int] = {
            user: row for row, user in enumerate(users["user_id"].to_pylist())
        }

    def encode(self, rows: pa.Table) -> dict[str, np.ndarray]:
        """Encoded features of raw rows. What a row lacks is missing; a time is the newest of the
        log."""
        return self._encoder.encode("user", self._timed(rows))

    def encoded(self) -> Iterator[dict[str, np.ndarray]]:
        """Encoded features of all known users, in blocks."""
        for start in range(0, len(self._users), BLOCK):
            yield self.encode(self.stored(slice(start, start + BLOCK)))

    def stored(self, rows: slice) -> pa.Table:
        """Raw features of some known users, as `rows_of` gives them."""
        return self._asked_now(self._users.slice(rows.start, rows.stop - rows.start))

    def rows_of(self, ids: Sequence[str]) -> pa.Table:
        """Stored raw features of known users, and of unknown ones the id."""
        rows = pa.array([self.places.get(user) for user in ids], pa.int64())
        columns = {name: self._users[name].take(rows) for name in self._users.column_names}
        columns["user_id"] = pa.array(ids, pa.string())
        return self._asked_now(pa.table(columns))

    def brought(self, rows: pa.Table) -> list[str]:
        """The ids of the items in the histories of raw rows."""
        history = self._encoder.spec.history
        lists = (
            rows[history.column].to_pylist()
            if history and history.column in rows.column_names
            else []
        )
        events = [event for events in lists for event in events or ()]
        ids = (event["item_id"] if isinstance(event, dict) else event for event in events)
        return [str(item) for item in ids if item is not None]

    def _asked_now(self, rows: pa.Table) -> pa.Table:
        """The user is asked about now, not when it was last seen."""
        return rows if self._newest is None else rows.drop_columns(["timestamp"])

    def _timed(self, table: pa.Table) -> pa.Table:
        """With the newest time of the log where a row lacks its time: nothing trained would answer
        without one."""
        if self._newest is None or not len(table):
            return table
        if "timestamp" not in table.column_names:
            return table.append_column("timestamp", pa.repeat(self._newest, len(table)))
        seconds, missing = as_seconds(table["timestamp"], "rows, column 'timestamp'")
        times = pa.array(np.where(missing, self._newest, seconds))
        return table.set_column(table.column_names.index("timestamp"), "timestamp", times)

    @functools.cached_property
    def _newest(self) -> int | None:
        """The newest time of the log in seconds, where a context feature or the history reads the
        time of the query."""
        encoder, history = self._encoder, self._encoder.spec.history
        read = any(encoder.spec.user[name].column == "timestamp" for name in encoder.context)
        if not read and not (history and history.request_gap):
            return None
        return pc.max(self._users["timestamp"]).as_py()


def as_table(rows: pa.Table | Sequence[Mapping]) -> pa.Table:
    """Raw rows as an Arrow table."""
    if isinstance(rows, pa.Table):
        return rows
    return pa.Table.from_pylist([dict(row) for row in rows], schema=_schema(rows))


def _schema(rows: Sequence[Mapping]) -> pa.Schema | None:
    """All columns that any row has (Arrow looks at the first row alone)."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    if not names:
        return None
    return pa.schema([(name, pa.array([row.get(name) for row in rows]).type) for name in names])

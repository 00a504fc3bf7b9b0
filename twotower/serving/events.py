"""The events that a shop sends while a bundle is served: a user's live history.

Events are acknowledged when they are on the disk: in an SQLite database beside the bundle, with a
rollback journal and `synchronous=EXTRA`, as the log of changes is. What several requests send while
the disk is busy is written in one transaction. Several processes may share the file; each follows
what the others have written.
"""

from __future__ import annotations

import collections
import sqlite3
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from twotower.core.errors import ChangesError

MAX_EVENTS_OF_USER = 200  # the latest ones; models read fewer
MAX_KEPT = 1_000_000  # events in the file and in memory, the latest ones
SLACK = 10_000  # events beyond that before the oldest are dropped, so that it is done seldom
APPLICATION_ID = 0x32545745  # "2TWE"
BUSY_SECONDS = 5.0


class StoredEvent(NamedTuple):
    """An event as it is stored.

    Attributes:
        event_id: Id of the event.
        user_id: Id of the user, in the form of the log.
        item_id: Id of the item, in the form of the log.
        event: Kind of the event; None where none was given.
        timestamp: Time, or the time at which it was received, in seconds since 1970.
        recommendation_id: Id of the answer that it came of; None where none was named.
    """

    event_id: str
    user_id: str
    item_id: str
    event: str | None
    timestamp: int
    recommendation_id: str | None = None


_COLUMNS = ", ".join(StoredEvent._fields)


class EventLog:
    """The events in a file. One thread at a time uses it.

    Attributes:
        path: File, which is made when the first event comes.
    """

    def __init__(self, path: Path):
        """Opens the file, if it is there.

        Args:
            path: File of the events.

        Raises:
            ChangesError: The file holds something else, or is damaged.
        """
        self.path = path
        self._last = 0
        self._erasures = 0
        self._connection: sqlite3.Connection | None = None
        if path.exists():
            self._open()

    def add(self, batches: Sequence[Sequence[StoredEvent]]) -> list[int]:
        """Writes events, and returns how many of each batch are new when all are on the disk.

        Raises:
            ChangesError: The file is damaged, or another process holds it.
            OSError: The disk refuses; nothing was written.
        """
        connection = self._open()
        counts = []
        try:
            connection.execute("BEGIN IMMEDIATE")
            for batch in batches:
                before = connection.total_changes
                connection.executemany(
                    # By the unique id: an event that a client sends again, as its answer was lost,
                    # counts once.
                    f"INSERT OR IGNORE INTO events ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)",
                    batch,
                )
                counts.append(connection.total_changes - before)
            # The bounds of the numbers, not a count of the rows, which would read all of them.
            (last,) = connection.execute("SELECT max(n) FROM events").fetchone()
            (first,) = connection.execute("SELECT min(n) FROM events").fetchone()
            if last - first > MAX_KEPT + SLACK:
                connection.execute("DELETE FROM events WHERE n <= ?", (last - MAX_KEPT,))
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            # A full disk may have ended the transaction already, and a second end would hide its
            # error.
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise self._explain(error) from error
        return counts

    def read_new(self) -> list[StoredEvent]:
        """Returns the events that came since the last call, those of other processes too."""
        if self._connection is None and not self.path.exists():
            return []
        try:
            rows = self._open().execute(
                f"SELECT n, {_COLUMNS} FROM events WHERE n > ? ORDER BY n",
                (self._last,),
            )
            events = []
            for number, *values in rows:
                events.append(StoredEvent(*values))
                self._last = number
        except sqlite3.Error as error:
            raise self._explain(error) from error
        return events

    def erase(self, user_id: str) -> int:
        """Deletes the events of a user for good, and returns their number.

        Raises:
            ChangesError: The file is damaged, or another process holds it.
            OSError: The disk refuses; nothing was deleted.
        """
        connection = self._open()
        try:
            connection.execute("BEGIN IMMEDIATE")
            deleted = connection.execute("DELETE FROM events WHERE user_id = ?", (user_id,))
            # The number of erasures, by which processes that follow see that there was one: who it
            # was stands nowhere any more.
            (erasures,) = connection.execute("PRAGMA user_version").fetchone()
            connection.execute(f"PRAGMA user_version={erasures + 1}")
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise self._explain(error) from error
        return deleted.rowcount

    def users_after_erasure(self) -> set[str] | None:
        """Returns the users with events, if some were erased since the last call; None if not."""
        if self._connection is None:
            return None
        try:
            (erasures,) = self._connection.execute("PRAGMA user_version").fetchone()
            if erasures == self._erasures:
                return None
            rows = self._connection.execute("SELECT DISTINCT user_id FROM events").fetchall()
        except sqlite3.Error as error:
            raise self._explain(error) from error
        self._erasures = erasures
        return {user_id for (user_id,) in rows}

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _open(self) -> sqlite3.Connection:
        if self._connection is not None:
            return self._connection
        # No transactions of Python's own, which would begin before the lock is asked for. One
        # thread at a time uses the connection, but not always the same one.
        connection = sqlite3.connect(
            self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            connection.execute("PRAGMA journal_mode=DELETE")
            connection.execute("PRAGMA synchronous=EXTRA")
            # What is deleted is overwritten: its bytes are those of a person.
            connection.execute("PRAGMA secure_delete=ON")
            connection.execute("BEGIN IMMEDIATE")
            self._prepare(connection)
            # Before anything is read: whoever is erased from now on is told of.
            (self._erasures,) = connection.execute("PRAGMA user_version").fetchone()
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            connection.close()
            raise self._explain(error) from error
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if tables and application != APPLICATION_ID:
            raise ChangesError(
                f"{self.path} holds no events of a server. Name another file by --events."
            )
        connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
        # The number is never used again, so that whoever follows misses nothing.
        connection.execute(
            "CREATE TABLE IF NOT EXISTS events (n INTEGER PRIMARY KEY AUTOINCREMENT, "
            "event_id TEXT UNIQUE, user_id TEXT, item_id TEXT, event TEXT, timestamp INTEGER, "
            "recommendation_id TEXT)"
        )
        # Files of older servers lack it.
        columns = [row[1] for row in connection.execute("PRAGMA table_info(events)")]
        if "recommendation_id" not in columns:
            connection.execute("ALTER TABLE events ADD COLUMN recommendation_id TEXT")

    def _explain(self, error: sqlite3.Error) -> Exception:
        # The lower byte is the kind; the rest says which of its cases it is.
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN):
            return OSError(f"{self.path}: {error}.")
        if code == sqlite3.SQLITE_BUSY:
            return ChangesError(f"{self.path} is held by another process. Try again.")
        return ChangesError(
            f"{self.path} is damaged: {error}. Restore it, or move it away to go on without the "
            "events in it."
        )


class LiveHistories:
    """The latest events of each user, in memory."""

    def __init__(self, since: int = 0):
        """Starts without events.

        Args:
            since: Time of the last row that the bundle was made of, in seconds: events up to it
                are in the stored histories already.
        """
        self._since = since
        self._by_user: collections.OrderedDict[str, collections.deque[dict[str, Any]]] = (
            collections.OrderedDict()
        )
        self._count = 0

    def __len__(self) -> int:
        """Returns the number of events."""
        return self._count

    def add(self, events: Iterable[StoredEvent]) -> None:
        """Adds events, the latest last; those of the users of the oldest events make room."""
        for stored in events:
            if stored.timestamp <= self._since:
                continue
            history = self._by_user.get(stored.user_id)
            if history is None:
                history = collections.deque(maxlen=MAX_EVENTS_OF_USER)
                self._by_user[stored.user_id] = history
            event = {"item_id": stored.item_id, "timestamp": stored.timestamp}
            if stored.event is not None:
                event["event"] = stored.event
            # A full history drops its oldest event for the new one.
            self._count += len(history) < MAX_EVENTS_OF_USER
            history.append(event)
            # The users of the latest events stand last, so that the first one is whom to drop.
            self._by_user.move_to_end(stored.user_id)
        while self._count > MAX_KEPT:
            _, dropped = self._by_user.popitem(last=False)
            self._count -= len(dropped)

    def keep(self, users: Collection[str]) -> None:
        """Forgets all users but some."""
        for user in [user for user in self._by_user if user not in users]:
            self._count -= len(self._by_user.pop(user))

    def of(self, user_id: str) -> list[dict[str, Any]]:
        """Returns the events of a user, the latest last."""
        return list(self._by_user.get(user_id, ()))

    def last(self, user_id: str) -> dict[str, Any] | None:
        """Returns the latest event of a user, the same object until there is a newer one."""
        history = self._by_user.get(user_id)
        return history[-1] if history else None

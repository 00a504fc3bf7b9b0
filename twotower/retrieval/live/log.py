"""The log of changes beside a bundle.

A change is acknowledged when it is on the disk, and made again when the bundle is loaded.

The log is an SQLite database with a rollback journal and `synchronous=EXTRA`: whoever opens it next
undoes a transaction that a kill or a power cut interrupted. It has one table, whose rows are never
changed:

```
n      kind      payload
0      bundle    SHA-256 of the bundle's manifest, as text
1, ... upsert    Arrow stream of item_id, display columns and "__vector"
       delete    JSON list of item ids
```

Several processes may change one bundle. They take turns, each in a transaction of its own that
begins with what the others have committed: see `ChangeLog.transaction`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from twotower.core.errors import ChangesError, ConfigError

VERSION = 1
APPLICATION_ID = 0x32545752  # "2TWR", so that `file` and we tell the log from other databases
BINARY_MAGIC = b"2TOWERCH"  # first bytes of the logs of twotower 0.x, which were no databases
BUSY_SECONDS = 10.0  # wait for the transaction of another process
# SQLite keeps no value above 1e9 bytes; a larger change is refused before, with a clear message.
MAX_CHANGE_BYTES = 900_000_000
VECTOR = "__vector"  # column of the vectors, beside display columns of any other name

_REMEDY = "Restore the file, or move it away to serve the bundle without its changes."


@dataclasses.dataclass(frozen=True, eq=False)
class Upsert:
    """Items to add, or to replace where their ids exist.

    Attributes:
        items: item_id and the display columns, N rows.
        vectors: Vectors of the items, float32 [N, D].
    """

    items: pa.Table
    vectors: np.ndarray


@dataclasses.dataclass(frozen=True)
class Delete:
    """Items to delete.

    Attributes:
        ids: Ids of the items.
    """

    ids: tuple[str, ...]


Change = Upsert | Delete


@dataclasses.dataclass(frozen=True)
class ChangedItems:
    """The items that changes since an export have touched, whether they are in a log or compacted.

    Attributes:
        upserted: Ids of items that were added or replaced, and not deleted after that.
        deleted: Ids of items that were deleted, and not added after that.
    """

    upserted: tuple[str, ...] = ()
    deleted: tuple[str, ...] = ()

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> ChangedItems:
        """Returns the items that the compactions of a bundle have touched."""
        return cls(**{name: tuple(ids) for name, ids in manifest.get("changed_items", {}).items()})

    def after(self, changes: Iterable[Change]) -> ChangedItems:
        """Returns the items after further changes."""
        upserted = dict.fromkeys(self.upserted)
        deleted = dict.fromkeys(self.deleted)
        for change in changes:
            is_upsert = isinstance(change, Upsert)
            ids = change.items["item_id"].to_pylist() if is_upsert else change.ids
            now, before = (upserted, deleted) if is_upsert else (deleted, upserted)
            for item in ids:
                now[item] = None
                before.pop(item, None)
        return ChangedItems(tuple(upserted), tuple(deleted))

    def __bool__(self) -> bool:
        return bool(self.upserted or self.deleted)

    def __str__(self) -> str:
        return f"{len(self.upserted)} changed and {len(self.deleted)} deleted items"


def changes_path(folder: Path, sha256: str) -> Path:
    """Returns the path of the log of the bundle in `folder` whose manifest has this hash."""
    # The hash, so that changes are never made to another bundle that takes the folder's name.
    return folder.parent / f"{folder.name}.{sha256[:16]}.changes"


def check_unchanged(files: Path, manifest: Mapping[str, Any]) -> None:
    """Refuses a bundle that has been changed since it was written.

    It is for those who hold a part of it, and would show some changes and not others.

    Args:
        files: Folder of the bundle's files.
        manifest: Content of manifest.json.

    Raises:
        ConfigError: There are changes.
    """
    sha256 = manifest["sha256"]
    log = ChangeLog(changes_path(files, sha256), sha256)
    changes = len(log.read())
    log.close()
    if changes:
        raise ConfigError(
            f"{log.path} holds {changes} changes, which neither a shard nor a router reads. Write "
            f"them into the bundle first: tt.Retriever.load({str(files.parent)!r}).compact()"
        )


class ChangeLog:
    """The changes to one bundle, in a file that is created by the first of them.

    The callers hold a lock: a connection serves one thread at a time.

    Attributes:
        path: See `changes_path`.
        last: Number of the last change that was read or written here.
    """

    def __init__(self, path: Path, sha256: str):
        """Opens nothing yet.

        Args:
            path: File of the log, which need not exist.
            sha256: Hash of the bundle's manifest.
        """
        self.path = path
        self.last = 0
        self._sha256 = sha256
        self._connection: sqlite3.Connection | None = None
        # Whether the file was found to be a log of this bundle: once is enough.
        self._checked = False
        # A failure after which it is not known what is on the disk.
        self._failure = ""

    def read(self) -> list[Change]:
        """Returns the changes after `last`, which then is the number of the newest.

        Raises:
            ChangesError: The log is damaged, or belongs to another bundle.
        """
        if self._is_empty():
            return []
        with self._explain_errors():
            return self._read(self._open())

    def since(self, number: int) -> list[Change]:
        """Returns the changes after the one with this number, up to `last`."""
        # By a connection of its own, which leaves `last` as it is.
        reader = ChangeLog(self.path, self._sha256)
        reader.last = number
        changes = reader.read()
        reader.close()
        # Another process may have added more, which are not made here yet.
        return changes[: self.last - number]

    @contextlib.contextmanager
    def transaction(self) -> Iterator[list[Change]]:
        """Excludes all other writers, and yields the changes that they made since `last`.

        What the block adds is on the disk when the block has ended, all of it; after an error
        nothing of it is.

        Raises:
            ChangesError: Another process holds the log, or an earlier failure left open what is on
                the disk.
            OSError: The disk refuses; the changes are not made, now or after a restart.
        """
        if self._failure:
            raise ChangesError(
                f"{self.path} cannot be written any more ({self._failure}). Load the bundle again."
            )
        known = self.last
        with self._explain_errors():
            connection = self._open()
            # IMMEDIATE takes the lock of writers now: what is read next stays the newest.
            connection.execute("BEGIN IMMEDIATE")
            try:
                if self._is_empty():
                    self._make_table(connection)
                missed = self._read(connection)
                known = self.last
                yield missed
                connection.execute("COMMIT")
            # Whatever ended the block, nothing of it was made, so its numbers are free again.
            except BaseException:
                self.last = known
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def add(self, change: Change) -> None:
        """Writes a change, inside a `transaction`."""
        kind, payload = encode(change)
        # Before anything is written: the whole change is refused, not its end.
        if len(payload) > MAX_CHANGE_BYTES:
            raise ChangesError(
                f"One change may hold {MAX_CHANGE_BYTES:,} bytes, not {len(payload):,}: "
                "make several of it."
            )
        if self._connection is None:
            raise RuntimeError("A change is added inside a transaction.")
        _insert(self._connection, self.last + 1, kind, payload)
        self.last += 1

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._checked = False

    def _is_empty(self) -> bool:
        """Whether nothing was ever committed: a process may be killed before its first change."""
        return not self.path.exists() or not self.path.stat().st_size

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = self._connect()
        return self._connection

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path,
            timeout=BUSY_SECONDS,
            isolation_level=None,  # transactions begin and end where this file says so
            check_same_thread=False,  # the callers' lock sees to it
        )
        try:
            connection.execute("PRAGMA journal_mode=DELETE")
            # EXTRA also syncs the folder after the journal is deleted: only then a power cut cannot
            # bring it back, and undo a change that was acknowledged. Measured on a busy disk, a
            # change takes 22 ms in the place of 4 for one sync of an appended record; keeping the
            # journal (PERSIST) takes 20. Many items in one change share that.
            connection.execute("PRAGMA synchronous=EXTRA")
        except BaseException:
            connection.close()
            raise
        return connection

    def _make_table(self, connection: sqlite3.Connection) -> None:
        connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version={VERSION}")
        connection.execute(
            "CREATE TABLE changes (n INTEGER PRIMARY KEY, kind TEXT, payload BLOB, crc32 INTEGER)"
        )
        _insert(connection, 0, "bundle", self._sha256.encode())

    def _check_file(self, connection: sqlite3.Connection) -> None:
        """Refuses a file that is no log, is damaged in its structure, or is of another bundle."""
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if application != APPLICATION_ID:
            raise ChangesError(f"{self.path} is not a log of changes. {_REMEDY}")
        if version != VERSION:
            raise ChangesError(
                f"{self.path} has version {version}; this twotower reads version {VERSION}."
            )
        # Pages and their order; the contents of rows have sums of their own.
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise ChangesError(f"{self.path} is damaged: {verdict}. {_REMEDY}")
        ((kind, payload),) = self._rows(connection, "n = 0", ())
        if kind != "bundle" or payload != self._sha256.encode():
            raise ChangesError(
                f"{self.path} holds changes to another bundle than the one beside it."
            )

    def _read(self, connection: sqlite3.Connection) -> list[Change]:
        # The first look at the file undoes what a killed process left half done, which may be all.
        connection.execute("PRAGMA schema_version").fetchone()
        if self._is_empty():
            return []
        if not self._checked:
            self._check_file(connection)
            self._checked = True
        rows = self._rows(connection, "n > ? AND n > 0", (self.last,))
        try:
            changes = [decode(kind, payload) for kind, payload in rows]
        except (ValueError, KeyError, pa.ArrowException) as error:
            raise ChangesError(
                f"{self.path} holds a change that cannot be read: {error}. {_REMEDY}"
            ) from error
        self.last += len(changes)
        return changes

    def _rows(
        self, connection: sqlite3.Connection, condition: str, values: tuple[int, ...]
    ) -> list[tuple[str, bytes]]:
        """Returns kind and payload of the rows under a condition, each checked against its sum."""
        rows = connection.execute(
            f"SELECT n, kind, payload, crc32 FROM changes WHERE {condition} ORDER BY n", values
        ).fetchall()
        first = values[0] + 1 if values else 0
        # Numbers without a gap: a row that is missing is damage too.
        for expected, (number, kind, payload, checksum) in enumerate(rows, first):
            whole = isinstance(payload, bytes) and checksum == _checksum(number, kind, payload)
            if number != expected or not whole:
                raise ChangesError(
                    f"{self.path} is damaged at change {expected}: "
                    f"its content is not what was written. {_REMEDY}"
                )
        if not values and len(rows) != 1:
            raise ChangesError(f"{self.path} is damaged: it names no bundle. {_REMEDY}")
        return [(kind, payload) for _, kind, payload, _ in rows]

    @contextlib.contextmanager
    def _explain_errors(self) -> Iterator[None]:
        """Turns errors of SQLite into errors that name the file and the cure."""
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:  # the latter of a damaged schema
            # The low byte is the kind of error, the rest its details.
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code == sqlite3.SQLITE_BUSY:
                raise ChangesError(
                    f"{self.path} has been held by another process for {BUSY_SECONDS:g} seconds. "
                    "Try again."
                ) from error
            if code == sqlite3.SQLITE_FULL:
                raise OSError(
                    errno.ENOSPC,
                    f"The change was not made: {error}. Make room, and make it again",
                    str(self.path),
                ) from error
            if code == sqlite3.SQLITE_READONLY:
                raise ChangesError(
                    f"{self.path} cannot be written ({error}): it was moved, or is read-only. "
                    "Load the bundle again."
                ) from error
            if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN):
                # What is on the disk after a failed sync is not known, and another try would not
                # tell: the next process reads it anew.
                self._failure = str(error)
                raise OSError(
                    errno.EIO, f"The change may be lost: {error}", str(self.path)
                ) from error
            if self.path.is_file() and _begins_with(self.path, BINARY_MAGIC):
                raise ChangesError(
                    f"{self.path} was written by an older twotower, whose logs are not read any "
                    "more. Load the bundle with that version and call compact(), or move the file "
                    "away to serve the bundle without its changes."
                ) from error
            raise ChangesError(f"{self.path} is damaged: {error}. {_REMEDY}") from error


def encode(change: Change) -> tuple[str, bytes]:
    """Returns the kind and the payload of a change."""
    if isinstance(change, Delete):
        return "delete", json.dumps(change.ids).encode()
    width = change.vectors.shape[1]
    # float32 as it is in memory: replayed vectors are those that were added, bit for bit.
    values = pa.array(np.ascontiguousarray(change.vectors, np.float32).ravel())
    vectors = pa.FixedSizeListArray.from_arrays(values, width)
    table = change.items.append_column(VECTOR, vectors)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return "upsert", sink.getvalue().to_pybytes()


def decode(kind: str, payload: bytes) -> Change:
    """Returns the change that `encode` wrote."""
    if kind == "delete":
        return Delete(tuple(json.loads(payload)))
    if kind != "upsert":
        raise ValueError(f"{kind!r} is no kind of change")
    table = pa.ipc.open_stream(payload).read_all()
    column = table[VECTOR].combine_chunks()
    vectors = column.flatten().to_numpy().reshape(len(table), column.type.list_size)
    return Upsert(table.drop_columns([VECTOR]), vectors)


def _insert(connection: sqlite3.Connection, number: int, kind: str, payload: bytes) -> None:
    row = (number, kind, payload, _checksum(number, kind, payload))
    connection.execute("INSERT INTO changes VALUES (?, ?, ?, ?)", row)


def _checksum(number: int, kind: str, payload: bytes) -> int:
    """Returns the CRC-32 of a row: SQLite does not notice changed bytes inside a value."""
    return zlib.crc32(payload, zlib.crc32(f"{number} {kind} ".encode()))


def _begins_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic

"""A DuckDB database that keeps its rows on the disk, and its memory within a limit."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from twotower.core.errors import ConfigError
from twotower.core.files import discard
from twotower.core.install import extra
from twotower.core.progress import progress

if TYPE_CHECKING:
    import duckdb

# Rows that a query hands over at once.
BLOCK = 2**19
# Share of the memory that is DuckDB's own: the rest is for the blocks, and for all that is kept of
# users and items.
_SHARE = 0.4
_FILE = "rows.duckdb"


class MemoryTooSmall(ConfigError):
    """A memory that DuckDB cannot prepare the log in."""


class Database:
    """Tables of rows, and queries whose rows come in blocks.

    Args:
        connection: Connection to the database.
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection):
        self._connection = connection

    def run(self, sql: str) -> None:
        """Runs statements."""
        # To its end: a connection does nothing else before.
        self._connection.execute(sql).fetchall()

    def insert(self, name: str, rows: pa.Table) -> None:
        """Adds rows to a table, by the order of their columns."""
        self._with_rows(rows, f"INSERT INTO {name} SELECT * FROM rows_of_arrow")

    def create(self, name: str, rows: pa.Table) -> None:
        """Makes a table of rows."""
        self._with_rows(rows, f"CREATE TABLE {name} AS SELECT * FROM rows_of_arrow")

    def _with_rows(self, rows: pa.Table, sql: str) -> None:
        self._connection.register("rows_of_arrow", rows)
        self.run(sql)
        self._connection.unregister("rows_of_arrow")

    def table(self, sql: str) -> pa.Table:
        """Returns the rows of a query that has few."""
        return self._connection.sql(sql).to_arrow_table()

    def columns(self, sql: str) -> list[np.ndarray]:
        """Returns the columns of a query that has few rows, [N] each."""
        return [column.to_numpy() for column in self.table(sql).columns]

    def value(self, sql: str) -> Any:
        """Returns the value of a query that has one row of one column."""
        ((value,),) = self._connection.execute(sql).fetchall()
        return value

    def blocks(self, sql: str, rows: int, what: str) -> Iterator[pa.Table]:
        """Returns the rows of a query in blocks, in its order, and shows how far it has come.

        Args:
            sql: Query.
            rows: Number of rows that it has.
            what: Name of the work.
        """
        reader = self._connection.sql(sql).to_arrow_reader(BLOCK)
        total = -(-rows // BLOCK)
        return progress(_blocks(reader), total=total, what=what, seconds=10.0)


def _blocks(reader: pa.RecordBatchReader) -> Iterator[pa.Table]:
    """Yields the rows of a reader, whose batches may be small, in blocks."""
    batches: list[pa.RecordBatch] = []
    rows = 0
    for batch in reader:
        batches.append(batch)
        rows += len(batch)
        if rows >= BLOCK:
            yield pa.Table.from_batches(batches).combine_chunks()
            batches = []
            rows = 0
    if batches:
        yield pa.Table.from_batches(batches).combine_chunks()


@contextlib.contextmanager
def open_database(folder: Path, memory: int) -> Iterator[Database]:
    """Opens an empty database in a folder, where it also puts what does not fit into memory.

    Its files are gone at the end. Those that a kill leaves are of no use, and are deleted.

    Args:
        folder: Folder of this machine.
        memory: Memory of the whole process in bytes, of which DuckDB takes a part.

    Raises:
        ConfigError: DuckDB is not installed.
        MemoryTooSmall: The memory is too little for the log.
    """
    with extra("duckdb", "--engine=duckdb"):
        import duckdb
    # From the root: DuckDB takes a name such as "postgres:x" for that of another database.
    folder = folder.absolute()
    if "?" in str(folder):
        raise ConfigError(
            f"--data: {str(folder)!r} has a question mark, behind which DuckDB reads options: name "
            "a folder without, or use --engine=memory."
        )
    for path in (folder / _FILE, folder / f"{_FILE}.wal", folder / "spilled"):
        discard(path)
    settings = {
        # Nothing is downloaded, whatever a query would like to have.
        "autoinstall_known_extensions": False,
        "memory_limit": f"{round(memory * _SHARE / 2**20)}MiB",
        "temp_directory": str(folder / "spilled"),
        # Where order matters, queries ask for it.
        "preserve_insertion_order": False,
        "threads": min(os.cpu_count() or 1, 8),
        # Rows are read once or twice: to compress them takes more time than all else.
        "force_compression": "uncompressed",
    }
    try:
        with duckdb.connect(str(folder / _FILE), config=settings) as connection:
            yield Database(connection)
        # The disk is full of arrays soon: the rows of the log are in them.
        discard(folder / _FILE)
    except duckdb.OutOfMemoryException as error:
        # A full disk is told as lack of memory too.
        if re.search("max_temp_directory_size|No space left", str(error)):
            raise OSError(f"No space left on device for {folder}: {error}") from error
        reason = str(error).split("\n")[0]
        raise MemoryTooSmall(
            f"--memory={memory / 1e9:g}GB is too little for this log ({reason}): give more."
        ) from error

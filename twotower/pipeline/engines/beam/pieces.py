"""Pieces of the files of a log, each of which one worker reads."""

from __future__ import annotations

import dataclasses
import functools
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import parquet

from twotower.config import TableConfig
from twotower.core.arrow import BadValue
from twotower.core.errors import ConfigError
from twotower.core.remote.copies import list_tables
from twotower.core.remote.objects import is_remote
from twotower.data.contract import Contract
from twotower.data.sources import content, files
from twotower.data.sources.content import Kind
from twotower.data.tables import Origin, RawTable
from twotower.pipeline.engines.beam.ids import COLUMNS, coded_later, first_positions, split_by_hash
from twotower.pipeline.engines.beam.store import Store, to_bytes
from twotower.pipeline.engines.reading.columns import Columns, schema_to_text
from twotower.pipeline.engines.reading.log_reading import SHOWN, LogReading, locate_in

# File and row in one number: no file has as many rows.
ROWS_OF_FILE = 2**40
# Rows that a worker reads at least, where there are as many.
_PIECE = 2**19
# Of a file that tells nothing of its rows.
_BYTES_A_ROW = 32


@dataclasses.dataclass(frozen=True)
class Piece:
    """A file of the log, or some row groups of one.

    Attributes:
        file: Number of the file in the order of the log.
        path: Path or address of the file.
        event: Kind of its events; empty where the rows say it.
        groups: Numbers of the row groups, one after the other; empty for the whole file.
        first: Row of the file at which the piece begins.
        num_rows: Number of rows, of text about.
    """

    file: int
    path: str
    event: str = ""
    groups: tuple[int, ...] = ()
    first: int = 0
    num_rows: int = 0


def find_pieces(table: TableConfig, kind: Kind) -> list[Piece]:
    """Returns the pieces of a log in its order.

    A file of Parquet on a disk is cut between row groups. One of text is one piece, since only its
    reader knows where its rows begin; so is one at an address, which a worker copies first.

    Args:
        table: Options of the table of the log.
        kind: Kind of files whose name does not tell.

    Raises:
        ConfigError: There is no file.
    """
    pieces = []
    for number, (path, event, size) in enumerate(_find_files(table, kind)):
        if is_remote(path) or content.look(Path(path), "interactions", kind).kind != "parquet":
            pieces.append(Piece(number, path, event, num_rows=size // _BYTES_A_ROW))
            continue
        first = 0
        for groups, rows in _cut(Path(path)):
            pieces.append(Piece(number, path, event, groups, first, rows))
            first += rows
    return pieces


def _cut(path: Path) -> Iterator[tuple[tuple[int, ...], int]]:
    """Yields row groups of a file that are read together, and the number of their rows."""
    metadata = parquet.read_metadata(path)
    groups: list[int] = []
    rows = 0
    for group in range(metadata.num_row_groups):
        groups.append(group)
        rows += metadata.row_group(group).num_rows
        # Small ones together: each piece costs a runner more than its rows otherwise.
        if rows >= _PIECE or group == metadata.num_row_groups - 1:
            yield tuple(groups), rows
            groups = []
            rows = 0


def _find_files(table: TableConfig, kind: Kind) -> Iterator[tuple[str, str, int]]:
    """Yields path or address, kind of events and bytes of each file."""
    patterns = table.event_files or {"": table.path}
    for event, pattern in patterns.items():
        if not is_remote(pattern):
            for path in files.find_files(pattern, "interactions", kind):
                yield str(path), event, path.stat().st_size
            continue
        address, objects = list_tables(pattern, "config.data.interactions.path")
        sizes = {Path(each.name): each.size for each in objects}
        # By path and not by letter: a log has one order wherever it lies.
        paths = sorted(sizes)
        if address == pattern.rstrip("/"):
            # A folder; a file or a pattern says itself what is meant.
            paths = files.keep_data(paths, kind)
        for path in paths:
            yield f"{address}/{path}", event, sizes[path]


@dataclasses.dataclass(frozen=True)
class PieceReader:
    """What a worker does with a piece.

    Attributes:
        reading: How the log is read.
        store: Folder for the rows.
        buckets: Number of buckets of distinct ids.
    """

    reading: LogReading
    store: Store
    buckets: int

    def read(self, piece: Piece) -> Iterator[tuple[str, Any]]:
        """Reads a piece in blocks, whose rows it leaves in files of the store.

        Yields:
            "block" and what is known of a block, as JSON; "ids" and a key with the distinct ids of
            a bucket.
        """
        first = piece.first
        try:
            for part in self._parts(piece):
                block, ids = self._read_block(piece, part, first)
                yield "block", block
                for pair in ids:
                    yield "ids", pair
                first += len(part.table)
        # Not raised: a runner would try again, and tell the rest of the pipeline with it.
        except ConfigError as error:
            yield "block", {"file": piece.file, "first": first, "error": str(error)}

    def _parts(self, piece: Piece) -> Iterator[files.TableFile]:
        # One at an address is copied to this machine.
        (path,) = files.find_files(piece.path, "interactions", self.reading.kind)
        reading = self.reading
        for part in files.read_pieces(
            path, reading.table, "interactions", reading.kind, groups=piece.groups
        ):
            if piece.event:
                part = files.with_event(part, piece.event, "interactions")
            yield part

    def _read_block(
        self, piece: Piece, part: files.TableFile, first: int
    ) -> tuple[dict[str, Any], list[tuple[tuple[str, int, str], bytes]]]:
        """Writes the rows of a block, and returns what is known of them and their distinct ids."""
        block: dict[str, Any] = {"file": piece.file, "first": first, "rows": len(part.table)}
        if part.rows is not None and len(part.rows.skipped):
            block["skipped"] = len(part.rows.skipped)
            lines = part.rows.skipped_lines(SHOWN)
            block["locations"] = [f"{piece.path}, line {line}" for line in lines]
        if not len(part.table):
            return block, []
        is_typed = self.reading.kind != "csv"
        origin = Origin(piece.path, functools.partial(locate_in, part), is_typed=is_typed)
        rows, _, failed = self.reading.read(part.table, origin, Contract())
        columns = Columns("beam", self.reading.divided_by)
        columns.begin(rows.schema, piece.path)
        raw = RawTable(rows, self.reading.table, "interactions", origin)
        ids = []
        positions = piece.file * ROWS_OF_FILE + first + np.arange(len(rows))
        for key, column in COLUMNS.items():
            _check_kind(raw, key)
            distinct = first_positions(rows[key], positions)
            kind = str(rows[key].type)
            for bucket, some in split_by_hash(distinct, "id", self.buckets):
                ids.append(((column, bucket, kind), to_bytes(some)))
        block["name"] = f"rows-{uuid.uuid4().hex}.arrow"
        self.store.write_table(block["name"], coded_later(rows, columns, failed))
        block["is_text"] = part.kind == "csv"
        block["source"] = schema_to_text(part.table.schema)
        block["schema"] = schema_to_text(rows.schema)
        return block, ids


def _check_kind(raw: RawTable, key: str) -> None:
    """Refuses ids of a type that no id has, which cannot be grouped either."""
    try:
        # Of no row: types alone are looked at.
        Contract().ids(key, raw.rows[key].slice(0, 0))
    except BadValue as error:
        raise raw.refusal(error, key) from None

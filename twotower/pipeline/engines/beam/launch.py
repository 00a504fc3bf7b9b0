"""The engine "beam": workers of Apache Beam read a log, and give its ids their codes.

What makes the folder of the coded rows is the machine that launches them, as with the engine
"duckdb".
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from absl import logging

from twotower.config import Config
from twotower.core.errors import ConfigError
from twotower.core.progress import progress
from twotower.core.remote.objects import is_remote
from twotower.data.contract import Contract
from twotower.data.dataset import Dropped
from twotower.data.sources.content import Kind
from twotower.data.tables import Origin, RawTable
from twotower.features.spec import FeatureSpec, load_spec
from twotower.pipeline.engines.bad_rows import check_bad_rows, with_bad_rows
from twotower.pipeline.engines.beam import ids
from twotower.pipeline.engines.beam.library import pipeline_options
from twotower.pipeline.engines.beam.pieces import (
    ROWS_OF_FILE,
    PieceReader,
    find_pieces,
)
from twotower.pipeline.engines.beam.pipelines import Block, codes_file, run_joining, run_reading
from twotower.pipeline.engines.beam.store import Store
from twotower.pipeline.engines.database import Database
from twotower.pipeline.engines.divide import split_log
from twotower.pipeline.engines.kept.stages import SCRATCH
from twotower.pipeline.engines.log import Log, code_log, insert_rows
from twotower.pipeline.engines.reading.columns import Columns, schema_from_text
from twotower.pipeline.engines.reading.log_reading import (
    SHOWN,
    LogReading,
    note_skipped,
    without_rows,
)
from twotower.pipeline.engines.rows import filter_log
from twotower.pipeline.engines.supported import check_supported
from twotower.pipeline.engines.writer import write_folder
from twotower.pipeline.event_weights import with_event_weights

# Rows of a bucket, whose ids one worker holds.
_BUCKET = 2**21


def prepare_on_beam(
    config: Config,
    folder: Path,
    memory: int,
    max_bad_rows: int | None = None,
    *,
    pipeline: str = "",
    temp: str = "",
) -> None:
    """Prepares a log into a folder, whose rows workers read.

    Args:
        config: Configuration whose data, split, features and labels are prepared.
        folder: Folder to write to, with the folder `SCRATCH` in it.
        memory: Memory in bytes that this process keeps to, as long as users and items leave room.
        max_bad_rows: Number of rows with other fields than the header that may be left out; None
            for what `bad_rows` of the tables says.
        pipeline: Options of the pipelines, as on a command line.
        temp: Folder that this machine and the workers see; by default one in `folder`.

    Raises:
        ConfigError: The data cannot be used, or an option is not done here.
        OSError: The disk is full.
    """
    spec = with_event_weights(load_spec(config.features), config)
    # Before the first row is read: a log that needs this engine is read for hours.
    check_supported(config, spec, "beam")
    options = pipeline_options(pipeline)
    base = temp.rstrip("/") or str(folder / SCRATCH)
    if not is_remote(base):
        # Workers have other working folders.
        base = str(Path(base).absolute())
    # Of this try alone: files of one that was killed are not to be mixed with them.
    store = Store(f"{base}/beam-{uuid.uuid4().hex[:12]}")

    def bring(database: Database) -> Log:
        store.make()
        try:
            skipping = with_bad_rows(config, max_bad_rows)
            log = _read_log(database, skipping, spec, store, options, max_bad_rows)
        finally:
            # As large as the log, and the disk is full of arrays soon.
            store.discard()
        log = filter_log(database, log, config.data)
        return split_log(database, log, config.split)

    write_folder(bring, config, spec, folder, memory)


def _read_log(
    database: Database,
    config: Config,
    spec: FeatureSpec,
    store: Store,
    options: Any,
    max_bad_rows: int | None,
) -> Log:
    """Reads the log of a configuration into the table `log` of a database.

    Args:
        database: Database, without tables.
        config: Configuration of a run.
        spec: Features of the run.
        store: Folder that the workers see.
        options: Options of the pipelines.
        max_bad_rows: Number of bad rows that may be left out; None for any.

    Raises:
        ConfigError: The data cannot be read, or can only be a mistake.
    """
    reading = LogReading.of(config, spec)
    pieces = find_pieces(reading.table, reading.kind)
    num_rows = sum(piece.num_rows for piece in pieces)
    reader = PieceReader(reading, store, buckets=1 + num_rows // _BUCKET)
    logging.info("beam: reading %d pieces of the log", len(pieces))
    run_reading(pieces, reader, options)
    paths = {piece.file: piece.path for piece in pieces}
    read = _ReadLog(reading, paths, store.read_json("blocks.json"))
    # Before the rows are sent from worker to worker.
    check_bad_rows(read.skipped, max_bad_rows)
    distinct = _DistinctIds(read, store)

    def insert(codes: Mapping[str, np.ndarray]) -> list[Dropped]:
        buckets = 1 + read.num_rows // _BUCKET
        _write_codes(distinct, codes, buckets, store)
        logging.info("beam: giving %d rows the codes of their ids", read.num_rows)
        run_joining(read.blocks, read.schema_of_blocks(), store, buckets, options)
        names = store.read_json("log.json")
        blocks = map(store.read_table, names)
        blocks = progress(blocks, total=len(names), what="rows of workers", seconds=10.0)
        return insert_rows(database, blocks)

    log = code_log(database, read, distinct, insert, config, spec)
    # Those of the tables too.
    check_bad_rows(log.dataset.dropped, max_bad_rows)
    return log


class _ReadLog:
    """What workers found in a log; it is a `ReadLog`.

    Args:
        reading: How the log was read.
        paths: Path of each file by its number.
        found: What is known of the blocks of rows, in any order.

    Attributes:
        num_rows: Number of rows.
        blocks: Files of the rows.

    Raises:
        ConfigError: The data cannot be read, or has no rows.
    """

    def __init__(
        self, reading: LogReading, paths: Mapping[int, str], found: Sequence[dict[str, Any]]
    ):
        self._reading = reading
        self.kind: Kind = reading.kind
        self.contract = Contract()
        self.columns = Columns("beam", reading.divided_by)
        self.skipped: list[Dropped] = []
        self.num_rows = 0
        self.blocks: list[Block] = []
        # Position of the first row of each file, by its number.
        self._begins: dict[int, int] = {}
        self._paths = paths
        skipped = 0
        locations: list[str] = []
        # A block without rows is before the one that begins at its row, and an error behind all.
        for block in sorted(found, key=_order_of):
            if "error" in block:
                raise ConfigError(block["error"])
            self._begins.setdefault(block["file"], self.num_rows)
            skipped += block.get("skipped", 0)
            locations += block.get("locations", [])
            if block["rows"]:
                self._add(block)
        if not self.num_rows:
            raise without_rows(reading.table.path)
        if skipped:
            self.skipped.append(note_skipped(skipped, self.num_rows, locations[:SHOWN]))

    def _add(self, block: dict[str, Any]) -> None:
        """Takes what is known of a block of rows."""
        path = self._paths[block["file"]]
        schema = schema_from_text(block["schema"])
        if not self.num_rows:
            self.columns.begin(schema, path)
            # Forms are those of the options alone, so that no row is needed to find them again.
            origin = Origin(path, str, is_typed=self.kind != "csv")
            source = schema_from_text(block["source"]).empty_table()
            _, self.contract, _ = self._reading.read(source, origin, self.contract)
        self.columns.widen(schema, path, is_text=block["is_text"])
        self.blocks.append(Block(block["name"], self.num_rows))
        self.num_rows += block["rows"]

    def schema_of_blocks(self) -> pa.Schema:
        """Returns the schema to which all blocks are cast."""
        rows = self.columns.schema.empty_table()
        return ids.coded_later(rows, self.columns, np.zeros(0, np.int16)).schema

    def positions(self, locations: np.ndarray) -> np.ndarray:
        """Returns positions in the log, int64 [N].

        Args:
            locations: Number of the file times `ROWS_OF_FILE`, and the row in it, int64 [N].
        """
        begins = np.zeros(max(self._begins) + 1, np.int64)
        begins[list(self._begins)] = list(self._begins.values())
        file, row = np.divmod(locations, ROWS_OF_FILE)
        return begins[file] + row

    def locate(self, position: int) -> str:
        """Returns file and row of a position in the log."""
        # The last one of those that begin there: the files before it are without rows.
        file = max(number for number, first in self._begins.items() if first <= position)
        return f"{self._paths[file]}, row {position - self._begins[file] + 1}"

    def raw(self, rows: pa.Table) -> RawTable:
        """See `ReadLog`."""
        last = self._paths[max(self._paths)]
        origin = Origin(last, self.locate, is_typed=self.kind != "csv")
        return RawTable(rows, self._reading.table, "interactions", origin)


def _order_of(block: dict[str, Any]) -> tuple[int, int, bool, int]:
    return block["file"], block["first"], "error" in block, block.get("rows", 0)


class _DistinctIds:
    """The distinct ids that workers have found; they are `DistinctIds`.

    Args:
        read: The log.
        store: Folder with the files of ids.
    """

    def __init__(self, read: _ReadLog, store: Store):
        tables: dict[str, list[pa.Table]] = {column: [] for column in ids.COLUMNS.values()}
        for column, name in store.read_json("ids.json"):
            tables[column].append(store.read_table(name))
        self._ids: dict[str, pa.ChunkedArray] = {}
        self._first: dict[str, np.ndarray] = {}
        for key, column in ids.COLUMNS.items():
            kind = read.columns.schema.field(key).type
            # There is no file where all of them are missing.
            empty = ids.first_positions(pa.chunked_array([], kind), np.zeros(0, np.int64))
            joined = pa.concat_tables([empty, *tables[column]])
            first = read.positions(joined["first"].to_numpy())
            order = np.argsort(first)
            self._ids[key] = ids.typed_ids(joined["id"].take(pa.array(order)), kind)
            self._first[key] = first[order]

    def ids(self, key: str) -> pa.ChunkedArray:
        """See `DistinctIds`."""
        return self._ids[key]

    def first_row(self, key: str, code: int) -> int:
        """See `DistinctIds`."""
        return int(self._first[key][code])


def _write_codes(
    distinct: _DistinctIds, codes: Mapping[str, np.ndarray], buckets: int, store: Store
) -> None:
    """Writes the codes of ids in buckets, as the workers that join them want them."""
    for key, column in ids.COLUMNS.items():
        table = pa.table({"id": ids.plain_ids(distinct.ids(key)), "code": codes[key][:-1]})
        # Rows without an id are in the first bucket, also where no id is.
        files = {0: table.slice(0, 0)}
        files.update(ids.split_by_hash(table, "id", buckets))
        for bucket, some in files.items():
            store.write_table(codes_file(column, bucket), some)

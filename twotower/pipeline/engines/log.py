"""Reads a log in pieces into a database, and gives its ids the codes that a log in memory has."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa

from twotower.config import Config, TableConfig
from twotower.core.arrow import BadValue, join_chunks
from twotower.core.codes import codes_and_values, encode
from twotower.core.errors import ConfigError
from twotower.core.ids import IdForm, written_forms
from twotower.core.progress import progress
from twotower.data.contract import KEYS, Contract
from twotower.data.dataset import Dataset, Dropped, collect_entities
from twotower.data.matching import check_matches
from twotower.data.sources import files
from twotower.data.sources.content import Kind
from twotower.data.sources.load import skipped_rows
from twotower.data.tables import (
    Origin,
    RawTable,
    near_equal_ids,
    read_tables,
)
from twotower.features.spec import FeatureSpec
from twotower.pipeline.engines.database import Database
from twotower.pipeline.engines.kept.rows import RowWriter, WrittenRows
from twotower.pipeline.engines.kept.stages import SCRATCH, Stages
from twotower.pipeline.engines.reading.columns import Columns, schema_from_text, schema_to_text
from twotower.pipeline.engines.reading.log_reading import (
    SHOWN,
    LogReading,
    locate_in,
    note_skipped,
    without_rows,
)


@dataclasses.dataclass(frozen=True)
class Log:
    """A log whose rows lie in the table `log` of a database.

    That table has the columns position (in the source), u and i (codes of user and item), one for
    each further column, and failed (number of the first condition of `config.data.where` that a row
    does not satisfy).

    Attributes:
        dataset: The log but for its rows, of which there are none.
        columns: Further column of the log -> its column in the database.
        ids: "user_id" and "item_id" -> texts by code, in order of first appearance.
    """

    dataset: Dataset
    columns: dict[str, str]
    ids: dict[str, pa.Array]

    @property
    def time(self) -> str:
        """Column of the times in the database; where rows have none, their order is that of the
        source, and each row is a moment of its own."""
        return self.columns.get("timestamp", "position")

    @property
    def has_times(self) -> bool:
        """Whether rows have times."""
        return "timestamp" in self.columns

    @property
    def schema(self) -> pa.Schema:
        """Schema of the rows, with ids as codes."""
        return self.dataset.interactions.schema

    def rows(self, block: pa.Table) -> pa.Table:
        """Returns rows with our columns.

        Args:
            block: Columns u, i and those of `columns`, in that order.
        """
        arrays = []
        for key, codes in zip(KEYS, block.columns, strict=False):
            indices = join_chunks(codes.cast(pa.int32()))
            arrays.append(pa.DictionaryArray.from_arrays(indices, self.ids[key]))
        arrays += [join_chunks(column) for column in block.columns[len(KEYS) :]]
        rows = pa.table(arrays, [*KEYS, *self.columns])
        # In the order of the source; a type that the database has in another form is cast back.
        return rows.select(self.schema.names).cast(self.schema)


class ReadLog(Protocol):
    """What is known of a log whose rows were read, but for the codes of its ids.

    Attributes:
        kind: Kind of files whose name does not tell.
        contract: Forms of the times, and of the columns that are used as numbers.
        columns: Columns of the rows.
    """

    kind: Kind
    contract: Contract
    columns: Columns

    @property
    def skipped(self) -> Sequence[Dropped]:
        """Notes on the rows that were left out, of each table that had some."""
        ...

    def raw(self, rows: pa.Table) -> RawTable:
        """Returns rows as those of the table of the log, which name a row by its position."""
        ...


class DistinctIds(Protocol):
    """The distinct ids of a log as they were read."""

    def ids(self, key: str) -> pa.ChunkedArray:
        """Returns the ids of users or items, in order of first appearance.

        Args:
            key: "user_id" or "item_id".
        """
        ...

    def first_row(self, key: str, code: int) -> int:
        """Returns the position of the first row that has an id.

        Args:
            key: "user_id" or "item_id".
            code: Number of the id among the distinct ones.
        """
        ...


def read_log(database: Database, config: Config, spec: FeatureSpec, folder: Path) -> Log:
    """Reads the log of a configuration into the table `log` of a database.

    Args:
        database: Database, without tables.
        config: Configuration of a run.
        spec: Features of the run.
        folder: Folder that is being prepared, which keeps the rows as they were read.

    Raises:
        ConfigError: The data cannot be read, or can only be a mistake.
    """
    reader = _Reader(LogReading.of(config, spec).with_held_out(config.data))
    rows = _read_or_find(reader, folder)

    def insert(codes: Mapping[str, np.ndarray]) -> list[Dropped]:
        return insert_rows(database, _blocks(rows, reader.columns, codes))

    return code_log(database, reader, rows, insert, config, spec)


def code_log(
    database: Database,
    read: ReadLog,
    distinct: DistinctIds,
    insert: Callable[[Mapping[str, np.ndarray]], list[Dropped]],
    config: Config,
    spec: FeatureSpec,
) -> Log:
    """Gives the ids of a log their codes, has its rows inserted, and collects users and items.

    Args:
        database: Database in which the rows are then.
        read: The log as it was read.
        distinct: Its distinct ids.
        insert: Function that makes the table `log` of the rows that have a user and an item, and
            returns notes on the others. Its argument has by key the code of each distinct id, int32
            [D + 1], -1 of what counts as missing and at the end.
        config: Configuration of a run.
        spec: Features of the run.

    Raises:
        ConfigError: The data can only be a mistake.
    """
    forms = {}
    written = {}
    # Forms are those of all distinct ids, which fit into memory where the rows do not.
    for key in KEYS:
        values = distinct.ids(key)
        forms[key] = IdForm.find(values)
        written[key] = written_forms(values)
    contract = Contract(**forms, time=read.contract.time, written=written)
    # After the log, whose contract says how their ids are read.
    sides = _side_tables(config, read.kind)
    _, tables, contract = read_tables([], sides, spec.uses(), contract)
    contract = dataclasses.replace(contract, columns={**contract.columns, **read.contract.columns})
    codes = {}
    ids = {}
    for key in KEYS:
        codes[key], ids[key] = _codes_of_texts(distinct, read, contract, key)
    dropped = insert(codes)
    # Of the rows that are left: an id that only dropped rows have makes no user or item.
    of_log = ids
    if dropped:
        of_log = {key: _ids_of_log(database, key, values) for key, values in ids.items()}
    # In the order in which memory notes them, so that both reports are the same.
    skipped = [*read.skipped, *skipped_rows(sides)]
    dataset = make_dataset(
        coded_schema(read.columns.schema, ids),
        of_log,
        {raw.name: table for raw, table in zip(sides, tables, strict=True)},
        contract,
        config.data.accept,
        dropped=[*skipped, *dropped],
    )
    return Log(dataset, read.columns.names, ids)


def make_dataset(
    schema: pa.Schema,
    of_log: Mapping[str, pa.Array],
    tables: Mapping[str, pa.Table],
    contract: Contract,
    accept: Sequence[str],
    *,
    dropped: Sequence[Dropped],
) -> Dataset:
    """Returns a log but for its rows, with the tables of its users and items.

    Args:
        schema: Schema of the rows, with ids as codes.
        of_log: "user_id" and "item_id" -> ids of the rows, in order of first appearance.
        tables: "user_table" and "item_table" -> table with our names and types, of those there are.
        contract: Contract of the log.
        accept: Option `config.data.accept`.
        dropped: Notes on the rows that were left out.

    Raises:
        ConfigError: A table has next to none of the ids of the log.
    """
    notes: list[Dropped] = []
    found = []
    warnings = []
    entities = {}
    sides: dict[str, Literal["user", "item"]] = {"user_id": "user", "item_id": "item"}
    for key, side in sides.items():
        ids = pa.chunked_array([of_log[key]])
        entities[key] = collect_entities(tables.get(f"{side}_table"), ids, side, notes, found)
    check_matches(found, accept)
    for key, side in sides.items():
        if getattr(contract, key) is IdForm.TEXT:
            warnings += near_equal_ids(entities[key][key], side)
    return Dataset(
        interactions=schema.empty_table(),
        users=entities["user_id"],
        items=entities["item_id"],
        has_catalogue="item_table" in tables,
        dropped=(*dropped, *notes),
        matches=tuple(found),
        warnings=tuple(warnings),
        contract=contract,
    )


def _read_or_find(reader: _Reader, folder: Path) -> WrittenRows:
    """Returns the rows of a log, of an earlier try where that had read them all."""
    stages = Stages(folder)
    state = stages.find("rows")
    if state is not None:
        return reader.restore(folder / SCRATCH, state)
    rows = reader.read(folder / SCRATCH)
    stages.finish("rows", rows.files, reader.state())
    return rows


class _Reader:
    """Rows of the log, on their way from its files to those of the folder; it is a `ReadLog`."""

    def __init__(self, readings: Sequence[LogReading]):
        self._readings = readings
        # The log itself, whose forms are those of its held-out rows.
        self._reading = readings[0]
        self.kind: Kind = self._reading.kind
        # Row of the log at which each file begins, and its path.
        self._files: list[tuple[int, str]] = []
        self._rows = 0
        self.contract = Contract()
        self.columns = Columns("duckdb", self._reading.divided_by)
        self.skipped: list[Dropped] = []
        # Distinct ids of each block by key.
        self._sizes: dict[str, list[int]] = {}

    def read(self, scratch: Path) -> WrittenRows:
        """Reads all files, and returns the rows.

        Args:
            scratch: Folder to keep the rows in.

        Raises:
            ConfigError: They cannot be read, or have no rows.
        """
        writer = RowWriter(scratch)
        for reading in self._readings:
            self._read_table(reading, writer)
        self._sizes = writer.finish()
        return WrittenRows(scratch, self._sizes)

    def _read_table(self, reading: LogReading, writer: RowWriter) -> None:
        """Reads the files of one table of the log."""
        begin = self._rows
        skipped = 0
        locations: list[str] = []
        table = reading.table
        for path, event in files.find_event_files(table, reading.name, self.kind):
            self._files.append((self._rows, str(path)))
            pieces = files.read_pieces(path, table, reading.name, self.kind)
            total = files.estimate_pieces(path)
            for part in progress(pieces, total=total, what=f"reading {path.name}", seconds=10.0):
                if part.rows is not None and len(part.rows.skipped):
                    skipped += len(part.rows.skipped)
                    lines = part.rows.skipped_lines(SHOWN - len(locations))
                    locations += [f"{path}, line {line}" for line in lines]
                if event:
                    part = files.with_event(part, event, reading.name)
                if len(part.table):
                    self._add(part, reading, writer)
        if self._rows == begin:
            raise without_rows(table.path, reading.name)
        if skipped:
            self.skipped.append(note_skipped(skipped, self._rows - begin, locations))

    def state(self) -> dict[str, Any]:
        """Returns what was found when the files were read, as values of JSON."""
        time = self.contract.time
        return {
            "files": self._files,
            "rows": self._rows,
            "sizes": self._sizes,
            "contract": self.contract.to_dict(),
            # Of no matter to a contract, but told when times are refused.
            "time": {"is_typed": time.is_typed, "is_text": time.is_text},
            "schema": schema_to_text(self.columns.schema),
            "skipped": [dataclasses.asdict(note) for note in self.skipped],
        }

    def restore(self, scratch: Path, state: Mapping[str, Any]) -> WrittenRows:
        """Takes over what another reader has found, and returns its rows.

        Args:
            scratch: Folder that it kept them in.
            state: Its `state`.
        """
        self._files = [(row, path) for row, path in state["files"]]
        self._rows = state["rows"]
        self._sizes = state["sizes"]
        contract = Contract.from_dict(state["contract"])
        time = dataclasses.replace(contract.time, **state["time"])
        self.contract = dataclasses.replace(contract, time=time)
        self.columns.begin(schema_from_text(state["schema"]), self._files[0][1])
        for note in state["skipped"]:
            self.skipped.append(Dropped(**{**note, "locations": tuple(note["locations"])}))
        return WrittenRows(scratch, self._sizes)

    def locate(self, position: int) -> str:
        """Returns file and row of a position in the log."""
        # The last one of those that begin there: the files before it are without rows.
        first, path = next(file for file in reversed(self._files) if file[0] <= position)
        return f"{path}, row {position - first + 1}"

    def raw(self, rows: pa.Table) -> RawTable:
        """See `ReadLog`."""
        origin = Origin(self._files[-1][1], self.locate, is_typed=self.kind != "csv")
        return RawTable(rows, self._reading.table, "interactions", origin)

    def _add(self, part: files.TableFile, reading: LogReading, writer: RowWriter) -> None:
        name = self._files[-1][1]
        # Piece by piece, with the file and line of each row for messages.
        origin = Origin(name, functools.partial(locate_in, part), is_typed=self.kind != "csv")
        time = self.contract.time
        rows, self.contract, failed = reading.read(part.table, origin, self.contract)
        # The form of the times is that of the log itself.
        if reading is not self._reading:
            self.contract = dataclasses.replace(self.contract, time=time)
        if not self._rows:
            self.columns.begin(rows.schema, name)
        self.columns.widen(rows.schema, name, is_text=part.kind == "csv")
        # Large whole numbers are rounded, as they are where all of the column is read at once.
        writer.write(rows.cast(self.columns.schema, safe=False), failed)
        self._rows += len(rows)


def _side_tables(config: Config, kind: Kind) -> list[RawTable]:
    """Returns the tables of users and items, which fit into memory."""
    tables = []
    for name in ("user_table", "item_table"):
        options: TableConfig = getattr(config.data, name)
        if options.path or options.event_files:
            rows, origin = files.read(options, name, kind=kind)
            tables.append(RawTable(rows, options, name, origin))
    return tables


def _codes_of_texts(
    distinct: DistinctIds, read: ReadLog, contract: Contract, key: str
) -> tuple[np.ndarray, pa.Array]:
    """Reads the distinct ids of the log by the form that all of them have.

    Args:
        distinct: Distinct ids of the log.
        read: The log as it was read, for messages.
        contract: Form of the ids.
        key: "user_id" or "item_id".

    Returns:
        Code of the text of each distinct id, int32 [D + 1], -1 of what counts as missing and at the
        end; and the texts by code.
    """
    values = distinct.ids(key)
    try:
        texts = contract.ids(key, values)
    except BadValue as error:
        # The row of a distinct id is that of its first appearance.
        if error.row is not None:
            error.row = distinct.first_row(key, error.row)
        raise read.raw(pa.table({key: values})).refusal(error, key) from None
    # Of several spellings of an id the first decides its code, as in a log in memory.
    codes, by_code = codes_and_values(encode(texts))
    return np.append(codes, np.int32(-1)), by_code


def _blocks(
    rows: WrittenRows, columns: Columns, codes: Mapping[str, np.ndarray]
) -> Iterator[pa.Table]:
    """Yields rows as those of the table `log`; the code of an id that is missing is -1."""
    kinds = {columns.names[name]: kind for name, kind in _types(columns.schema)}
    first = 0
    for block, numbers in rows.blocks():
        table = {"position": np.arange(first, first + len(block))}
        for key, column in zip(KEYS, ("u", "i"), strict=True):
            table[column] = codes[key][numbers[key]]
        for name, kind in kinds.items():
            # Whole numbers until a later block had another one.
            table[name] = block[name].cast(kind, safe=False)
        table["failed"] = block["failed"]
        yield pa.table(table)
        first += len(block)


def insert_rows(database: Database, blocks: Iterable[pa.Table]) -> list[Dropped]:
    """Makes the table `log` of the rows that have ids, and returns notes on the others.

    Args:
        database: Database to make it in.
        blocks: All rows in any order, with the columns of the table; the code of an id that is
            missing is -1.

    Raises:
        ConfigError: No row has both ids.
    """
    total = 0
    # Users first, as in memory: a row without both counts as one without a user.
    missing = dict.fromkeys(KEYS, 0)
    is_empty = True
    for block in blocks:
        total += len(block)
        user, item = (block[column].to_numpy() for column in ("u", "i"))
        missing["user_id"] += int((user < 0).sum())
        missing["item_id"] += int(((user >= 0) & (item < 0)).sum())
        has_ids = (user >= 0) & (item >= 0)
        if not has_ids.all():
            block = block.filter(pa.array(has_ids))
        if is_empty:
            database.create("log", block)
        else:
            database.insert("log", block)
        is_empty = False
    dropped = []
    left = total
    for key, count in missing.items():
        if count:
            dropped.append(Dropped(f"without {key}", count, left))
            left -= count
    if not left:
        raise none_with_ids(total)
    return dropped


def none_with_ids(total: int) -> ConfigError:
    """Returns the error of a log of `total` rows none of which has both ids."""
    return ConfigError(
        f"interactions: none of {total} rows has both a user_id and an item_id; check "
        "config.data.interactions.columns, which maps them to columns of the file."
    )


def _types(schema: pa.Schema) -> Iterator[tuple[str, pa.DataType]]:
    """Yields name and type of the columns that are no ids."""
    for field in schema:
        if field.name not in KEYS:
            yield field.name, field.type


def _ids_of_log(database: Database, key: str, values: pa.Array) -> pa.Array:
    """Returns the ids that rows of the log have, in order of first appearance."""
    column = "u" if key == "user_id" else "i"
    codes = database.table(
        f"SELECT {column} AS code, min(position) AS first FROM log GROUP BY code ORDER BY first"
    )
    return values.take(join_chunks(codes["code"]))


def coded_schema(schema: pa.Schema, ids: dict[str, pa.Array]) -> pa.Schema:
    """Returns the schema of the rows with codes in the place of ids."""
    for key, values in ids.items():
        coded = pa.dictionary(pa.int32(), values.type)
        schema = schema.set(schema.names.index(key), pa.field(key, coded))
    return schema

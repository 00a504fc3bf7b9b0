"""Reads a log in pieces into a database, and gives its ids the codes that a log in memory has."""

from __future__ import annotations

import base64
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from twotower.config import Config, TableConfig
from twotower.core.arrow import BadValue, join_chunks, plain_text
from twotower.core.codes import codes_and_values, encode
from twotower.core.errors import ConfigError
from twotower.core.ids import IdForm, written_forms
from twotower.core.progress import progress
from twotower.data.contract import KEYS, Contract, Uses
from twotower.data.dataset import Dataset, Dropped, collect_entities
from twotower.data.filters import with_separator
from twotower.data.matching import check_matches
from twotower.data.operators import matches
from twotower.data.sources import files
from twotower.data.sources.content import Kind
from twotower.data.sources.load import skipped_rows
from twotower.data.tables import (
    Origin,
    RawTable,
    log_column,
    near_equal_ids,
    read_tables,
    read_uses,
)
from twotower.features.spec import FeatureSpec
from twotower.pipeline.describe import list_separators
from twotower.pipeline.engines.database import Database
from twotower.pipeline.engines.kept.rows import Rows, RowWriter
from twotower.pipeline.engines.kept.stages import SCRATCH, Stages

# Names of the source whose files are Parquet.
PARQUET = ("parquet", "arrow", "pq")
# File and line of bad rows that a report shows.
_SHOWN = 5


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
    uses = spec.uses()
    reader = _Reader(config, uses, list_separators(spec))
    rows = _read_or_find(reader, folder)
    forms = {}
    written = {}
    # Forms are those of all distinct ids, which fit into memory where the rows do not.
    for key in KEYS:
        distinct = rows.ids(key)
        forms[key] = IdForm.find(distinct)
        written[key] = written_forms(distinct)
    contract = Contract(**forms, time=reader.contract.time, written=written)
    # After the log, whose contract says how their ids are read.
    sides = _side_tables(config, reader.kind)
    _, tables, contract = read_tables([], sides, uses, contract)
    contract = dataclasses.replace(
        contract, columns={**contract.columns, **reader.contract.columns}
    )
    codes = {}
    ids = {}
    for key in KEYS:
        codes[key], ids[key] = _codes_of_texts(rows, reader, contract, key)
    dropped = _insert_rows(database, rows, reader, codes)
    # Of the rows that are left: an id that only dropped rows have makes no user or item.
    of_log = ids
    if dropped:
        of_log = {key: _ids_of_log(database, key, values) for key, values in ids.items()}
    # In the order in which memory notes them, so that both reports are the same.
    skipped = skipped_rows(sides)
    if reader.skipped is not None:
        skipped = [reader.skipped, *skipped]
    dataset = make_dataset(
        coded_schema(reader.schema, ids),
        of_log,
        {raw.name: table for raw, table in zip(sides, tables, strict=True)},
        contract,
        config.data.accept,
        dropped=[*skipped, *dropped],
    )
    return Log(dataset, reader.columns, ids)


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


def _read_or_find(reader: _Reader, folder: Path) -> Rows:
    """Returns the rows of a log, of an earlier try where that had read them all."""
    stages = Stages(folder)
    state = stages.find("rows")
    if state is not None:
        return reader.restore(folder / SCRATCH, state)
    rows = reader.read(folder / SCRATCH)
    stages.finish("rows", rows.files, reader.state())
    return rows


class _Reader:
    """The rows of the log, on their way from its files to those of the folder.

    Attributes:
        kind: Kind of files whose name does not tell.
        contract: Forms of the times, and of the columns that are used as numbers.
        schema: Schema of the rows under our names, with ids as the files have them.
        columns: Column that is no id -> its column in the database.
        skipped: Note on the rows that were left out; None where there are none.
    """

    def __init__(self, config: Config, uses: Uses, separators: dict[str, str]):
        data = config.data
        # `config.data.path` is a short form, as for a log in memory.
        path = data.path or data.interactions.path
        self._config = dataclasses.replace(data.interactions, path=path)
        self.kind: Kind = "csv"
        if data.source in PARQUET:
            self.kind = "parquet"
        self._uses = uses
        self._where = []
        for number, condition in enumerate(data.where):
            field = f"config.data.where[{number}]={condition!r}"
            self._where.append((with_separator(condition, field, separators), field))
        # Row of the log at which each file begins, and its path.
        self._files: list[tuple[int, str]] = []
        self._rows = 0
        self.contract = Contract()
        self.schema: pa.Schema = pa.schema([])
        self.columns: dict[str, str] = {}
        self.skipped: Dropped | None = None
        # Distinct ids of each block by key.
        self._sizes: dict[str, list[int]] = {}

    def read(self, scratch: Path) -> Rows:
        """Reads all files, and returns the rows.

        Args:
            scratch: Folder to keep the rows in.

        Raises:
            ConfigError: They cannot be read, or have no rows.
        """
        writer = RowWriter(scratch)
        skipped = 0
        places: list[str] = []
        for path, event in files.find_event_files(self._config, "interactions", self.kind):
            self._files.append((self._rows, str(path)))
            pieces = files.read_pieces(path, self._config, "interactions", self.kind)
            total = files.estimate_pieces(path)
            for part in progress(pieces, total=total, what=f"reading {path.name}", seconds=10.0):
                if part.rows is not None and len(part.rows.skipped):
                    skipped += len(part.rows.skipped)
                    lines = part.rows.skipped_lines(_SHOWN - len(places))
                    places += [f"{path}, line {line}" for line in lines]
                if event:
                    part = files.with_event(part, event, "interactions")
                if len(part.table):
                    self._add(part, writer)
        if not self._rows:
            raise ConfigError(
                f"interactions: {self._config.path} has no rows; config.data.interactions.path "
                "must name a file with data."
            )
        if skipped:
            self.skipped = note_skipped(skipped, self._rows, places)
        self._sizes = writer.finish()
        return Rows(scratch, self._sizes)

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
            "schema": base64.b64encode(self.schema.serialize()).decode(),
            "skipped": None if self.skipped is None else dataclasses.asdict(self.skipped),
        }

    def restore(self, scratch: Path, state: Mapping[str, Any]) -> Rows:
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
        self.schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(state["schema"])))
        self._name_columns()
        skipped = state["skipped"]
        if skipped is not None:
            self.skipped = Dropped(**{**skipped, "places": tuple(skipped["places"])})
        return Rows(scratch, self._sizes)

    def place(self, position: int) -> str:
        """Returns file and row of a position in the log."""
        # The last one of those that begin there: the files before it are without rows.
        first, path = next(file for file in reversed(self._files) if file[0] <= position)
        return f"{path}, row {position - first + 1}"

    def raw(self, rows: pa.Table, describe_row: functools.partial | None = None) -> RawTable:
        """Returns rows as those of the table of the log."""
        name = self._files[-1][1]
        origin = Origin(name, describe_row or self.place, is_typed=self.kind != "csv")
        return RawTable(rows, self._config, "interactions", origin)

    def _add(self, part: files.Part, writer: RowWriter) -> None:
        describe = functools.partial(_place, part)
        # Piece by piece, with the file and line of each row for messages.
        raw = self.raw(part.table, describe).with_our_names()
        rows, self.contract = _typed(raw, self._uses, self.contract)
        # While the columns have Arrow's types: conditions mean the same in both engines.
        failed = _first_failed(rows, self._where)
        if not self._rows:
            self._begin(rows)
        writer.write(self._as_known(rows, part), failed)
        self._rows += len(rows)

    def _begin(self, rows: pa.Table) -> None:
        for field in rows.schema:
            # UUIDs are known as ids, which become text.
            kind = field.type.storage_type if _is_uuid_id(field) else field.type
            if not _is_kept(kind):
                raise ConfigError(
                    f"interactions: the column {field.name!r} of {self._files[-1][1]} is of type "
                    f"{field.type}, which --engine=duckdb does not keep: write it with another "
                    "type, leave it out, or use --engine=memory."
                )
        self.schema = rows.schema
        self._name_columns()
        if "timestamp" not in self.columns:
            raise ConfigError(
                "config.data.interactions: the log has no column 'timestamp', without which "
                "--engine=duckdb does not order it: use --engine=memory."
            )

    def _name_columns(self) -> None:
        others = [name for name in self.schema.names if name not in KEYS]
        # Names of their own: those of the files may differ by their case alone.
        self.columns = {name: f"c{number}" for number, name in enumerate(others)}

    def _as_known(self, rows: pa.Table, part: files.Part) -> pa.Table:
        """Returns rows with the columns and types of those before."""
        if rows.schema.equals(self.schema):
            return rows
        # A database has one table: filling columns in would be a second way to join files.
        if rows.column_names != self.schema.names:
            raise ConfigError(
                f"interactions: {self._files[-1][1]} has the columns "
                f"{', '.join(rows.column_names)}, and the files before {', '.join(self.columns)}: "
                "use --engine=memory, which fills what is missing."
            )
        for name in rows.column_names:
            before = self.schema.field(name).type
            now = rows[name].type
            # Of text what follows may be no whole number; files of Parquet chose their types.
            is_number = name == "weight" or (part.kind == "csv" and name not in KEYS)
            is_joined = is_number and {before, now} == {pa.int64(), pa.float64()}
            if before != now and not is_joined:
                raise ConfigError(
                    f"interactions: the column {name!r} is {now} in {self._files[-1][1]}, and "
                    f"{before} in the files before: write it with one type, or use --engine=memory."
                )
            # Whole numbers until the first that is none.
            if before == pa.int64() and now == pa.float64():
                number = self.schema.names.index(name)
                self.schema = self.schema.set(number, pa.field(name, now))
        # Large whole numbers are rounded, as they are where all of the column is read at once.
        return rows.cast(self.schema, safe=False)


def _is_uuid_id(field: pa.Field) -> bool:
    return field.name in KEYS and field.type == pa.uuid()


def _is_kept(kind: pa.DataType) -> bool:
    """Returns whether values of a type come out of the database as they went in."""
    lost = (
        pa.types.is_decimal256,
        pa.types.is_float16,
        pa.types.is_duration,
        pa.types.is_interval,
        lambda kind: isinstance(kind, pa.BaseExtensionType),
    )
    if any(is_lost(kind) for is_lost in lost):
        return False
    # Those of lists and structs, which are nested to any depth.
    inner = [kind.field(number).type for number in range(kind.num_fields)]
    # A dictionary inside of another column does not come back as one.
    return all(_is_kept(each) and not pa.types.is_dictionary(each) for each in inner)


def note_skipped(count: int, rows: int, places: Sequence[str]) -> Dropped:
    """Returns the note on rows of the log that were left out when it was read."""
    origin = Origin("", str, is_typed=False, skipped=count, skipped_places=tuple(places))
    # As if all rows were one table in memory: the words of the note are then the same.
    table = pa.table({"row": pa.nulls(rows)})
    (note,) = skipped_rows([RawTable(table, TableConfig(), "interactions", origin)])
    return note


def _place(part: files.Part, row: int) -> str:
    return f"{part.path}, {part.place(row)}"


def _typed(raw: RawTable, uses: Uses, contract: Contract) -> tuple[pa.Table, Contract]:
    """Returns rows of the log with our types but for their ids, and the contract with its forms."""
    contract = dataclasses.replace(contract, time=raw.time)
    typed = {}
    for name in raw.rows.column_names:
        values = plain_text(raw.rows[name])
        # Ids stay as the file has them: their form is known when all of them are.
        if name not in KEYS:
            try:
                values = log_column(name, values, contract, raw)
            except BadValue as error:
                raise raw.refusal(error, name) from None
        typed[name] = values
    table, contract = read_uses(pa.table(typed), "user", uses, contract, raw)
    return read_uses(table, "log", uses, contract, raw)


def _first_failed(rows: pa.Table, conditions: Sequence[tuple[tuple, str]]) -> np.ndarray:
    """Returns the number of the first condition that each row fails, int16 [N]; the number of
    conditions where it fails none."""
    failed = np.full(len(rows), len(conditions), np.int16)
    # Backwards, so that the first one is written last.
    for number, (condition, field) in reversed(list(enumerate(conditions))):
        failed[~np.asarray(matches(rows, condition, field=field))] = number
    return failed


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
    rows: Rows, reader: _Reader, contract: Contract, key: str
) -> tuple[np.ndarray, pa.Array]:
    """Reads the distinct ids of the log by the form that all of them have.

    Args:
        rows: Rows of the log.
        reader: Reader of the log, for messages.
        contract: Form of the ids.
        key: "user_id" or "item_id".

    Returns:
        Code of the text of each distinct id, int32 [D + 1], -1 of what counts as missing and at the
        end; and the texts by code.
    """
    distinct = rows.ids(key)
    try:
        texts = contract.ids(key, distinct)
    except BadValue as error:
        # The row of a distinct id is that of its first appearance.
        if error.row is not None:
            error.row = rows.first_row(key, error.row)
        raise reader.raw(pa.table({key: distinct})).refusal(error, key) from None
    # Of several spellings of an id the first decides its code, as in a log in memory.
    codes, values = codes_and_values(encode(texts))
    return np.append(codes, np.int32(-1)), values


def _insert_rows(
    database: Database, rows: Rows, reader: _Reader, codes: Mapping[str, np.ndarray]
) -> list[Dropped]:
    """Makes the table `log` of the rows that have ids, and returns notes on the others."""
    total = 0
    # Users first, as in memory: a row without both counts as one without a user.
    missing = dict.fromkeys(KEYS, 0)
    kinds = {reader.columns[name]: kind for name, kind in _types(reader.schema)}
    is_empty = True
    for block, numbers in rows.blocks():
        position = np.arange(total, total + len(block))
        total += len(block)
        user, item = (codes[key][numbers[key]] for key in KEYS)
        missing["user_id"] += int((user < 0).sum())
        missing["item_id"] += int(((user >= 0) & (item < 0)).sum())
        columns = {"position": position, "u": user, "i": item}
        for name, kind in kinds.items():
            # Whole numbers until a later block had another one.
            columns[name] = block[name].cast(kind, safe=False)
        columns["failed"] = block["failed"]
        table = pa.table(columns)
        has_ids = (user >= 0) & (item >= 0)
        if not has_ids.all():
            table = table.filter(pa.array(has_ids))
        if is_empty:
            database.create("log", table)
        else:
            database.insert("log", table)
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

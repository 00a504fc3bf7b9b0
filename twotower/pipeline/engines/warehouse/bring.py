"""The engine "bigquery": a script in the warehouse filters, orders, codes and divides a log.

Its rows come over with their codes and parts, and are written as those of the other engines are.

Rows have the order that `twotower.data.sources.bigquery.sort_rows` gives them in memory.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow as pa
from absl import logging

from twotower.config import Config, TableConfig
from twotower.core.arrow import BadValue, join_chunks, pc, plain_text
from twotower.core.errors import ConfigError
from twotower.core.ids import IdForm, written_forms
from twotower.data.contract import KEYS, Contract, Uses
from twotower.data.dataset import Dropped
from twotower.data.filters import describe_absent_values
from twotower.data.interactions import missing_times
from twotower.data.nested import expand_objects
from twotower.data.sources.bigquery import make_client, read_raw, sort_rows
from twotower.data.tables import Origin, RawTable, log_column, read_tables, read_uses
from twotower.features.spec import FeatureSpec, load_spec
from twotower.pipeline.describe import list_separators
from twotower.pipeline.engines.database import Database
from twotower.pipeline.engines.divide import check_split, split_log
from twotower.pipeline.engines.kept.stages import SCRATCH
from twotower.pipeline.engines.log import Log, coded_schema, make_dataset, none_with_ids
from twotower.pipeline.engines.rows import check_filtered
from twotower.pipeline.engines.supported import check_supported
from twotower.pipeline.engines.warehouse.columns import Column, find_columns
from twotower.pipeline.engines.warehouse.jobs import Warehouse
from twotower.pipeline.engines.warehouse.script import (
    Tables,
    divides,
    write_export,
    write_script,
)
from twotower.pipeline.engines.writer import write_folder
from twotower.pipeline.event_weights import with_event_weights
from twotower.pipeline.labels import label_uses


def prepare_in_warehouse(
    config: Config, folder: Path, memory: int, *, tables: str, export: str = ""
) -> None:
    """Prepares a log into a folder, and leaves its rows and codes as tables of BigQuery.

    Args:
        config: Configuration whose data, split, features and labels are prepared.
        folder: Folder to write to, with the folder `SCRATCH` in it.
        memory: Memory in bytes that the process keeps to, as long as users and items leave room.
        tables: DATASET.NAME, the beginning of the names of the tables.
        export: Folder of a bucket, gs://BUCKET/FOLDER, by way of which rows come over as Parquet;
            empty for the pages of BigQuery's own interface.

    Raises:
        ConfigError: The data cannot be used, an option is not done here, or BigQuery refuses.
        OSError: The disk is full.
    """
    plan = plan_script(config, tables, export)
    logging.info("BigQuery reads %.3f GB of %s.", plan.bytes / 1e9, plan.origin.name)

    def bring(database: Database) -> Log:
        plan.warehouse.run(plan.script)
        return _Reader(plan, config, folder / SCRATCH).read(database)

    write_folder(bring, config, plan.spec, folder, memory)


@dataclasses.dataclass(frozen=True)
class WarehouseJob:
    """A script for a configuration, and what it was made of.

    Attributes:
        script: SQL, which a person may run as well.
        warehouse: Client that runs it.
        origin: Source of the log, for messages.
        schema: Name -> type of each column of the source.
        columns: Columns of the log beside its ids.
        tables: Tables that the script leaves.
        export: Address that the script writes Parquet to; empty for none.
        spec: Features of the run.
        uses: Columns that features and labels read as numbers, times or labels.
        bytes: Bytes of the source that the script reads.
    """

    script: str
    warehouse: Warehouse
    origin: Origin
    schema: dict[str, str]
    columns: list[Column]
    tables: Tables
    export: str
    spec: FeatureSpec
    uses: Uses
    bytes: int


def plan_script(config: Config, tables: str, export: str = "") -> WarehouseJob:
    """Writes the script for a configuration; BigQuery is asked for the columns of the source alone.

    Args:
        config: Configuration of a run.
        tables: DATASET.NAME, the beginning of the names of the tables.
        export: Folder of a bucket, or empty.

    Raises:
        ConfigError: An option is not done here, or BigQuery refuses the source.
    """
    spec = with_event_weights(load_spec(config.features), config)
    check_supported(config, spec, "bigquery")
    if export and not export.startswith("gs://"):
        raise ConfigError(f"--export={export!r} must be a folder of a bucket, gs://BUCKET/FOLDER.")
    data = config.data
    warehouse = Warehouse(make_client(data.project, data.location))
    names = Tables.parse(tables, warehouse.project)
    log = dataclasses.replace(data.interactions, path=data.path or data.interactions.path)
    source = warehouse.find_source(log)
    origin = Origin(source.name, lambda row: f"{source.name}, row {row + 1}", is_typed=True)
    uses = spec.uses() | {"log": label_uses(config.objective)}
    ids, columns = find_columns(source.schema, log, uses, origin)
    script = write_script(
        data, config.split, source.sql, ids, columns, names, list_separators(spec)
    )
    if export:
        script += write_export(names, export.rstrip("/"))
    return WarehouseJob(
        script, warehouse, origin, source.schema, columns, names, export, spec, uses, source.bytes
    )


class _Reader:
    """The tables that a script has left, on their way into a database."""

    def __init__(self, plan: WarehouseJob, config: Config, scratch: Path):
        self._plan = plan
        self._warehouse = plan.warehouse
        self._data = config.data
        self._split = config.split
        self._scratch = scratch
        path = config.data.path or config.data.interactions.path
        self._config = dataclasses.replace(config.data.interactions, path=path)

    def read(self, database: Database) -> Log:
        """Reads codes and rows, and checks them as those of the other engines are."""
        (counts,) = self._table("counts").to_pylist()
        self._check(counts)
        contract, codes = self._ids(counts)
        uses = self._plan.uses
        sides = self._side_tables()
        _, tables, contract = read_tables([], sides, uses, contract)
        # Of a warehouse they have no order either.
        tables = [sort_rows(table, raw.keys) for raw, table in zip(sides, tables, strict=True)]
        ids = {key: join_chunks(codes[key][key]) for key in KEYS}
        schema, columns, contract = self._rows(database, counts["num_rows"], contract)
        of_log = {key: _ids_of_rows(codes[key], key) for key in KEYS}
        dataset = make_dataset(
            coded_schema(schema, ids),
            of_log,
            dict(zip([raw.name for raw in sides], tables, strict=True)),
            contract,
            self._data.accept,
            dropped=_without_ids(counts),
        )
        log = Log(dataset, columns, ids)
        dropped, warnings = self._filtered(counts)
        log = check_filtered(database, log, self._data, dropped, warnings)
        if not divides(self._split):
            return split_log(database, log, self._split)
        return check_split(database, log, self._split)

    def _table(self, kind: str) -> pa.Table:
        return self._warehouse.read_table(self._plan.tables.name(kind))

    def _raw(self, rows: pa.Table) -> RawTable:
        return RawTable(rows, self._config, "interactions", self._plan.origin)

    def _check(self, counts: dict[str, Any]) -> None:
        """Refuses what can only be a mistake, before a row comes over."""
        total = counts["rows_of_source"]
        if not total:
            raise ConfigError(f"interactions: {self._plan.origin.name} has no rows.")
        if not counts["rows_with_both"]:
            raise none_with_ids(total)
        # Of one user and item a row without a time is neither the first nor the last.
        if counts["rows_without_time"] and self._data.duplicates != "all":
            first = f"in {self._plan.origin.name}"
            left = counts["rows_of_conditions"]
            raise missing_times(counts["rows_without_time"], left, first)
        if counts.get("bad_weights"):
            column = self._config.columns.get("weight", "weight")
            raise ConfigError(
                f"interactions: {self._plan.origin.name}, column {column!r}: "
                f"{counts['bad_weights']:,} of {total:,} weights are below 0 or not finite."
            )

    def _ids(self, counts: dict[str, Any]) -> tuple[Contract, dict[str, pa.Table]]:
        """Returns the contract with the forms of the ids, and the tables of the codes."""
        forms = {}
        written = {}
        codes = {}
        for key, kind in zip(KEYS, ("users", "items"), strict=True):
            path = self._plan.tables.name(kind)
            batches = list(self._warehouse.batches(path, kind, self._plan.export, self._scratch))
            codes[key] = pa.Table.from_batches(batches).sort_by("code")
            has_digits = counts[f"{kind}_are_digits"]
            forms[key] = IdForm.DIGITS if has_digits else IdForm.TEXT
            written[key] = written_forms(codes[key][key])
        contract = Contract(**forms, time=self._raw(pa.table({})).time, written=written)
        for key in KEYS:
            texts = codes[key][key]
            raw = self._raw(codes[key])
            try:
                ours = contract.ids(key, texts)
            except BadValue as error:
                raise raw.refusal(error, key) from None
            # Where the rules of both differ, requests would not find what was trained.
            row = pc.index(pc.equal(ours, texts), False).as_py()
            if row >= 0:
                raise ConfigError(
                    f"interactions: BigQuery reads a {key} as {texts[row].as_py()!r}, and twotower "
                    f"as {ours[row].as_py()!r}: use --engine=memory."
                )
        return contract, codes

    def _side_tables(self) -> list[RawTable]:
        """Returns the tables of users and items, which fit into memory."""
        tables = []
        for name in ("user_table", "item_table"):
            options: TableConfig = getattr(self._data, name)
            if options.path or options.query or options.event_files:
                rows, origin = read_raw(options, name, client=self._warehouse.client)
                tables.append(RawTable(rows, options, name, origin))
        return tables

    def _rows(
        self, database: Database, total: int, contract: Contract
    ) -> tuple[pa.Schema, dict[str, str], Contract]:
        """Makes the table `log`; returns its schema with ids as text, the names of its columns in
        the database, and the contract with the forms of its columns."""
        names = [column.name for column in self._plan.columns]
        columns = {name: f"c{number}" for number, name in enumerate(names)}
        known = pa.schema(
            [
                ("position", pa.int64()),
                ("user_code", pa.int32()),
                ("item_code", pa.int32()),
                *((column.name, column.type) for column in self._plan.columns),
                ("part", pa.int8()),
            ]
        )
        rows, contract = self._typed(known.empty_table().select(names), contract)
        schema = pa.schema([*((key, pa.string()) for key in KEYS), *rows.schema])
        database_names = ["position", "u", "i", *columns.values()]
        if divides(self._split):
            database_names.append("part")
        empty = known.empty_table().select(known.names)
        for number, name in enumerate(names, start=3):
            empty = empty.set_column(number, columns[name], rows[name])
        empty = empty.select(range(len(database_names)))
        database.create("log", empty.rename_columns(database_names))
        path = self._plan.tables.name("rows")
        for batch in self._warehouse.batches(path, "rows", self._plan.export, self._scratch):
            block = pa.Table.from_batches([batch]).select(known.names).cast(known)
            self._refuse_objects(block)
            rows, contract = self._typed(block.select(names), contract)
            ends = [block[name] for name in ("position", "user_code", "item_code")]
            arrays = [*ends, *rows.columns, block["part"]][: len(database_names)]
            database.insert("log", pa.table(arrays, database_names))
        # Parquet of an earlier script may lie beside that of this one.
        found = database.columns(
            f"SELECT count(*), sum(position)::HUGEINT = {total * (total - 1) // 2} FROM log"
        )
        if int(found[0][0]) != total or (total and not found[1][0]):
            raise ConfigError(
                f"{self._plan.export or path}: {int(found[0][0]):,} rows came over, and BigQuery "
                f"has {total:,} of them: empty the folder, or name another one by --export."
            )
        return schema, columns, contract

    def _typed(self, rows: pa.Table, contract: Contract) -> tuple[pa.Table, Contract]:
        """Returns rows with our types; see `twotower.data.tables.read_tables`."""
        raw = self._raw(rows)
        typed = {}
        for name in rows.column_names:
            typed[name] = rows[name]
            # These are seconds already.
            if name != "timestamp":
                typed[name] = log_column(name, plain_text(rows[name]), contract, raw)
        table, contract = read_uses(pa.table(typed), "user", self._plan.uses, contract, raw)
        return read_uses(table, "log", self._plan.uses, contract, raw)

    def _refuse_objects(self, block: pa.Table) -> None:
        """Refuses texts of JSON objects, whose fields are columns in memory."""
        found = set(block.column_names) - set(expand_objects(block, required=set()).column_names)
        if found:
            raise ConfigError(
                f"interactions: the column {min(found)!r} holds JSON objects, which "
                "--engine=bigquery does not read: name their fields by JSON_VALUE in "
                "config.data.interactions.query, or use --engine=memory."
            )

    def _filtered(self, counts: dict[str, Any]) -> tuple[list[Dropped], list[str]]:
        """Returns notes on the rows that filters have dropped, and what is odd about these."""
        data = self._data
        warnings = []
        if data.where and self._plan.tables.sql("values") in self._plan.script:
            values = self._table("values")
            for number, condition in enumerate(data.where):
                of_condition = values.filter(pc.equal(values["condition_number"], number))
                # In the order of the log, as they would be met there.
                texts = of_condition.sort_by("first_row")["value"]
                known = pa.table({condition[0]: texts})
                if len(texts):
                    warnings += describe_absent_values(known, [condition])
        before = counts["rows_with_both"]
        dropped = []
        for number, condition in enumerate(data.where):
            removed = counts[f"failed_{number}"]
            dropped.append(Dropped(f"by where {condition!r}", removed, before))
            before -= removed
        if data.duplicates != "all":
            left = counts["rows_of_pairs"]
            dropped.append(Dropped(f"by duplicates={data.duplicates!r}", before - left, before))
            before = left
        if data.k_core:
            left = counts["num_rows"]
            dropped.append(Dropped(f"by k_core={data.k_core}", before - left, before))
        return dropped, warnings


def _ids_of_rows(codes: pa.Table, key: str) -> pa.Array:
    """Returns the ids that rows with both ids have, in order of first appearance."""
    rows = codes.filter(pc.is_valid(codes["first_whole_row"])).sort_by("first_whole_row")
    return join_chunks(rows[key])


def _without_ids(counts: dict[str, Any]) -> list[Dropped]:
    """Returns notes on rows without ids, as `twotower.data.dataset.assemble` makes them."""
    total = counts["rows_of_source"]
    with_user = counts["rows_with_user"]
    with_both = counts["rows_with_both"]
    dropped = []
    if with_user < total:
        dropped.append(Dropped("without user_id", total - with_user, total))
    if with_both < with_user:
        dropped.append(Dropped("without item_id", with_user - with_both, with_user))
    return dropped

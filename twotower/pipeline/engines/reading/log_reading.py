"""Pieces of a log as an engine reads them: with our names and types, before ids have codes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from twotower.config import Config, DataConfig, SplitConfig, TableConfig
from twotower.core.arrow import BadValue, plain_text
from twotower.core.errors import ConfigError
from twotower.data.contract import KEYS, Contract, Uses
from twotower.data.dataset import Dropped
from twotower.data.filters import with_separator
from twotower.data.operators import matches
from twotower.data.sources import files
from twotower.data.sources.content import Kind
from twotower.data.sources.load import skipped_rows, with_split
from twotower.data.tables import Origin, RawTable, log_column, read_uses
from twotower.features.spec import FeatureSpec
from twotower.pipeline.describe import list_separators
from twotower.pipeline.labels import label_uses

# Names of the source whose files are Parquet.
PARQUET = ("parquet", "arrow", "pq")
# File and line of bad rows that a report shows.
SHOWN = 5


@dataclasses.dataclass(frozen=True)
class LogReading:
    """How the rows of a log are read: the same in every process that reads some of them.

    Attributes:
        table: Options of the table of the log.
        kind: Kind of files whose name does not tell.
        uses: Uses of its columns.
        where: Conditions of `config.data.where`, each with the name of its field.
        divided_by: Option that divides the log by its times; empty for none.
        name: Name of the table in the configuration.
        part: Part that all of its rows belong to; empty where the log is one table.
    """

    table: TableConfig
    kind: Kind
    uses: Uses
    where: Sequence[tuple[tuple, str]]
    divided_by: str = ""
    name: str = "interactions"
    part: str = ""

    @classmethod
    def of(cls, config: Config, spec: FeatureSpec) -> LogReading:
        """Returns how the log of a configuration is read.

        Args:
            config: Configuration of a run.
            spec: Features of the run.
        """
        data = config.data
        # `config.data.path` is a short form, as for a log in memory.
        path = data.path or data.interactions.path
        where = []
        for number, condition in enumerate(data.where):
            field = f"config.data.where[{number}]={condition!r}"
            where.append((with_separator(condition, field, list_separators(spec)), field))
        return cls(
            table=dataclasses.replace(data.interactions, path=path),
            kind="parquet" if data.source in PARQUET else "csv",
            uses=spec.uses() | {"log": label_uses(config.objective)},
            where=where,
            divided_by=_divided_by(config.split),
        )

    def with_held_out(self, data: DataConfig) -> list[LogReading]:
        """Returns how all tables of a log are read: this one, and those of held-out rows."""
        readings = []
        for name in ("validation", "test"):
            table: TableConfig = getattr(data, name)
            if table.path or table.event_files:
                readings.append(dataclasses.replace(self, table=table, name=name, part=name))
        first = dataclasses.replace(self, part="train") if readings else self
        return [first, *readings]

    def read(
        self, rows: pa.Table, origin: Origin, contract: Contract
    ) -> tuple[pa.Table, Contract, np.ndarray]:
        """Gives a piece of the log our names and types but for its ids, which stay as they are.

        Args:
            rows: Rows with the names and types of their source.
            origin: Their source, for messages.
            contract: Forms that the pieces before have.

        Returns:
            The rows; the contract with their forms; and the number of the first condition that each
            row fails, int16 [N], the number of conditions where it fails none.

        Raises:
            ConfigError: A missing column, or a value of the wrong type.
        """
        raw = RawTable(rows, self.table, self.name, origin).with_our_names()
        typed, contract = _typed(raw, self.uses, contract)
        if self.part:
            typed = with_split(typed, self.part)
        # While the columns have Arrow's types: conditions mean the same in every engine.
        return typed, contract, _first_failed(typed, self.where)


def _divided_by(split: SplitConfig) -> str:
    """Returns the option that divides a log by its times; empty where none does."""
    for name in ("kind", "validation_by"):
        if getattr(split, name) == "time":
            return f"config.split.{name}='time'"
    return ""


def without_rows(path: str, name: str = "interactions") -> ConfigError:
    """Returns the error of a table of the log whose files have no rows."""
    return ConfigError(
        f"{name}: {path} has no rows; config.data.{name}.path must name a file with data."
    )


def locate_in(part: files.TableFile, row: int) -> str:
    """Returns file and place of a row of a piece."""
    return f"{part.path}, {part.locate(row)}"


def note_skipped(count: int, rows: int, locations: Sequence[str]) -> Dropped:
    """Returns the note on rows of the log that were left out when it was read."""
    origin = Origin("", str, is_typed=False, skipped=count, skipped_locations=tuple(locations))
    # As if all rows were one table in memory: the words of the note are then the same.
    table = pa.table({"row": pa.nulls(rows)})
    (note,) = skipped_rows([RawTable(table, TableConfig(), "interactions", origin)])
    return note


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
        # These are compared when the form of all ids is known.
        if condition and condition[0] in KEYS:
            continue
        failed[~np.asarray(matches(rows, condition, field=field))] = number
    return failed

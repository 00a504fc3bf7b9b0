"""Columns of a log in BigQuery, and the SQL that reads them as our types."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import pyarrow as pa

from twotower.config import TableConfig
from twotower.core.errors import ConfigError
from twotower.core.times import UNITS_PER_SECOND
from twotower.data.contract import KEYS, Uses
from twotower.data.tables import CODES, Origin, RawTable

# Types of BigQuery that are kept, under the names that its interface and its SQL give them.
_TYPES = {
    "INTEGER": pa.int64(),
    "INT64": pa.int64(),
    "FLOAT": pa.float64(),
    "FLOAT64": pa.float64(),
    "BOOLEAN": pa.bool_(),
    "BOOL": pa.bool_(),
    "STRING": pa.string(),
    "TIMESTAMP": pa.timestamp("us", "UTC"),
    "DATE": pa.date32(),
}
# Types that are times, of which DATETIME has no zone and is UTC.
_TIMES = ("TIMESTAMP", "DATETIME", "DATE")
# Columns that `_rows` has beside those of the log.
_OWN = ("position", "user_code", "item_code", "part")
# Names that every table of BigQuery takes.
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CURE = "leave it out of config.data.interactions.query, or use --engine=memory"


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of the log.

    Attributes:
        name: Our name.
        type: Arrow type of its values in the tables that the script leaves.
        sql: Expression over the columns of the source.
        sorted: Expressions by which rows are ordered where all columns before are equal.
    """

    name: str
    type: pa.DataType
    sql: str
    sorted: Sequence[str] = ()

    @property
    def variable(self) -> str:
        """Name of the column in the temporary tables, where no other begins like it."""
        return f"log_{self.name}"


def find_columns(
    schema: Mapping[str, str], config: TableConfig, uses: Uses, origin: Origin
) -> tuple[dict[str, str], list[Column]]:
    """Finds the columns of the log in its source.

    Args:
        schema: Name -> type of each column of the source, as BigQuery writes them.
        config: Options of the log, which may rename columns.
        uses: Columns that features read as numbers or times.
        origin: Source, for messages.

    Returns:
        "user_id" and "item_id" -> expression of the id as text. The other columns, in the order
        that a log in memory has.

    Raises:
        ConfigError: A column is missing, or of a type that is not kept.
    """
    names = pa.table({name: [name] for name in schema})
    # A row that holds the names themselves tells which of them each of our names has.
    ours = RawTable(names, config, "interactions", origin).with_our_names().rows
    sources: dict[str, str] = {name: ours[name][0].as_py() for name in ours.column_names}
    if "timestamp" not in sources:
        raise ConfigError(
            "config.data.interactions: the log has no column 'timestamp', without which "
            "--engine=bigquery does not order it: use --engine=memory."
        )
    ids = {}
    columns = []
    for name, source in sources.items():
        kind = schema[source]
        if name in KEYS:
            ids[name] = _id(name, source, kind)
        else:
            columns.append(_column(name, source, kind, config))
    _check_names(columns)
    for side in ("user", "log"):
        for name, use in uses.get(side, {}).items():
            # Forms of texts are found on a whole column, which is nowhere but in the warehouse.
            if name in sources and name != "timestamp" and schema[sources[name]] == "STRING":
                raise ConfigError(
                    f"{use.field} reads the column {sources[name]!r} as a {use.kind}, and it is "
                    f"STRING in {origin.name}, which --engine=bigquery does not read: cast it in "
                    "config.data.interactions.query, or use --engine=memory."
                )
    return ids, columns


def quote(name: str) -> str:
    """Returns the name of a column or a table as SQL.

    Raises:
        ConfigError: It holds what would end it.
    """
    if not name or re.search(r"[`\\\x00-\x1f]", name):
        raise ConfigError(f"{name!r} is no name that --engine=bigquery takes.")
    return f"`{name}`"


def _id(name: str, source: str, kind: str) -> str:
    if kind not in ("STRING", "INTEGER", "INT64"):
        raise ConfigError(
            f"interactions: the column {source!r} is {kind}, and --engine=bigquery takes a "
            f"{name} of STRING or INT64: cast it in config.data.interactions.query."
        )
    return f"CAST({quote(source)} AS STRING)"


def _column(name: str, source: str, kind: str, config: TableConfig) -> Column:
    value = quote(source)
    is_number = kind in _TYPES and _TYPES[kind] in (pa.int64(), pa.float64())
    if name == "timestamp":
        return Column(name, pa.int64(), _seconds(source, kind, config))
    if kind not in _TYPES:
        raise ConfigError(
            f"interactions: the column {source!r} is {kind}, which --engine=bigquery does not "
            f"keep: {_CURE}."
        )
    column = Column(name, _TYPES[kind], value)
    # As `twotower.data.tables.log_column` reads them.
    if name in CODES:
        if kind == "STRING":
            column = Column(name, pa.string(), f"NULLIF(NORMALIZE(TRIM({value}), NFC), '')")
        elif _TYPES[kind] == pa.int64():
            column = Column(name, pa.string(), f"CAST({value} AS STRING)")
        else:
            raise ConfigError(
                f"interactions: the column {source!r} is {kind}, and {name!r} is text: cast it in "
                "config.data.interactions.query."
            )
    elif name == "weight" or (name == "rating" and name in config.columns):
        if not is_number:
            raise ConfigError(
                f"interactions: the column {source!r} is {kind}, and {name!r} is a number: cast "
                "it in config.data.interactions.query."
            )
        column = Column(name, pa.float64(), f"CAST({value} AS FLOAT64)")
    variable = column.variable
    ordered = [f"{variable} NULLS LAST"]
    if column.type == pa.float64():
        # NaN comes behind all numbers, as Arrow sorts it; in SQL it would be before them.
        ordered.insert(0, f"IS_NAN({variable}) NULLS LAST")
    return dataclasses.replace(column, sorted=ordered)


def _seconds(source: str, kind: str, config: TableConfig) -> str:
    """Returns a time as seconds since 1970, rounded down."""
    value = quote(source)
    if kind == "TIMESTAMP":
        return f"UNIX_SECONDS({value})"
    if kind in _TIMES:
        return f"UNIX_SECONDS(TIMESTAMP({value}))"
    if kind not in ("INTEGER", "INT64") or config.timestamp_format:
        raise ConfigError(
            f"interactions: the column {source!r} is {kind}, and --engine=bigquery takes a "
            "timestamp of TIMESTAMP, DATETIME, DATE, or INT64 without timestamp_format: parse it "
            "in config.data.interactions.query, or use --engine=memory."
        )
    per_second = UNITS_PER_SECOND[config.timestamp_unit]
    if per_second == 1:
        return value
    # DIV rounds towards 0.
    return f"DIV({value}, {per_second}) - IF(MOD({value}, {per_second}) < 0, 1, 0)"


def _check_names(columns: Sequence[Column]) -> None:
    """Refuses names that a table of BigQuery cannot have beside each other."""
    taken = {name: "a column of the prepared rows" for name in _OWN}
    for column in columns:
        # BigQuery knows no upper and lower case in names.
        folded = column.name.lower()
        problem = ""
        if not _NAME.fullmatch(column.name):
            problem = "has letters that such a name has not"
        elif folded in taken:
            problem = f"is the name of {taken[folded]} too"
        if problem:
            raise ConfigError(
                f"interactions: --engine=bigquery writes a table with the column {column.name!r}, "
                f"which {problem}: name it otherwise in config.data.interactions.query."
            )
        taken[folded] = f"the column {column.name!r}"

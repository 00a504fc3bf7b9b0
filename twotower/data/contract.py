"""The contract of a table: our names and types for its columns, whatever it was read from.

Ids are text, digit for digit; times are seconds; numbers are numbers. What does not match is
refused with its row and column, and the cure.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterable

import pyarrow as pa
from absl import logging

from twotower.config import TableConfig
from twotower.core.arrow import BadValue, pc
from twotower.core.errors import ConfigError
from twotower.core.ids import IdForm
from twotower.core.times import TimeForm
from twotower.data import columns
from twotower.data.nested import expand_objects

# Columns whose names determine their types: a value of another type is an error.
NUMBERS = ("rating", "weight", "label")
CODES = ("event", "split", "user_id", "item_id")
# Milliseconds taken for seconds lie beyond it.
YEAR_5000 = 95_617_584_000  # seconds since the epoch
# Delimiters that a file may have where its rows were read as one column.
SEPARATORS = r"[;\t|,]"


@dataclasses.dataclass(frozen=True)
class Origin:
    """The source of the rows of a table, for messages.

    Attributes:
        name: Name of the source, such as a path.
        describe_row: Function from the number of a row, from 0, to its name in the source.
        is_typed: Whether the columns have types already, as in Parquet; if not, they are text.
    """

    name: str
    describe_row: Callable[[int], str]
    is_typed: bool


def apply_contract(
    table: pa.Table, config: TableConfig, name: str, *, keys: tuple[str, ...], origin: Origin
) -> pa.Table:
    """Gives a table our column names and types.

    Args:
        table: The table as it was read.
        config: Mapping of our names to columns of the source, and the form of times.
        name: Name of the table in the configuration, for messages.
        keys: Columns that it must have; they become strings.
        origin: Source of its rows.

    Returns:
        `keys` as strings, timestamp as int64 seconds, rating, weight and label as float32; other
        columns of text as whole numbers, numbers, booleans or seconds (of times) where all their
        values are, else as strings.

    Raises:
        ConfigError: A missing column, or a value of the wrong type.
    """
    # "metadata.brand" is a field of the column "metadata".
    columns_with_fields = {
        source.split(".")[0] for source in config.columns.values() if "." in source
    }
    try:
        # Before columns are renamed: the mapping may name fields of objects.
        table = expand_objects(table, required=columns_with_fields)
    except BadValue as error:
        raise _refusal(error, name, ", ".join(sorted(columns_with_fields)), origin) from None
    table = _rename(table, config, name, keys, origin)
    typed = {}
    for column in table.column_names:
        try:
            typed[column] = _convert(column, table[column], config, keys, origin.is_typed)
        except BadValue as error:
            source = config.columns.get(column, column)
            raise _refusal(error, name, source, origin) from None
    return pa.table(typed)


def similar_name_hint(name: str, known: Iterable[str]) -> str:
    """Returns " (did you mean 'x'?)" with the known name most like `name`, or nothing.

    >>> similar_name_hint("user_id", ["UserID", "ItemID"])
    " (did you mean 'UserID'?)"
    """
    similar = _similar_name(name, known)
    if not similar:
        return ""
    return f" (did you mean {similar!r}?)"


def _similar_name(name: str, known: Iterable[str]) -> str:
    """Returns the known name most like `name`, whatever its case and separators, or ""."""
    # Of two names that fold to the same, the first one stays in the dict.
    names = {_fold(other): other for other in reversed(list(known))}
    # Half of the letters alike, as in `did_you_mean`.
    close = difflib.get_close_matches(_fold(name), list(names), n=1, cutoff=0.5)
    if not close:
        return ""
    return names[close[0]]


def _fold(name: str) -> str:
    return re.sub(r"\W|_", "", name).lower()


def _refusal(error: BadValue, name: str, column: str, origin: Origin) -> ConfigError:
    if error.row is None:
        return ConfigError(f"{name}: {origin.name}, column {column!r} {error.problem}.")
    row = origin.describe_row(error.row)
    return ConfigError(f"{name}: {row}, column {column!r}: {error.value!r} {error.problem}.")


def _rename(
    table: pa.Table, config: TableConfig, name: str, keys: tuple[str, ...], origin: Origin
) -> pa.Table:
    """Renames the mapped columns to our names, and puts the keys first.

    Other columns keep their names, unless a mapped column has the same one.
    """
    known = table.column_names
    # A key that is not mapped must be there under our own name.
    needed = {key: key for key in keys} | dict(config.columns)
    for ours, theirs in needed.items():
        if theirs not in known:
            similar = similar_name_hint(theirs, known)
            cure = _missing_column_cure(ours, theirs, known, config, name, is_key=ours in keys)
            raise ConfigError(
                f"{name}: {origin.name} has no column {theirs!r}{similar}; {cure}. "
                f"It has: {', '.join(known)}."
            )
    # One source column may have two of our names, such as user_id and a feature.
    mapped = {ours: table[theirs] for ours, theirs in config.columns.items()}
    renamed = set(config.columns.values())
    others = {}
    for column in known:
        if column not in renamed and column not in mapped:
            others[column] = table[column]
    merged = mapped | others
    # Keys first, for readers of a printed table.
    return pa.table({key: merged[key] for key in keys} | merged)


def _missing_column_cure(
    ours: str, theirs: str, known: list[str], config: TableConfig, name: str, *, is_key: bool
) -> str:
    """Returns the cure for a missing column: the option to write into the configuration."""
    field = f"config.data.{name}"
    separator = None
    # A single column whose name holds a separator is a file read with the wrong delimiter.
    if len(known) == 1:
        separator = re.search(SEPARATORS, known[0])
    if separator:
        return (
            f"its fields look separated by {separator[0]!r}: set {field}.delimiter={separator[0]!r}"
        )
    cure = f"{field}.columns[{ours!r}] names it"
    if ours == theirs:
        right = _similar_name(theirs, known) or "ITS NAME IN THE FILE"
        mapping = {**config.columns, ours: right}
        cure = f"say which it is by {field}.columns={mapping!r}"
    # A key cannot be left out, so that cure is not offered.
    if is_key:
        return cure
    without = {column: source for column, source in config.columns.items() if column != ours}
    cure = f"{cure}, or that there is none by {field}.columns={without!r}"
    if ours == "timestamp":
        # All at once: without times the split and the features would be refused one by one.
        cure += (
            ", with config.split.kind='leave_last_out' (each user's last rows, by the order of the "
            "file) or 'random', and without features that read the column 'timestamp'"
        )
    return cure


def _convert(
    name: str,
    values: pa.ChunkedArray,
    config: TableConfig,
    keys: tuple[str, ...],
    is_typed: bool,
) -> pa.ChunkedArray:
    """Returns a column converted to the type that its name stands for."""
    # Apart from other columns, because numbers of a time need its unit.
    if name == "timestamp":
        return _convert_timestamp(values, config)
    if name in keys:
        return IdForm.find(values).column(values)
    values = columns.simplify_type(values)
    if name in NUMBERS:
        # A negative weight would turn the loss around.
        smallest = -math.inf
        if name == "weight":
            smallest = 0.0
        if name == "label":
            values = _read_flags(values)
        return columns.to_numbers(values, smallest=smallest)
    if name in CODES:
        return IdForm.TEXT.column(values)
    # A typed column of text is text on purpose, such as postcodes in a Parquet file.
    if pa.types.is_string(values.type) and not is_typed:
        return columns.infer_type(values, form=config.timestamp_format)
    return values


def _convert_timestamp(values: pa.ChunkedArray, config: TableConfig) -> pa.ChunkedArray:
    unit = config.timestamp_unit
    times = TimeForm(unit, config.timestamp_format).column(values)
    # A warning, not a refusal: times far in the future may be meant.
    latest = pc.max(times).as_py()
    if latest is not None and latest > YEAR_5000:
        logging.warning(
            "timestamp %d is beyond the year 5000: is timestamp_unit=%r right?", latest, unit
        )
    return times


def _read_flags(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns labels written as true and false as booleans; a rating of true stays a mistake."""
    if not pa.types.is_string(values.type):
        return values
    flags = columns.infer_type(values)
    return flags if pa.types.is_boolean(flags.type) else values

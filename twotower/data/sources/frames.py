"""Tables of any kind as Arrow tables: frames of pandas and polars, relations of DuckDB, files."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Protocol, runtime_checkable

import pyarrow as pa

from twotower.config import TableConfig
from twotower.core.errors import ConfigError
from twotower.data.contract import Origin
from twotower.data.sources import content, files

# Separators of CSV files; the one that the first line has most of is taken.
SEPARATORS = (",", ";", "\t", "|")


@runtime_checkable
class ArrowStream(Protocol):
    """A table that hands its rows over by Arrow's PyCapsule interface.

    Frames of pandas (2.2 and later) and polars, tables of Arrow and relations of DuckDB do.
    """

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object: ...


TableLike = ArrowStream | str | os.PathLike[str]


def read_table(source: TableLike, config: TableConfig, name: str) -> tuple[pa.Table, Origin]:
    """Reads a table as it is, under its own names and types.

    Args:
        source: Frame, or path of a CSV or Parquet file, a folder or a glob of such files.
        config: Form of a file's content; of a CSV file with the usual separator, it is found.
        name: Name of the table in messages.

    Returns:
        The table, in which columns of CSV files are text, and its origin.

    Raises:
        ConfigError: It is no table, has no rows, or cannot be read.
    """
    if isinstance(source, (str, os.PathLike)):
        return _read_files(os.fspath(source), config, name)
    table = _plain_types(_from_frame(source, name))
    if not len(table):
        raise ConfigError(f"{name}: the table has no rows.")
    kind = type(source).__module__.partition(".")[0]
    described = f"the {kind} {type(source).__name__} of {name}"
    origin = Origin(
        name=described,
        describe_row=lambda row: f"{described}, row {row} (from 0)",
        is_typed=True,
    )
    return table, origin


def _read_files(path: str, config: TableConfig, name: str) -> tuple[pa.Table, Origin]:
    # `files` reads Parquet by its suffix, and takes anything else for CSV.
    config = dataclasses.replace(config, path=path, columns={})
    first = files.find_files(path, name, "csv")[0]
    if config.delimiter == "," and content.look(first, name, "csv").kind == "csv":
        config = dataclasses.replace(config, delimiter=_find_separator(first))
    return files.read_raw(config, name, "csv")


def _find_separator(path: Path) -> str:
    """Returns the separator of a CSV file."""
    first_line = content.look(path, "", "csv").head().split(b"\n")[0].decode("latin-1")
    # Of equals the comma, which comes first.
    return max(SEPARATORS, key=first_line.count)


def _from_frame(source: object, name: str) -> pa.Table:
    if not isinstance(source, ArrowStream):
        hint = ""
        if hasattr(source, "collect"):
            hint = " Call .collect() on a lazy frame first."
        raise ConfigError(
            f"{name} of type {type(source).__name__!r} is no table: give a frame of pandas (2.2 or "
            f"later) or polars, an Arrow table, or the path of a CSV or Parquet file.{hint}"
        )
    try:
        table = pa.table(source)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        reason = " ".join(map(str, error.args))
        raise ConfigError(
            f"{name}: a column has values of several types ({reason}). Make it one type, such as "
            "text: frame['COLUMN'] = frame['COLUMN'].astype('string')."
        ) from None
    # The index of a pandas frame that has no name holds nothing but row numbers.
    index = [column for column in table.column_names if column.startswith("__index_level_")]
    return table.drop_columns(index).replace_schema_metadata()


def _plain_types(table: pa.Table) -> pa.Table:
    """Returns the table with texts and categories as plain text, which all of Arrow can work on."""
    plain = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        chunks = [_plain(chunk) for chunk in column.chunks]
        # Without a chunk there is nothing that could be of a wrong type.
        plain[str(name)] = pa.chunked_array(chunks) if chunks else column
    return pa.table(plain)


def _plain(array: pa.Array) -> pa.Array:
    kind = array.type
    if pa.types.is_string_view(kind) or pa.types.is_large_string(kind):
        return array.cast(pa.string())
    if isinstance(array, pa.DictionaryArray):
        return _plain(array.dictionary).take(array.indices)
    if isinstance(array, (pa.ListArray, pa.LargeListArray)):
        members = _plain(array.values)
        return type(array).from_arrays(array.offsets, members, mask=array.is_null())
    if isinstance(array, pa.StructArray):
        fields = [_plain(array.field(i)) for i in range(kind.num_fields)]
        names = [field.name for field in kind]
        return pa.StructArray.from_arrays(fields, names, mask=array.is_null())
    return array

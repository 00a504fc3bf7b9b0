"""Tables of any kind as Arrow tables: frames of pandas and polars, relations of DuckDB, files."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

import pyarrow as pa

from twotower.config import TableConfig
from twotower.core.arrow import ArrowStream, BadValue, table_of
from twotower.core.errors import ConfigError
from twotower.data.dialect import FileForm, find_form
from twotower.data.sources import files, lists
from twotower.data.tables import Origin

# Sources whose files are no tables of rows.
LOGS: dict[str, Callable[[TableConfig, str], tuple[pa.Table, Origin]]] = {
    "user_lists": lists.read_user_lists,
    "baskets": lists.read_baskets,
    "matrix": lists.read_matrix,
}

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
    # A text is a path and never data: pandas takes both, and guesses.
    if isinstance(source, (str, os.PathLike)):
        return _read_files(os.fspath(source), config, name)
    table = _from_frame(source, name)
    if not len(table):
        raise ConfigError(f"{name}: the table has no rows.")
    # Frames have no name of their own, and a message must say which table is meant.
    kind = type(source).__module__.partition(".")[0]
    described = f"the {kind} {type(source).__name__} of {name}"
    origin = Origin(
        name=described,
        describe_row=lambda row: f"{described}, row {row} (from 0)",
        is_typed=True,
    )
    return table, origin


def _read_files(path: str, config: TableConfig, name: str) -> tuple[pa.Table, Origin]:
    form = find_form(path, config, name)
    return read_form(form, name)


def read_form(form: FileForm, name: str) -> tuple[pa.Table, Origin]:
    """Reads a file, or several, as its form says: rows as they are, under their own names."""
    # Which column is which is found later.
    config = dataclasses.replace(form.config, columns={})
    if form.source in LOGS:
        return LOGS[form.source](config, name)
    return files.read_raw(config, name, "csv")


def _from_frame(source: object, name: str) -> pa.Table:
    if not isinstance(source, ArrowStream):
        hint = ""
        # Lazy frames of polars have it, and hold no rows yet.
        if hasattr(source, "collect"):
            hint = " Call .collect() on a lazy frame first."
        raise ConfigError(
            f"{name} of type {type(source).__name__!r} is no table: give a frame of pandas (2.2 or "
            f"later) or polars, an Arrow table, or the path of a CSV or Parquet file.{hint}"
        )
    try:
        return table_of(source)
    except BadValue as error:
        raise ConfigError(f"{name}: {error.problem}.") from None

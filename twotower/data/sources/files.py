"""CSV and Parquet files into one Arrow table, or an error with file, row and column."""

from __future__ import annotations

import glob
import io
import os
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pyarrow import csv, parquet

from twotower.config import TableConfig
from twotower.core.errors import ConfigError
from twotower.data.contract import Origin, apply_contract, similar_name_hint

Kind = Literal["csv", "parquet"]

_SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "csv": (".csv", ".tsv", ".txt", ".dat", ".data", ".gz", ".bz2", ".zst"),
    "parquet": (".parquet", ".pq"),
}
# Texts that stand for a missing value: those that pandas knows.
_NULLS = ["", "#N/A", "#NA", "N/A", "NA", "NULL", "NaN", "NaT", "None", "n/a", "nan", "null"]
# Arrow knows delimiters of one character; ASCII's own field separator stands in for longer ones.
_FIELD_SEPARATOR = "\x1f"


def read(config: TableConfig, name: str, *, keys: tuple[str, ...], kind: Kind) -> pa.Table:
    """Reads a table of files, in the order of their names and of their rows.

    Args:
        config: Path of the files, and the form of their content.
        name: Name of the table in the configuration, for messages: interactions, user_table,
            item_table or test.
        keys: Columns that it must have; they become strings.
        kind: Kind of the files whose names do not tell it.

    Returns:
        Columns with the names and types of `apply_contract`.

    Raises:
        ConfigError: No such file, an empty one, a missing column, or a value of the wrong type.
    """
    paths = find_files(config.path, name, kind)
    parts = [_read_file(path, config, name, kind) for path in paths]
    files = _Files(paths, parts)
    if not sum(len(part) for part in parts):
        raise ConfigError(
            f"{name}: {files.name} has no rows; config.data.{name}.path must name a file with data."
        )
    is_typed = _is_parquet(paths[0], kind)
    has_header = not is_typed and not config.names
    origin = Origin(
        name=files.name,
        describe_row=lambda row: files.describe_row(row, has_header=has_header),
        is_typed=is_typed,
    )
    return apply_contract(_concat(parts, name, files), config, name, keys=keys, origin=origin)


def find_files(path: str, name: str, kind: Kind) -> list[Path]:
    """Returns the files of a path, folder or glob, by name.

    Environment variables and ~ are expanded.

    Raises:
        ConfigError: There is no file.
    """
    field = f"config.data.{name}.path"
    if not path:
        raise ConfigError(
            f"{field}={path!r} is empty: it must name a {kind} file, a folder or a glob of such "
            "files."
        )
    expanded = os.path.expanduser(os.path.expandvars(path))
    # A variable that is not set stays in the path as it was written.
    unset = re.search(r"\$\{?(\w+)", expanded)
    if unset and not os.path.exists(expanded):
        raise ConfigError(f"{field}={path!r}: the environment variable {unset[1]} is not set.")
    if os.path.isdir(expanded):
        files = _files_of_folder(Path(expanded), kind)
        if not files:
            suffixes = ", ".join(_SUFFIXES[kind])
            raise ConfigError(
                f"{field}={path!r}: the folder holds no file that ends in {suffixes}."
            )
        return files
    if os.path.exists(expanded):
        return [Path(expanded)]
    files = sorted(Path(match) for match in glob.glob(expanded, recursive=True))
    if not files:
        location = "" if os.path.isabs(expanded) else f" in {os.getcwd()}"
        hint = _similar_file_hint(Path(expanded), kind)
        raise ConfigError(f"{field}={path!r}: there is no such file{location}{hint}.")
    return files


class _Files:
    """The files of a table, which say where a row of the whole table stands.

    Attributes:
        name: The first file, and the number of the others.
    """

    def __init__(self, paths: list[Path], parts: list[pa.Table]):
        self._paths = paths
        self._ends = np.cumsum([len(part) for part in parts])
        others = len(paths) - 1
        self.name = f"{paths[0]} (and {others} more)" if others else str(paths[0])

    def describe_row(self, row: int, *, has_header: bool) -> str:
        """Returns file and row, counted from 1 as a person does, of a row counted from 0."""
        file = int(np.searchsorted(self._ends, row, side="right"))
        first_row = int(self._ends[file - 1]) if file else 0
        number = row - first_row + 1
        line = f" (row {number + 1} with the header)" if has_header else ""
        return f"{self._paths[file]}, row {number}{line}"


def _files_of_folder(folder: Path, kind: Kind) -> list[Path]:
    files = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and _is_data(path.relative_to(folder), kind):
            files.append(path)
    return files


def _similar_file_hint(path: Path, kind: Kind) -> str:
    if not path.parent.is_dir():
        return ""
    neighbours = [other.name for other in path.parent.iterdir() if _is_data(Path(other.name), kind)]
    return similar_name_hint(path.name, neighbours)


def _is_data(path: Path, kind: Kind) -> bool:
    """Returns whether a file is data: neither hidden nor a mark such as Spark's _SUCCESS."""
    is_hidden = any(part[0] in "._" for part in path.parts)
    return not is_hidden and path.name.lower().endswith(_SUFFIXES[kind])


def _is_parquet(path: Path, kind: Kind) -> bool:
    suffix = path.suffix.lower()
    if suffix in _SUFFIXES["parquet"]:
        return True
    return kind == "parquet" and suffix not in _SUFFIXES["csv"]


def _read_file(path: Path, config: TableConfig, name: str, kind: Kind) -> pa.Table:
    if os.path.getsize(path) == 0:
        raise ConfigError(
            f"{name}: {path} is empty (0 bytes); config.data.{name}.path must name a file with "
            "data."
        )
    try:
        if _is_parquet(path, kind):
            return parquet.read_table(path)
        return _read_csv(path, config, name)
    except (pa.ArrowInvalid, OSError, UnicodeError) as error:
        reason = str(error).rstrip(".")
        cure = ""
        if "Empty CSV file" in reason:
            cure = f"; config.data.{name}.path must name a file with data"
        elif "UTF8" in reason:
            cure = f"; set config.data.{name}.encoding, for example to 'latin-1'"
        raise ConfigError(f"{name}: {path} cannot be read: {reason}{cure}.") from error


def _read_csv(path: Path, config: TableConfig, name: str) -> pa.Table:
    """Reads all columns as text.

    Their types are decided over all files at once, and so that a bad value has a row.
    """
    threaded = _csv_options(config, use_threads=True)
    # One thread reads the header, and says in its messages in which row it failed.
    single = _csv_options(config, use_threads=False)
    with csv.open_csv(_csv_input(path, config), **single) as reader:
        header = reader.schema.names
    _check_header(header, path, name)
    convert = csv.ConvertOptions(
        column_types=dict.fromkeys(header, pa.string()),
        strings_can_be_null=True,
        null_values=_NULLS,
    )
    try:
        table = csv.read_csv(_csv_input(path, config), convert_options=convert, **threaded)
    except pa.ArrowInvalid:
        table = csv.read_csv(_csv_input(path, config), convert_options=convert, **single)
    table = table.rename_columns([column.strip() for column in header])
    # A column without a name is the index that pandas writes.
    return table.drop_columns([""]) if "" in table.column_names else table


def _csv_input(path: Path, config: TableConfig) -> str | io.BytesIO:
    """Returns what Arrow reads: the file, or its text with a delimiter of one character."""
    if len(config.delimiter) <= 1:
        return str(path)
    with pa.input_stream(str(path), compression="detect") as stream:
        text = stream.read().decode(config.encoding)
    return io.BytesIO(text.replace(config.delimiter, _FIELD_SEPARATOR).encode())


def _csv_options(config: TableConfig, *, use_threads: bool) -> dict[str, Any]:
    names = list(config.names) or None
    if len(config.delimiter) <= 1:
        encoding = config.encoding
        parse = csv.ParseOptions(delimiter=config.delimiter, newlines_in_values=True)
    else:
        encoding = "utf8"
        # Formats with such delimiters know no quotes: in movies.dat a title may begin with one.
        parse = csv.ParseOptions(delimiter=_FIELD_SEPARATOR, quote_char=False)
    read = csv.ReadOptions(column_names=names, encoding=encoding, use_threads=use_threads)
    return {"read_options": read, "parse_options": parse}


def _check_header(header: list[str], path: Path, name: str) -> None:
    repeated = sorted({column for column in header if header.count(column) > 1})
    if repeated:
        raise ConfigError(
            f"{name}: {path} has several columns named {repeated[0]!r}; names must differ. Its "
            f"header is {header}. If it has no header line, set config.data.{name}.names."
        )


def _concat(parts: list[pa.Table], name: str, files: _Files) -> pa.Table:
    try:
        return pa.concat_tables(parts, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ConfigError(
            f"{name}: the files of {files.name} disagree about a column's type: {error}."
        ) from error

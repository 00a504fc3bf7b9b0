"""Reader of CSV and Parquet files: one Arrow table, or an error with file, row and column."""

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
from twotower.data.sources import named

Kind = Literal["csv", "parquet"]

_SUFFIXES: dict[Kind, tuple[str, ...]] = {
    # Compressed files too: Arrow decompresses them by the suffixes .gz, .bz2 and .zst.
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
            item_table, validation or test.
        keys: Columns that it must have; they become strings.
        kind: Kind of the files whose suffix is of no known kind.

    Returns:
        Columns with the names and types of `apply_contract`.

    Raises:
        ConfigError: No such file, an empty one, a missing column, or a value of the wrong type.
    """
    table, origin = read_raw(config, name, kind)
    return apply_contract(table, config, name, keys=keys, origin=origin)


def read_raw(config: TableConfig, name: str, kind: Kind) -> tuple[pa.Table, Origin]:
    """Reads a table of files with the columns and types that they have.

    Args:
        config: Path of the files, and the form of their content.
        name: Name of the table in the configuration, for messages.
        kind: Kind of the files whose suffix is of no known kind.

    Returns:
        The table, in which columns of CSV files are text, and its origin.

    Raises:
        ConfigError: No such file, an empty one, or one that cannot be read.
    """
    paths = find_files(config.path, name, kind)
    # All at once: types are decided over the whole table, not file by file.
    parts = [_read_file(path, config, name, kind) for path in paths]
    files = _Files(paths, parts)
    if not sum(len(part) for part in parts):
        raise ConfigError(
            f"{name}: {files.name} has no rows; config.data.{name}.path must name a file with data."
        )
    # The first file decides; files of both kinds would not have one contract.
    is_typed = is_parquet(paths[0], kind)
    has_header = not is_typed and not config.names
    origin = Origin(
        name=files.name,
        describe_row=lambda row: files.describe_row(row, has_header=has_header),
        is_typed=is_typed,
    )
    return _concat(parts, name, files), origin


def find_files(path: str, name: str, kind: Kind) -> list[Path]:
    """Returns the files of a path, folder or glob, by name.

    Environment variables and ~ are expanded. dataset:NAME/FILE is a file of a known data set,
    which is downloaded if need be.

    Raises:
        ConfigError: There is no file.
    """
    field = f"config.data.{name}.path"
    if not path:
        raise ConfigError(
            f"{field}={path!r} is empty: it must name a {kind} file, a folder or a glob of such "
            "files."
        )
    if path.startswith(named.PREFIX):
        return [named.find_file(path, field)]
    # Here rather than by a shell: paths come from configuration files.
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
    # Before the glob: a file name may itself contain brackets.
    if os.path.exists(expanded):
        return [Path(expanded)]
    # Sorted, since a glob follows the order of the disk and rows must have one order everywhere.
    files = sorted(Path(match) for match in glob.glob(expanded, recursive=True))
    if not files:
        location = ""
        if not os.path.isabs(expanded):
            location = f" in {os.getcwd()}"
        hint = _similar_file_hint(Path(expanded), kind)
        raise ConfigError(f"{field}={path!r}: there is no such file{location}{hint}.")
    return files


class _Files:
    """The files of a table, by which a row of the whole table is named.

    Attributes:
        name: Path of the first file, and the number of the others.
    """

    def __init__(self, paths: list[Path], parts: list[pa.Table]):
        self._paths = paths
        self._ends = np.cumsum([len(part) for part in parts])
        others = len(paths) - 1
        self.name = str(paths[0])
        if others:
            self.name = f"{paths[0]} (and {others} more)"

    def describe_row(self, row: int, *, has_header: bool) -> str:
        """Returns file and row, counted from 1 as a person does, of a row counted from 0."""
        # "right": a row at the end of one file is the first of the next.
        file = int(np.searchsorted(self._ends, row, side="right"))
        first_row = 0
        if file:
            first_row = int(self._ends[file - 1])
        number = row - first_row + 1
        name = f"{self._paths[file]}, row {number}"
        if has_header:
            # As an editor or a spreadsheet numbers its lines.
            name = f"{name} (row {number + 1} with the header)"
        return name


def _files_of_folder(folder: Path, kind: Kind) -> list[Path]:
    files = []
    # Folders of partitions (day=1/part-0.parquet) are searched too.
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


def is_parquet(path: Path, kind: Kind) -> bool:
    suffix = path.suffix.lower()
    if suffix in _SUFFIXES["parquet"]:
        return True
    return kind == "parquet" and suffix not in _SUFFIXES["csv"]


def _read_file(path: Path, config: TableConfig, name: str, kind: Kind) -> pa.Table:
    # Before Arrow sees it, which reports an empty file in different words by kind.
    if os.path.getsize(path) == 0:
        raise ConfigError(
            f"{name}: {path} is empty (0 bytes); config.data.{name}.path must name a file with "
            "data."
        )
    try:
        if is_parquet(path, kind):
            return parquet.read_table(path)
        return _read_csv(path, config, name)
    # Two common mistakes are recognised by Arrow's words, so that the message names a cure.
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

    Their types are decided later, over all files at once, and so that errors can name the row.
    """
    threaded = _csv_options(config, use_threads=True)
    # A single thread for the header, and for errors: its messages name the row.
    single = _csv_options(config, use_threads=False)
    with csv.open_csv(_csv_input(path, config), **single) as reader:
        header = reader.schema.names
    _check_header(header, path, name)
    # Text even for columns of digits: leading zeros of ids would be lost.
    convert = csv.ConvertOptions(
        column_types=dict.fromkeys(header, pa.string()),
        strings_can_be_null=True,
        null_values=_NULLS,
    )
    try:
        # With threads first; only a file that fails is read again, for the number of the row.
        table = csv.read_csv(_csv_input(path, config), convert_options=convert, **threaded)
    except pa.ArrowInvalid:
        table = csv.read_csv(_csv_input(path, config), convert_options=convert, **single)
    # After reading: Arrow looks columns up by the names in the file, spaces included.
    table = table.rename_columns([column.strip() for column in header])
    # A column without a name is the index that pandas writes.
    if "" in table.column_names:
        table = table.drop_columns([""])
    return table


def _csv_input(path: Path, config: TableConfig) -> str | io.BytesIO:
    """Returns the input of Arrow's reader: the path, or the text with a delimiter of one character.

    Arrow knows no longer delimiters.
    """
    if len(config.delimiter) <= 1:
        # The path, so that Arrow decompresses and decodes by itself, in blocks.
        return str(path)
    with pa.input_stream(str(path), compression="detect") as stream:
        text = stream.read().decode(config.encoding)
    return io.BytesIO(text.replace(config.delimiter, _FIELD_SEPARATOR).encode())


def _csv_options(config: TableConfig, *, use_threads: bool) -> dict[str, Any]:
    names = list(config.names) or None
    if len(config.delimiter) <= 1:
        encoding = config.encoding
        # Quoted fields may hold line breaks, as descriptions of items do.
        parse = csv.ParseOptions(delimiter=config.delimiter, newlines_in_values=True)
    else:
        encoding = "utf8"
        # Files with such delimiters use no quotes: in movies.dat a title may begin with one.
        parse = csv.ParseOptions(delimiter=_FIELD_SEPARATOR, quote_char=False)
    read = csv.ReadOptions(column_names=names, encoding=encoding, use_threads=use_threads)
    return {"read_options": read, "parse_options": parse}


def _check_header(header: list[str], path: Path, name: str) -> None:
    # Arrow accepts two columns of one name, and fails only when one is looked up.
    repeated = sorted({column for column in header if header.count(column) > 1})
    if repeated:
        raise ConfigError(
            f"{name}: {path} has several columns named {repeated[0]!r}; names must differ. Its "
            f"header is {header}. If it has no header line, set config.data.{name}.names."
        )


def _concat(parts: list[pa.Table], name: str, files: _Files) -> pa.Table:
    try:
        # "permissive": a column that one file lacks is null there, and numbers widen.
        return pa.concat_tables(parts, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ConfigError(
            f"{name}: the files of {files.name} disagree about a column's type: {error}."
        ) from error

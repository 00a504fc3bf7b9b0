"""CSV and Parquet files -> one Arrow table with our column names and types, or an error with file,
row and column."""

from __future__ import annotations

import difflib
import functools
import glob
import io
import math
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from absl import logging

from twotower.config import TableConfig
from twotower.core.arrow import pc
from twotower.core.errors import ConfigError
from twotower.data.sources import columns
from twotower.data.sources.columns import BadValue

_SUFFIXES = {
    "csv": (".csv", ".tsv", ".txt", ".dat", ".data", ".gz", ".bz2", ".zst"),
    "parquet": (".parquet", ".pq"),
}
_NUMBERS = ("rating", "weight", "label")
_NULLS = ["", "#N/A", "#NA", "N/A", "NA", "NULL", "NaN", "NaT", "None", "n/a", "nan", "null"]
_YEAR_5000 = 95_617_584_000
_UNIT = "\x1f"  # ASCII's own field separator stands in for delimiters of several characters


def read(config: TableConfig, name: str, *, keys: tuple[str, ...], kind: str) -> pa.Table:
    """The table that `config` describes, in the order of its files (by name) and their rows.

    Args:
        name: of the table in the configuration, for messages: interactions, users, items or test.
        keys: the columns it must have; they become strings.
        kind: csv or parquet, for files whose name does not tell.

    Returns:
        `keys` as strings, timestamp as int64 seconds, rating, weight and label as float32; other
        columns of CSV files as whole numbers, numbers, booleans or seconds (of times) where all
        their values are, else as strings.

    Raises:
        ConfigError: no such file, an empty one, a missing column, a value of the wrong type.
    """
    paths = find(config.path, name, kind)
    parts = [_read_file(path, config, name, kind) for path in paths]
    files = _Files(paths, np.cumsum([len(part) for part in parts]), header=not config.names)
    if not sum(len(part) for part in parts):
        raise ConfigError(
            f"{name}: {files.all()} has no rows; config.data.{name}.path must name a file with data."
        )
    typed, table = _is_parquet(paths[0], kind), _joined(parts, name, files)
    place = functools.partial(files.place, typed=typed)
    return shaped(table, config, name, keys=keys, origin=files.all(), place=place, typed=typed)


def shaped(
    table: pa.Table,
    config: TableConfig,
    name: str,
    *,
    keys: tuple[str, ...],
    origin: str,
    place: Callable[[int], str],
    typed: bool,
) -> pa.Table:
    """`table` with our column names and types, as `read` returns it.

    Args:
        origin: where the rows come from, for messages.
        place: what a row is called there.
        typed: whether the columns have types already; else they are text.
    """
    wanted = {source.split(".")[0] for source in config.columns.values() if "." in source}
    try:
        column = ", ".join(sorted(wanted))
        table = columns.expand(table, wanted=wanted)
        table = _renamed(table, config, name, keys, origin)
        for column in table.column_names:
            values = _column(column, table[column], config, keys, typed=typed)
            table = table.set_column(table.column_names.index(column), column, values)
    except BadValue as error:
        raise ConfigError(
            f"{name}: {place(error.row)}, column {config.columns.get(column, column)!r}: "
            f"{error.value!r} is not {error.right}."
        ) from None
    return table


def find(path: str, name: str, kind: str) -> list[Path]:
    """The files of a path, folder or glob, by name; environment variables and ~ are expanded."""
    field = f"config.data.{name}.path"
    if not path:
        raise ConfigError(
            f"{field}={path!r} is empty: it must name a {kind} file, a folder or a glob of such files."
        )
    expanded = os.path.expanduser(os.path.expandvars(path))
    unset = re.search(r"\$\{?(\w+)", expanded)
    if unset and not os.path.exists(expanded):
        raise ConfigError(f"{field}={path!r}: the environment variable {unset[1]} is not set.")
    if os.path.isdir(expanded):
        found = sorted(
            p
            for p in Path(expanded).rglob("*")
            if p.is_file() and _is_data(p.relative_to(expanded), kind)
        )
        if not found:
            raise ConfigError(
                f"{field}={path!r}: the folder holds no file that ends in {', '.join(_SUFFIXES[kind])}."
            )
        return found
    found = (
        [Path(expanded)]
        if os.path.exists(expanded)
        else sorted(map(Path, glob.glob(expanded, recursive=True)))
    )
    if not found:
        folder = Path(expanded).parent
        others = (
            [p.name for p in folder.iterdir() if _is_data(Path(p.name), kind)]
            if folder.is_dir()
            else []
        )
        place = "" if os.path.isabs(expanded) else f" in {os.getcwd()}"
        raise ConfigError(
            f"{field}={path!r}: there is no such file{place}{nearest(Path(expanded).name, others)}."
        )
    return found


def nearest(name: str, known: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" for the name most like `name`, or nothing."""
    close = _nearest(name, known)
    return f" (did you mean {close!r}?)" if close else ""


def _nearest(name: str, known: Iterable[str]) -> str:
    def folded(text: str) -> str:
        return re.sub(r"\W|_", "", text).lower()

    others = {folded(other): other for other in reversed(list(known))}
    close = difflib.get_close_matches(folded(name), list(others), n=1, cutoff=0.5)
    return others[close[0]] if close else ""


class _Files:
    """Which row of the whole table is which row of which file."""

    def __init__(self, paths: list[Path], ends: np.ndarray, *, header: bool):
        self.paths, self.ends, self.header = paths, ends, header

    def all(self) -> str:
        return str(self.paths[0]) + (
            f" (and {len(self.paths) - 1} more)" if len(self.paths) > 1 else ""
        )

    def place(self, row: int, typed: bool) -> str:
        file = int(np.searchsorted(self.ends, row, side="right"))
        inside = row - (int(self.ends[file - 1]) if file else 0) + 1
        counted = f" (row {inside + 1} with the header)" if self.header and not typed else ""
        return f"{self.paths[file]}, row {inside}{counted}"


def _is_data(path: Path, kind: str) -> bool:
    return not any(part[0] in "._" for part in path.parts) and path.name.lower().endswith(
        _SUFFIXES[kind]
    )


def _is_parquet(path: Path, kind: str) -> bool:
    suffix = path.suffix.lower()
    return suffix in _SUFFIXES["parquet"] or (kind == "parquet" and suffix not in _SUFFIXES["csv"])


def _read_file(path: Path, config: TableConfig, name: str, kind: str) -> pa.Table:
    if os.path.getsize(path) == 0:
        raise ConfigError(
            f"{name}: {path} is empty (0 bytes); config.data.{name}.path must name a file with data."
        )
    try:
        return (
            pyarrow.parquet.read_table(path)
            if _is_parquet(path, kind)
            else _read_csv(path, config, name)
        )
    except (pa.ArrowInvalid, OSError, UnicodeError) as error:
        hint = (
            f"; set config.data.{name}.encoding, for example to 'latin-1'"
            if "UTF8" in str(error)
            else ""
        )
        if "Empty CSV file" in str(error):
            hint = f"; config.data.{name}.path must name a file with data"
        raise ConfigError(
            f"{name}: {path} cannot be read: {str(error).rstrip('.')}{hint}."
        ) from error


def _read_csv(path: Path, config: TableConfig, name: str) -> pa.Table:
    """All columns as text: what they are is decided over all files at once, and so that a bad value
    has a row."""
    several = len(config.delimiter) > 1
    delimiter, encoding = (_UNIT, "utf8") if several else (config.delimiter, config.encoding)

    def source() -> str | io.BytesIO:
        if not several:
            return str(path)
        with pa.input_stream(str(path), compression="detect") as stream:
            text = stream.read().decode(config.encoding)
        return io.BytesIO(text.replace(config.delimiter, _UNIT).encode())

    def options(threads: bool) -> dict:
        names = list(config.names) or None
        # Formats with such delimiters know no quotes: in movies.dat a title may begin with one.
        quotes = {"quote_char": False} if several else {"newlines_in_values": True}
        return {
            "read_options": pa.csv.ReadOptions(
                column_names=names, encoding=encoding, use_threads=threads
            ),
            "parse_options": pa.csv.ParseOptions(delimiter=delimiter, **quotes),
        }

    with pa.csv.open_csv(source(), **options(False)) as reader:
        header = reader.schema.names
    _check_header(header, path, name)
    text = dict.fromkeys(header, pa.string())
    convert = pa.csv.ConvertOptions(column_types=text, strings_can_be_null=True, null_values=_NULLS)
    try:
        table = pa.csv.read_csv(source(), convert_options=convert, **options(True))
    except pa.ArrowInvalid:  # once more in one thread: then the message has the row
        table = pa.csv.read_csv(source(), convert_options=convert, **options(False))
    table = table.rename_columns([column.strip() for column in header])
    return (
        table.drop_columns([""]) if "" in table.column_names else table
    )  # the index that pandas writes


def _check_header(header: list[str], path: Path, name: str) -> None:
    twice = sorted({column for column in header if header.count(column) > 1})
    if twice:
        raise ConfigError(
            f"{name}: {path} has several columns named {twice[0]!r}; names must differ. Its header is "
            f"{header}. If it has no header line, set config.data.{name}.names."
        )


def _joined(parts: list[pa.Table], name: str, files: _Files) -> pa.Table:
    try:
        return pa.concat_tables(parts, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ConfigError(
            f"{name}: the files of {files.all()} disagree about a column's type: {error}."
        ) from error


def _renamed(
    table: pa.Table, config: TableConfig, name: str, keys: tuple[str, ...], origin: str
) -> pa.Table:
    """Our names for the mapped columns; the others keep theirs, unless a mapped one has taken
    it."""
    known = table.column_names
    for ours, theirs in {**{key: key for key in keys}, **config.columns}.items():
        if theirs not in known:
            hint = _hint(
                ours, theirs, known, config, f"config.data.{name}", optional=ours not in keys
            )
            raise ConfigError(
                f"{name}: {origin} has no column {theirs!r}{nearest(theirs, known)}; {hint}. "
                f"It has: {', '.join(known)}."
            )
    taken = set(config.columns.values())
    mapped = {ours: table[theirs] for ours, theirs in config.columns.items()}
    others = {
        column: table[column] for column in known if column not in taken and column not in mapped
    }
    merged = {**mapped, **others}
    return pa.table({**{key: merged[key] for key in keys}, **merged})


def _hint(
    ours: str, theirs: str, known: list[str], config: TableConfig, field: str, *, optional: bool
) -> str:
    """What to do about a column that is not there."""
    if len(known) == 1 and (used := re.search(r"[;\t|,]", known[0])):
        return f"its fields look separated by {used[0]!r}: set {field}.delimiter={used[0]!r}"
    hint = f"{field}.columns[{ours!r}] names it"
    if ours == theirs:
        mapping = {**config.columns, ours: _nearest(theirs, known) or "ITS NAME IN THE FILE"}
        hint = f"say which it is by {field}.columns={mapping!r}"
    others = {name: column for name, column in config.columns.items() if name != ours}
    return f"{hint}, or that there is none by {field}.columns={others!r}" if optional else hint


def _column(
    name: str, values: pa.ChunkedArray, config: TableConfig, keys: tuple[str, ...], *, typed: bool
) -> pa.ChunkedArray:
    if name == "timestamp":
        times = columns.seconds(values, form=config.timestamp_format, unit=config.timestamp_unit)
        latest = pc.max(times).as_py()
        if latest is not None and latest > _YEAR_5000:
            unit = config.timestamp_unit
            logging.warning(
                "timestamp %d is beyond the year 5000: is timestamp_unit=%r right?", latest, unit
            )
        return times
    values = columns.plain(values)
    if name in keys:
        return columns.ids(values, typed=typed)
    if name in _NUMBERS:
        if name == "label" and pa.types.is_string(values.type):
            flags = columns.inferred(
                values
            )  # true and false are labels, while a rating of true is a mistake
            values = flags if pa.types.is_boolean(flags.type) else values
        return columns.numbers(values, least=0.0 if name == "weight" else -math.inf)
    if name in ("event", "split", "user_id", "item_id"):
        return columns.ids(values, typed=True)
    text = pa.types.is_string(values.type) and not typed
    return columns.inferred(values, form=config.timestamp_format) if text else values

"""Reader of files of text, JSON and Parquet: one Arrow table, or an error with file and line."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from absl import logging
from pyarrow import parquet

from twotower.config import TableConfig
from twotower.core.arrow import pc
from twotower.core.errors import ConfigError
from twotower.core.install import command
from twotower.core.remote.copies import fetch_tables
from twotower.core.remote.objects import is_remote
from twotower.data.dataset import collapse
from twotower.data.sources import content, delimited, json_files, named
from twotower.data.sources.content import Content, Kind
from twotower.data.tables import Origin, keys_of, similar_name_hint

# Options of `TableConfig` that files of text alone read.
_OF_TEXT = ("names", "delimiter", "quoting", "comment", "skip_lines", "bad_rows", "encoding")
_PIECE = 2**19  # rows of a Parquet file that are read at once
_SHOWN = 5  # files, or columns, that a message shows
_MATRIX = 20  # columns from which on numbers may be those of a matrix
_ROWS = 50  # rows by which a matrix is told


def read(config: TableConfig, name: str, *, kind: Kind) -> tuple[pa.Table, Origin]:
    """Reads a table of files, in the order of their names and of their rows.

    Args:
        config: Path of the files, and the form of their content.
        name: Name of the table in the configuration, for messages: interactions, user_table,
            item_table, validation or test.
        kind: Kind of the files whose suffix is of no known kind.

    Returns:
        The table, in which columns of files of text are text, and its origin.

    Raises:
        ConfigError: No such file, an empty one, or one that cannot be read.
    """
    keys = keys_of(name)
    table, origin = read_raw(config, name, kind, keys=keys)
    if not config.gather:
        return table, origin
    # Before columns get our names, so that messages name those of the file.
    key = config.columns.get(keys[0], keys[0])
    return _gather(table, origin, config, name, key=key)


def read_raw(
    config: TableConfig, name: str, kind: Kind, *, keys: tuple[str, ...] = ()
) -> tuple[pa.Table, Origin]:
    """Reads a table of files with the columns and types that they have.

    Args:
        config: Path of the files, and the form of their content.
        name: Name of the table in the configuration, for messages.
        kind: Kind of the files whose name and content do not tell.
        keys: Columns that every file must have, by our names; empty where they are not known yet.

    Returns:
        The table, in which columns of files of text are text, and its origin.

    Raises:
        ConfigError: No such file, an empty one, or one that cannot be read.
    """
    # All at once: types are decided over the whole table, not file by file.
    parts = []
    paths = list(find_event_files(config, name, kind))
    for path, event in paths:
        part = read_file(path, config, name, kind)
        parts.append(with_event(part, event, name) if event else part)
    files = _Files(parts)
    # Of all files together: an export of many days has days without events.
    if not sum(len(part.table) for part in parts):
        raise ConfigError(
            f"{name}: {files.name} has no rows; config.data.{name}.path must name a file with data."
        )
    kinds = {part.kind for part in parts}
    if len(kinds) > 1:
        listed = ", ".join(sorted(kinds))
        raise ConfigError(
            f"{name}: {files.name}: the files are of several kinds ({listed}); name those of one "
            f"kind by a pattern such as config.data.{name}.path='FOLDER/*.{min(kinds)}'."
        )
    needed = {config.columns.get(key, key) for key in keys}
    # "metadata.brand" is a field of the column "metadata", where no column has the whole name.
    for column in config.columns.values():
        needed.add(column if column in parts[0].table.column_names else column.split(".")[0])
    table = _concat(parts, name, needed)
    if keys and not needed <= set(table.column_names):
        _refuse_other_forms(table, files.name, name, str(paths[0][0]))
    return table, Origin(
        name=files.name,
        describe_row=files.describe_row,
        # JSON and Parquet say which values are numbers and times.
        is_typed=parts[0].kind != "csv",
        missing_words=files.missing_words,
        skipped=files.skipped,
        skipped_locations=files.skipped_locations(),
    )


def _refuse_other_forms(table: pa.Table, files: str, name: str, first: str) -> None:
    """Refuses a table without the columns it must have for what it rather is.

    Args:
        table: The table as it was read.
        files: Name of its files, for messages.
        name: Name of the table in the configuration, for messages.
        first: Path of the first file.
    """
    inspect = command("inspect", first)
    names = table.column_names
    shown = ", ".join(names[:_SHOWN])
    if is_matrix(table):
        raise ConfigError(
            f"{name}: {files} looks like a matrix of users by items, with a column for each item "
            f"({shown}, ...): set config.data.source='matrix', or write a row for each event (melt "
            f"in pandas, unpivot in polars and DuckDB). `{inspect}` writes a configuration."
        )
    # Names of columns are no numbers, and do not come again as values.
    if any(re.match(r"[-+]?\d", column) for column in names):
        raise ConfigError(
            f"{name}: the first line of {files} ({shown}) looks like a row, not like a header: "
            f"name its columns by config.data.{name}.names=('user_id', 'item_id', ...). "
            f"`{inspect}` writes a configuration."
        )


def is_matrix(table: pa.Table) -> bool:
    """Returns whether all but the first of many columns are small numbers or empty, as ratings are.

    Args:
        table: Columns as they were read, of which the first rows are looked at.
    """
    if table.num_columns < _MATRIX:
        return False
    for column in table.slice(0, _ROWS).columns[1:]:
        # Ratings are no lists or objects.
        if pa.types.is_nested(column.type):
            return False
        texts = column.cast(pa.string()).drop_null()
        if not pc.all(pc.match_substring_regex(texts, r"^\s*\d{0,3}([.,]\d*)?\s*$")).as_py():
            return False
    return True


def find_files(path: str, name: str, kind: Kind) -> list[Path]:
    """Returns the files of a path, folder or glob, by name.

    Environment variables and ~ are expanded. dataset:NAME/FILE is a file of a known data set,
    which is downloaded if need be. Files at addresses such as s3://BUCKET/FOLDER are copied.

    Raises:
        ConfigError: There is no file.
    """
    field = f"config.data.{name}.path"
    if not path:
        raise ConfigError(
            f"{field}={path!r} is empty: it must name a {kind} file, a folder or a glob of such "
            "files."
        )
    # Before anything is expanded: it is no path of this machine.
    if path.startswith(named.PREFIX):
        return [named.find_file(path, field)]
    expanded = _expand(path, field)
    if os.path.isdir(expanded):
        folder = Path(expanded)
        below = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
        files = [folder / path for path in keep_data(below, kind)]
        if files:
            return files
        suffixes = ", ".join(_suffixes(kind))
        raise ConfigError(f"{field}={path!r}: the folder holds no file that ends in {suffixes}.")
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


def _expand(path: str, field: str) -> str:
    """Returns a path with variables and ~ expanded, that of a copy where it is an address."""
    # Here rather than by a shell: paths come from configuration files.
    expanded = os.path.expanduser(os.path.expandvars(path))
    # A variable that is not set stays in the path as it was written.
    unset = re.search(r"\$\{?(\w+)", expanded)
    if unset and not os.path.exists(expanded):
        raise ConfigError(f"{field}={path!r}: the environment variable {unset[1]} is not set.")
    if is_remote(expanded):
        return fetch_tables(expanded, field)
    return expanded


@dataclasses.dataclass(frozen=True)
class TableFile:
    """One file of a table.

    Attributes:
        path: Path of the file.
        kind: Kind of its content.
        table: Its rows.
        locate: Function from the number of a row, from 0, to its place in the file.
        rows: Rows of a file of text, which know more of it; None of other kinds.
    """

    path: Path
    kind: Kind
    table: pa.Table
    locate: Callable[[int], str]
    rows: delimited.TextRows | None = None


def find_event_files(config: TableConfig, name: str, kind: Kind) -> Iterator[tuple[Path, str]]:
    """Yields each file of a table, with the kind of its events where the configuration has one.

    Args:
        config: Paths of the files.
        name: Name of the table in the configuration, for messages.
        kind: Kind of the files of a folder.
    """
    if not config.event_files:
        for path in find_files(config.path, name, kind):
            yield path, ""
    for event, pattern in config.event_files.items():
        for path in find_files(pattern, name, kind):
            yield path, event


def with_event(part: TableFile, event: str, name: str) -> TableFile:
    if "event" in part.table.column_names:
        raise ConfigError(
            f"{name}: {part.path} has a column 'event' of its own: name its files in "
            f"config.data.{name}.path, in the place of event_files."
        )
    events = pa.repeat(pa.scalar(event), len(part.table))
    return dataclasses.replace(part, table=part.table.append_column("event", events))


def _gather(
    table: pa.Table, origin: Origin, config: TableConfig, name: str, *, key: str
) -> tuple[pa.Table, Origin]:
    """Returns a row for each id, in order of first appearance, with lists of some columns.

    Args:
        table: Rows of users or items, several of one id, as they were read.
        origin: Their source.
        config: Names of the columns to gather.
        name: Name of the table in the configuration, for messages.
        key: Column of the id in the file.
    """
    columns = [config.columns.get(column, column) for column in config.gather]
    for column in (key, *columns):
        if column not in table.column_names:
            hint = similar_name_hint(column, table.column_names)
            raise ConfigError(
                f"config.data.{name}.gather={config.gather!r}: {origin.name} has no column "
                f"{column!r}{hint}."
            )
    numbered = table.filter(pc.is_valid(table[key]))
    numbered = numbered.append_column("", pa.array(np.arange(len(numbered))))
    # An id of three rows with one genre has that genre once, and a gap is no genre.
    once = pc.CountOptions(mode="only_valid")
    # One thread: several return the ids in another order each time.
    grouped = numbered.group_by(key, use_threads=False)
    lists = grouped.aggregate([("", "min"), *((column, "distinct", once) for column in columns)])
    # Messages name the first of the rows that became one.
    first_rows = lists["_min"].to_numpy()
    rows = collapse(numbered.drop_columns([""]), key)
    for column in columns:
        rows = rows.set_column(rows.column_names.index(column), column, lists[f"{column}_distinct"])
    return rows, dataclasses.replace(
        origin, describe_row=lambda row: origin.describe_row(int(first_rows[row]))
    )


class _Files:
    """The files of a table, by which a row of the whole table is named.

    Attributes:
        name: Path of the first file, and the number of the others.
        skipped: Number of rows that were left out, as they had other fields than the header.
    """

    def __init__(self, parts: list[TableFile]):
        self._parts = parts
        self._ends = np.cumsum([len(part.table) for part in parts])
        others = len(parts) - 1
        self.name = str(parts[0].path)
        if others:
            self.name = f"{self.name} (and {others} more)"
        self.skipped = sum(len(part.rows.skipped) for part in parts if part.rows is not None)

    def missing_words(self, column: str) -> dict[str, int]:
        """Returns the words of a column of text that stand for missing: word -> its number."""
        words: Counter[str] = Counter()
        for part in self._parts:
            if part.rows is not None and column in part.rows.table.column_names:
                words.update(part.rows.missing_words(column))
        return dict(words)

    def skipped_locations(self) -> tuple[str, ...]:
        """Returns file and line of the first rows that were left out."""
        locations: list[str] = []
        for part in self._parts:
            if part.rows is not None:
                lines = part.rows.skipped_lines(_SHOWN - len(locations))
                locations += [f"{part.path}, line {line}" for line in lines]
        return tuple(locations)

    def describe_row(self, row: int) -> str:
        """Returns the file and the place in it of a row counted from 0."""
        # "right": a row at the end of one file is the first of the next.
        file = int(np.searchsorted(self._ends, row, side="right"))
        first_row = 0
        if file:
            first_row = int(self._ends[file - 1])
        part = self._parts[file]
        return f"{part.path}, {part.locate(row - first_row)}"


def keep_data(paths: Iterable[Path], kind: Kind) -> list[Path]:
    """Returns the files of a folder that are those of one table, in its order.

    Args:
        paths: All files below the folder, also in folders of partitions (day=1/part-0.parquet).
        kind: Kind that is preferred.
    """
    ordered = sorted(paths)
    # A folder of files of another kind is that table all the same.
    for other in sorted(content.SUFFIXES, key=lambda other: other != kind):
        files = [path for path in ordered if _is_data(path, other)]
        if files:
            return files
    return []


def _similar_file_hint(path: Path, kind: Kind) -> str:
    if not path.parent.is_dir():
        return ""
    neighbours = [other.name for other in path.parent.iterdir() if _is_data(Path(other.name), kind)]
    return similar_name_hint(path.name, neighbours)


def _is_data(path: Path, kind: Kind) -> bool:
    """Returns whether a file is data: neither hidden nor a mark such as Spark's _SUCCESS."""
    is_hidden = any(part[0] in "._" for part in path.parts)
    return not is_hidden and path.name.lower().endswith(_suffixes(kind))


def _suffixes(kind: Kind) -> tuple[str, ...]:
    """Returns the suffixes of the files of a folder that are read."""
    if kind == "csv":
        return (*content.SUFFIXES["csv"], *content.COMPRESSED)
    return content.SUFFIXES[kind]


def read_file(path: Path, config: TableConfig, name: str, kind: Kind) -> TableFile:
    """Reads one file of a table.

    Args:
        path: Path of the file.
        config: Form of its content.
        name: Name of the table in the configuration, for messages.
        kind: Kind of a file whose name and content do not tell.

    Raises:
        ConfigError: It cannot be read.
    """
    found = content.look(path, name, kind)
    with _explain_unreadable(found, config, name):
        if found.kind == "csv":
            return _text_part(path, delimited.read(found, config, name))
        _refuse_options_of_text(found, config, name)
        if found.kind == "json":
            table, locate = json_files.read(found, config, name)
        else:
            table = _read_parquet(found, name)
            locate = _row
        _check_text(table, found, name, locate)
        return TableFile(path, found.kind, table, locate)


def read_pieces(
    path: Path, config: TableConfig, name: str, kind: Kind, *, groups: Sequence[int] = ()
) -> Iterator[TableFile]:
    """Yields the rows of one file in pieces, each as a part that names its rows as the file does.

    Args:
        path: Path of the file.
        config: Form of its content.
        name: Name of the table in the configuration, for messages.
        kind: Kind of a file whose name and content do not tell.
        groups: Row groups of a Parquet file that are read, one after the other; empty for all.

    Raises:
        ConfigError: It cannot be read, or is of a kind that cannot be read in pieces.
    """
    found = content.look(path, name, kind)
    with _explain_unreadable(found, config, name):
        if found.kind == "csv":
            for rows in delimited.read_pieces(found, config, name):
                yield _text_part(path, rows)
            return
        _refuse_options_of_text(found, config, name)
        if found.kind == "json" or found.data is not None or "=" in str(path.parent):
            raise ConfigError(
                f"{name}: {path} is no plain file of text or Parquet, and cannot be read in "
                "pieces: --engine=memory reads it."
            )
        with parquet.ParquetFile(path) as file:
            _check_names(file.schema_arrow.names, path, name)
            groups = groups or range(file.num_row_groups)
            first = 0
            for before in range(min(groups, default=0)):
                first += file.metadata.row_group(before).num_rows
            for batch in file.iter_batches(_PIECE, row_groups=list(groups)):
                table = pa.Table.from_batches([batch])
                locate = functools.partial(_row, first=first)
                _check_text(table, found, name, locate)
                yield TableFile(path, "parquet", table, locate)
                first += len(table)


def estimate_pieces(path: Path) -> int:
    """Returns the number of pieces that a file is read in, 1 where that is not known before."""
    if content.kind_of_name(path.name) == "parquet":
        return -(-parquet.read_metadata(path).num_rows // _PIECE)
    # Of what is compressed the length is not known.
    if path.name.lower().endswith(content.COMPRESSED):
        return 1
    return -(-path.stat().st_size // delimited.PIECE)


def _text_part(path: Path, rows: delimited.TextRows) -> TableFile:
    return TableFile(path, "csv", rows.table, lambda row: f"line {rows.line(row)}", rows)


@contextlib.contextmanager
def _explain_unreadable(found: Content, config: TableConfig, name: str) -> Iterator[None]:
    """Turns the errors of readers into one that names the file and a cure."""
    # Two common mistakes are recognised by Arrow's words.
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeError) as error:
        reason = str(error).rstrip(".")
        cure = ""
        if "Empty CSV file" in reason:
            cure = f"; config.data.{name}.path must name a file with data"
        elif "UTF8" in reason or isinstance(error, UnicodeError):
            reason = content.bad_line(found, config.encoding) or reason
            cure = f"; set config.data.{name}.encoding, for example to 'latin-1'"
        raise ConfigError(f"{name}: {found.path} cannot be read: {reason}{cure}.") from error


def _row(row: int, first: int = 0) -> str:
    return f"row {first + row + 1}"


def _check_text(table: pa.Table, found: Content, name: str, locate: Callable[[int], str]) -> None:
    """Refuses bytes that are no UTF-8 in columns of text, which writers of Parquet do not check."""
    for column in table.column_names:
        values = table[column]
        if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
            continue
        try:
            values.validate(full=True)
        except pa.ArrowInvalid:
            # Slow, value by value, and only in a file that is refused anyway.
            for row, value in enumerate(values.cast(pa.large_binary()).to_pylist()):
                if value is not None and value.decode(errors="ignore").encode() != value:
                    raise ConfigError(
                        f"{name}: {found.path}, {locate(row)}, column {column!r}: {value!r} is no "
                        "text in UTF-8."
                    ) from None


def _refuse_options_of_text(found: Content, config: TableConfig, name: str) -> None:
    """Refuses options that change nothing of a file with types."""
    for option in _OF_TEXT:
        value = getattr(config, option)
        # An option that changes nothing would be believed to have worked.
        if value != getattr(TableConfig(), option):
            raise ConfigError(
                f"config.data.{name}.{option}={value!r} is of files of text, and {found.path} is "
                f"{found.kind}, which has no such option: leave it out."
            )


def _read_parquet(found: Content, name: str) -> pa.Table:
    source = found.path if found.data is None else pa.BufferReader(found.data)
    with parquet.ParquetFile(source) as file:
        _check_names(file.schema_arrow.names, found.path, name)
        if found.data is not None:
            return file.read()
    # By the path, whose folders may be partitions: day=1/part-0.parquet.
    return parquet.read_table(found.path)


def _check_names(names: list[str], path: Path, name: str) -> None:
    # Arrow reads both, and fails only when one is looked up.
    repeated = sorted({column for column in names if names.count(column) > 1})
    if repeated:
        raise ConfigError(
            f"{name}: {path} has several columns named {repeated[0]!r}; names must differ. It has "
            f"{names}."
        )


def _concat(parts: list[TableFile], name: str, needed: set[str]) -> pa.Table:
    """Returns the rows of all files, in which a column that one file lacks is missing.

    Args:
        parts: The files.
        name: Name of the table in the configuration, for messages.
        needed: Columns that no file may lack; empty where they are not known.

    Raises:
        ConfigError: The files do not belong together; each is named with its columns.
    """
    everywhere = [set(part.table.column_names) for part in parts]
    together = set().union(*everywhere)
    # A file with all columns lacks none; the order of columns may differ.
    lacking = [part for part in parts if len(part.table.column_names) < len(together)]
    for part in lacking:
        columns = set(part.table.column_names)
        absent = together - columns
        # Where the columns are not known yet: one that lacks some and has others is another table.
        is_other = not needed and any(columns - others for others in everywhere)
        if absent & needed or is_other:
            raise ConfigError(_different_columns(parts, part, absent & (needed or absent), name))
    for part in lacking:
        logging.warning(
            "%s: %s has no %s, which other files have: missing in its rows",
            name,
            part.path,
            ", ".join(map(repr, sorted(together - set(part.table.column_names)))),
        )
    tables = [part.table for part in parts]
    try:
        # "permissive": a column that one file lacks is null there, and numbers widen.
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        different = _different_types(parts)
        raise ConfigError(
            f"{name}: the files disagree about the type of a column:{different or error}\nWrite "
            "them with one type."
        ) from error


def _different_columns(parts: list[TableFile], part: TableFile, absent: set[str], name: str) -> str:
    shown = list(dict.fromkeys([parts[0].path, part.path, *(other.path for other in parts)]))
    by_path = {other.path: other.table.column_names for other in parts}
    listed = "".join(f"\n  {path}: {', '.join(by_path[path])}" for path in shown[:_SHOWN])
    return (
        f"{name}: {part.path} has no {', '.join(map(repr, sorted(absent)))}, which other files of "
        f"the table have. The columns are:{listed}\nName the files of one table by a pattern in "
        f"config.data.{name}.path, or give their columns one name."
    )


def _different_types(parts: list[TableFile]) -> str:
    """Returns a line for each column whose type differs, with a file of each type."""
    types: dict[str, dict[str, Path]] = {}
    for part in parts:
        for field in part.table.schema:
            types.setdefault(field.name, {}).setdefault(str(field.type), part.path)
    lines = []
    for column, paths in types.items():
        if len(paths) > 1:
            listed = ", ".join(f"{kind} in {path}" for kind, path in paths.items())
            lines.append(f"\n  {column!r}: {listed}")
    return "".join(lines)

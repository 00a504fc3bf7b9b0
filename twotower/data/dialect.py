"""The form of a file that nobody has described, found by looking at its first lines."""

from __future__ import annotations

import csv
import dataclasses
import re
from collections import Counter
from collections.abc import Sequence

import pyarrow as pa

from twotower.config import TableConfig
from twotower.data.guess import is_known_name
from twotower.data.sources import content, delimited, files

FieldRows = list[list[str]]

_LINES = 1_000  # lines that are looked at
# Share of the lines that must have as many fields as the header.
_CONSISTENT = 0.9
# Delimiters from the likeliest on, for lines that several divide alike.
_DELIMITERS = ("\t", "::", ";", "|", ",", delimited.WHITESPACE)
_MANY_LINES = 20  # lines of which baskets would not all begin with different items
_TITLE = 10  # lines in front of the header at most
_OPTIONS = ("names", "delimiter", "quoting", "comment", "skip_lines", "bad_rows", "encoding")


@dataclasses.dataclass(frozen=True)
class FileForm:
    """The form of a file.

    Attributes:
        source: Kind of source that reads it, a key of `twotower.data.sources.load.SOURCES`.
        config: Options by which it is read.
        words: Description, such as "fields between ';', with a header".
    """

    source: str
    config: TableConfig
    words: str


def find_form(path: str, config: TableConfig, name: str) -> FileForm:
    """Returns the form of a file, or of the first of several.

    Where the caller gives an option of files of text, nothing but the delimiter is found out.

    Args:
        path: Path, folder or glob.
        config: Options of the caller.
        name: Name of the table in the configuration, for messages.

    Raises:
        ConfigError: There is no such file, or one that is not read.
    """
    config = dataclasses.replace(config, path=path)
    first = content.look(files.find_files(path, name, "csv")[0], name, "csv")
    if first.kind != "csv":
        words = {"json": "JSON", "parquet": "Parquet"}[first.kind]
        return FileForm(first.kind, config, words)
    if any(getattr(config, option) != getattr(TableConfig(), option) for option in _OPTIONS):
        return FileForm("csv", config, "fields of text, as given")
    form = _find_form_of_text(first, config)
    if form.source != "csv" and name != "interactions":
        # Attributes of users and items are a table, however ragged.
        return FileForm("csv", config, "fields of text")
    return form


def _find_form_of_text(found: content.Content, config: TableConfig) -> FileForm:
    head = found.head()
    encoding = content.marked_encoding(head) or _encoding_of(head)
    lines = head.decode(encoding, errors="replace").lstrip("\ufeff").splitlines()
    # The last one may be cut off.
    lines = lines[: max(len(lines) - 1, 1)] if len(head) == content.FIRST_BYTES else lines
    lines = lines[:_LINES]
    # "utf-8" reads a mark of its own too.
    config = dataclasses.replace(config, encoding=encoding)
    if lines and re.fullmatch(r"sep=.", lines[0]):
        # The reader knows such a line.
        rows = _divide(lines[1:], lines[0][4])
        return _table_form(rows, config, lines[0][4])
    comment = "#" if sum(line.startswith("#") for line in lines) and not _all_begin(lines) else ""
    bare = [line for line in lines if line.strip() and not (comment and line.startswith(comment))]
    config = dataclasses.replace(config, comment=comment)
    delimiter, share = _find_delimiter(bare)
    if not delimiter:
        return FileForm("csv", config, "a single column")
    skip = _title_lines(bare, delimiter)
    # Of baskets the first may have one item, which is no title.
    if skip and (share >= _CONSISTENT or _names_columns(_divide(bare[skip:], delimiter)[0])):
        config = dataclasses.replace(config, skip_lines=lines.index(bare[skip]))
        bare = bare[skip:]
    if share < _CONSISTENT:
        return _lists_form(bare, config, delimiter)
    return _table_form(_divide(bare, delimiter), config, delimiter)


def _encoding_of(head: bytes) -> str:
    """Returns UTF-8, or the encoding of Western Europe that the bytes rather are of."""
    try:
        # A letter may be cut off at the end.
        head[: len(head) - 4].decode("utf-8")
        if len(head) < content.FIRST_BYTES:
            head.decode("utf-8")
        return "utf-8"
    except UnicodeDecodeError:
        # Latin-1 has no letters there; the code page of Windows has quotes and the euro.
        return "cp1252" if re.search(rb"[\x80-\x9f]", head) else "latin-1"


def _all_begin(lines: Sequence[str]) -> bool:
    return all(line.startswith("#") for line in lines)


def _divide(lines: Sequence[str], delimiter: str) -> FieldRows:
    if delimiter == delimited.WHITESPACE:
        return [line.split() for line in lines]
    if len(delimiter) > 1:
        return [line.split(delimiter) for line in lines]
    # A quoted text may hold line breaks, which `splitlines` took.
    with_ends = (f"{line}\n" for line in lines)
    try:
        return [row for row in csv.reader(with_ends, delimiter=delimiter) if row]
    except csv.Error:
        return [line.split(delimiter) for line in lines]


def _find_delimiter(lines: Sequence[str]) -> tuple[str, float]:
    """Returns the delimiter of lines, and the share of rows that have as many fields as most."""
    best = ""
    best_rank = (False, 0, 0.0)
    best_share = 0.0
    for delimiter in _DELIMITERS:
        rows = _divide(lines, delimiter)
        widths = Counter(map(len, rows))
        width, count = widths.most_common(1)[0] if widths else (0, 0)
        if max(widths, default=0) < 2:
            continue
        share = count / len(rows)
        is_consistent = share >= _CONSISTENT and width > 1
        # White space divides texts too: it is for files that nothing else divides.
        if delimiter == delimited.WHITESPACE and best:
            continue
        fields = width if is_consistent else sum(map(len, rows)) / len(rows)
        rank = (is_consistent, fields, share)
        if rank > best_rank:
            best = delimiter
            best_rank = rank
            best_share = share if width > 1 else 0.0
    return best, best_share


def _title_lines(lines: Sequence[str], delimiter: str) -> int:
    """Returns the number of lines in front of the header: those without a delimiter."""
    for number, line in enumerate(lines[:_TITLE]):
        if len(_divide([line], delimiter)[0]) > 1:
            return number
    return 0


def _lists_form(lines: Sequence[str], config: TableConfig, delimiter: str) -> FileForm:
    """Returns the form of lines of many lengths: baskets, or a user and their items."""
    rows = [[word.strip() for word in row] for row in _divide(lines, delimiter)]
    widths = Counter(map(len, rows))
    if len(widths) < 3 or _names_columns(rows[0]):
        # A table with bad rows.
        width = widths.most_common(1)[0][0]
        right = [row for row in rows if len(row) == width]
        return _table_form(right, config, delimiter)
    first = [row[0] for row in rows]
    others = {word for row in rows for word in row[1:]}
    is_shared = sum(word in others for word in first) / len(first)
    if delimiter != delimited.WHITESPACE:
        config = dataclasses.replace(config, delimiter=delimiter)
    between = _words_of(delimiter)
    # A user stands in front of one line, while many baskets begin with the same item. Numbers may
    # be those of users and of items.
    is_once = len(set(first)) == len(first)
    if is_once and (is_shared < 0.5 or len(first) >= _MANY_LINES):
        return FileForm("user_lists", config, f"a user and their items a line, between {between}")
    return FileForm("baskets", config, f"a basket of items a line, between {between}")


def _words_of(delimiter: str) -> str:
    return {delimited.WHITESPACE: "white space", "\t": "tabs"}.get(delimiter, repr(delimiter))


def _table_form(rows: FieldRows, config: TableConfig, delimiter: str) -> FileForm:
    written = "whitespace" if delimiter == delimited.WHITESPACE else delimiter
    config = dataclasses.replace(config, delimiter=written)
    words = f"fields between {_words_of(delimiter)}"
    if delimiter != "," and _has_decimal_commas(rows):
        config = dataclasses.replace(config, decimal=",")
        words += ", numbers with a decimal comma"
    if _is_matrix(rows):
        return FileForm("matrix", config, f"users by items, {words}")
    if has_header(rows):
        return FileForm("csv", config, f"{words}, with a header")
    width = Counter(map(len, rows)).most_common(1)[0][0]
    names = tuple(f"column_{i + 1}" for i in range(width))
    config = dataclasses.replace(config, names=names)
    return FileForm("csv", config, f"{words}, without a header")


def _has_decimal_commas(rows: FieldRows) -> bool:
    """Returns whether a column is numbers such as 12,5 and none is numbers such as 12.5."""
    columns = list(zip(*(row for row in rows[1:] if len(row) == len(rows[0]))))
    has_commas = any(_are_decimals(column, ",") for column in columns)
    return has_commas and not any(_are_decimals(column, ".") for column in columns)


def _are_decimals(values: Sequence[str], mark: str) -> bool:
    number = rf"\s*(-?\d+({re.escape(mark)}\d+)?)?\s*"
    has_mark = any(mark in value for value in values)
    return has_mark and all(re.fullmatch(number, value) for value in values)


def has_header(rows: FieldRows) -> bool:
    """Returns whether the first of some rows names the columns.

    >>> has_header([["user", "item"], ["u1", "i1"]]), has_header([["u2", "i3"], ["u1", "i1"]])
    (True, False)
    """
    header = [field.strip() for field in rows[0]]
    below = [row for row in rows[1:] if len(row) == len(header)]
    # A name is no number and no time. The first may be missing: that of a frame's row numbers.
    if any(re.match(r"[-+]?\d", field) for field in header) or not all(header[1:]):
        return False
    columns = [[row[i].strip() for row in below] for i in range(len(header))]
    if any(field in values for field, values in zip(header, columns)):
        return False
    if _names_columns(header):
        return True
    for field, values in zip(header, columns):
        shapes = Counter(map(_shape, values)).most_common(1)
        # Names among words are words too: only values with digits tell.
        if shapes and shapes[0][0] == _shape(field) and "9" in _shape(field):
            return False
    return True


def _names_columns(fields: Sequence[str]) -> bool:
    return any(is_known_name(field.strip()) for field in fields)


def _shape(text: str) -> str:
    return re.sub(r"[^\W\d_]+", "a", re.sub(r"\d+", "9", text))


def _is_matrix(rows: FieldRows) -> bool:
    """Returns whether rows are users by items, with each user once."""
    below = [row for row in rows[1:] if len(row) == len(rows[0])]
    columns = [pa.array(values) for values in zip(*below)]
    if not columns:
        return False
    names = [str(i) for i in range(len(columns))]
    users = columns[0].unique()
    return len(users) == len(below) and files.is_matrix(pa.table(columns, names=names))

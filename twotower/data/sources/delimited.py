"""Reader of text files of delimited fields: every column as text, and the line of every row.

Rows read are held against the file: a quote that takes in line breaks and whole rows, a row with
other fields than the header, NUL characters are refused with their lines, all of them at once.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from absl import logging
from pyarrow import csv

from twotower.config import TableConfig
from twotower.core.arrow import pc
from twotower.core.errors import ConfigError
from twotower.data.sources.content import Content, marked_encoding
from twotower.data.sources.records import find_swallowed, record_lines

# Separators that a header may have in the place of the configured one.
SEPARATORS = ("\t", ";", "|", ",")
WHITESPACE = r"\s+"
_DELIMITERS = {r"\t": "\t", "tab": "\t", "space": " ", "whitespace": WHITESPACE}
# Arrow knows delimiters of one character; ASCII's own field separator stands in for longer ones.
_FIELD_SEPARATOR = "\x1f"
_BOM = "\ufeff"
PIECE = 1 << 24  # bytes that are read at once, where a file is read in pieces
_LONGEST_BLOCK = 1 << 30  # bytes; Arrow's blocks are below 2 GB
_FEW_WIDTHS = 3  # numbers of fields that the bad rows of a table have
_SHOWN = 80  # characters of a row that a message shows


@dataclasses.dataclass(frozen=True)
class TextRows:
    """Rows of a text file.

    Attributes:
        table: Columns of text.
        header: Names of all columns of the file; empty ones are left out of the table.
        content: The file.
        form: Form of the file, with what was found out about it.
        records: Number of the record of each row, from 0 and without the header, int64 [N]; None
            where every record is a row.
        skipped: Numbers of the records that are left out, as they have other fields than the
            header, int64 [B].
    """

    table: pa.Table
    header: list[str]
    content: Content
    form: TableConfig
    records: np.ndarray | None = None
    skipped: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))

    def columns(self) -> list[pa.ChunkedArray | None]:
        """Returns the columns of the file; None for one that the table leaves out."""
        return [self.table[name] if name else None for name in self.header]

    def missing_words(self, column: str) -> dict[str, int]:
        """Returns the words of a column that were read as missing: word -> its number."""
        # The file is read once more for an answer, which most files do not need.
        if not self.table[column].null_count:
            return {}
        return _Reading(self.content, self.form, "").missing_words(column)

    def line(self, row: int) -> int:
        """Returns the line, counted from 1, on which a row begins, counted from 0."""
        if self.records is not None:
            row = int(self.records[row])
        return _line_of(self.content, self.form, row)

    def skipped_lines(self, count: int) -> list[int]:
        """Returns the lines of the first records that are left out."""
        first = self.skipped[:count].tolist()
        return [_line_of(self.content, self.form, record) for record in first]


def read(content: Content, config: TableConfig, name: str) -> TextRows:
    """Reads all columns as text.

    Their types are decided later, over all files at once, and so that errors can name the row.

    Raises:
        ConfigError: Rows that cannot be told apart, with the line of the first of each kind.
        pa.ArrowInvalid: The file is no such text.
    """
    form = find_form(content, config, name)
    reading, header, names = _begin(content, form, name)
    table, bad = reading.table(header)
    rows = _with_bad_rows(TextRows(table, names, content, form), bad, header, reading)
    _check_rows(rows, bad, name)
    return _without_marks(_without_repeated_headers(rows, name))


def read_pieces(content: Content, config: TableConfig, name: str) -> Iterator[TextRows]:
    """Yields the rows of a file in pieces, as `read` reads them.

    Args:
        content: The file.
        config: Configured form.
        name: Name of the table in the configuration, for messages.

    Raises:
        ConfigError: Rows that cannot be told apart, with the line of the first of each kind.
        pa.ArrowInvalid: The file is no such text.
    """
    form = find_form(content, config, name)
    reading, header, names = _begin(content, form, name)
    first = 0
    bad: list[csv.InvalidRow] = []
    for table in reading.pieces(header, bad):
        end = first + len(table)
        own = []
        # The reader is ahead: bad rows of later pieces may be known already.
        for row, record in zip(bad, _records_of(bad, form), strict=True):
            if record < end:
                own.append(row)
                end += 1
        del bad[: len(own)]
        skipped = _records_of(own, form)
        good = np.delete(np.arange(first, end), skipped - first)
        rows = _padded(TextRows(table, names, content, form, good, skipped), own, header, reading)
        _check_rows(rows, own, name)
        yield _without_marks(_without_repeated_headers(rows, name))
        first = end
    # Those behind the last good row.
    if bad:
        none = np.zeros(0, np.int64)
        rows = TextRows(_no_rows(names), names, content, form, none, _records_of(bad, form))
        rows = _padded(rows, bad, header, reading)
        _check_rows(rows, bad, name)
        yield rows


def _begin(content: Content, form: TableConfig, name: str) -> tuple[_Reading, list[str], list[str]]:
    """Returns what reads a file, its header, and the names of its columns.

    Raises:
        ConfigError: Two columns have one name.
    """
    reading = _Reading(content, form, name)
    header = reading.header()
    names = [column.strip() for column in header]
    _check_header(names, content.path, name)
    return reading, header, names


def _no_rows(names: list[str]) -> pa.Table:
    return pa.table({name: pa.array([], pa.string()) for name in names if name})


def find_form(content: Content, config: TableConfig, name: str) -> TableConfig:
    """Returns the form of a file: as configured, and as its first bytes say.

    They may have the mark of an encoding, a line such as sep=; before the header, and another
    delimiter in the header than the configured one.

    Args:
        content: The file.
        config: Configured form.
        name: Name of the table in the configuration, for messages.
    """
    head = content.head()
    encoding = config.encoding
    marked = marked_encoding(head)
    if marked and not _is_of(encoding, marked):
        logging.info("%s: %s is read as %s, by its mark", name, content.path, marked)
        encoding = marked
    delimiter = plain_delimiter(config.delimiter)
    skip = config.skip_lines
    lines = head.decode(encoding, errors="replace").lstrip(_BOM).splitlines()
    # Excel writes such a line, and takes it for granted.
    said = re.fullmatch(r"sep=(.)", "".join(lines[skip : skip + 1]))
    if said:
        delimiter = said[1]
        skip += 1
    # Only where the header has none of the configured ones: a header of one column stays as it is.
    elif not _has(delimiter, first_line(lines[skip:], config.comment)):
        found = _other_delimiter(first_line(lines[skip:], config.comment))
        if found:
            logging.info(
                "%s: %s is read with the delimiter %r: its first line has no %r",
                name,
                content.path,
                found,
                delimiter,
            )
            delimiter = found
    return dataclasses.replace(config, encoding=encoding, delimiter=delimiter, skip_lines=skip)


def plain_delimiter(written: str) -> str:
    """Returns a delimiter that may be written in a word.

    >>> plain_delimiter("tab"), plain_delimiter(";")
    ('\\t', ';')
    """
    if len(written) > 1 and not written.strip(" "):
        return WHITESPACE
    return _DELIMITERS.get(written, written)


def quote_of(form: TableConfig) -> str:
    """Returns the character that quotes fields; empty for none."""
    # Files with longer delimiters use no quotes: in movies.dat a title may begin with one.
    if form.quoting == "off" or len(form.delimiter) > 1:
        return ""
    return form.quoting


def arrow_delimiter(form: TableConfig) -> str:
    """Returns the delimiter of one character that Arrow sees."""
    return form.delimiter if len(form.delimiter) == 1 else _FIELD_SEPARATOR


def first_line(lines: list[str], comment: str) -> str:
    """Returns the first line that is neither empty nor a comment; empty without one."""
    for line in lines:
        if line.strip() and not (comment and line.startswith(comment)):
            return line
    return ""


def _is_of(encoding: str, marked: str) -> bool:
    return encoding.lower().replace("_", "-").startswith(marked)


def _has(delimiter: str, line: str) -> bool:
    if delimiter == WHITESPACE:
        return bool(re.search(r"\S\s+\S", line))
    return delimiter in line


def _other_delimiter(line: str) -> str:
    """Returns the separator that a line has most of; empty if it has none."""
    # Of equal counts the first in the list: tabs and semicolons are rarer in names than commas.
    best = max(SEPARATORS, key=line.count)
    return best if best in line else ""


class _Reading:
    """Arrow's reading of one file.

    Args:
        content: The file.
        form: Form of the file, as `find_form` returns it.
        name: Name of the table in the configuration, for messages.
    """

    def __init__(self, content: Content, form: TableConfig, name: str):
        self._content = content
        self._form = form
        self._name = name
        # None where Arrow reads the path by itself, which takes no memory for the text.
        self._prepared: bytes | None = content.data
        if len(form.delimiter) > 1 or form.comment:
            self._prepared = _prepare(content, form)

    def header(self) -> list[str]:
        """Returns the names of the columns; an empty one for a column that is left out."""
        try:
            found = self._columns(handler=None)
        except pa.ArrowInvalid:
            self._check_encoding()
            # Bad rows are told when all rows are read.
            found = self._columns(handler=lambda row: "skip")
        names = [name.strip() for name in self._form.names]
        if not names:
            return found
        # The names are for the first columns, so that too many of them cannot be right.
        if len(names) > len(found):
            field = f"config.data.{self._name}.names"
            raise ConfigError(
                f"{self._name}: {self._content.path} has {len(found)} columns, and {field} has "
                f"{len(names)} names. Its first line is {self._first_line()!r}."
            )
        left_out = len(found) - len(names)
        if left_out:
            logging.info(
                "%s: the last %d of %d columns have no name: left out",
                self._name,
                left_out,
                len(found),
            )
        return names + [""] * left_out

    def _columns(self, handler: Callable[[csv.InvalidRow], str] | None) -> list[str]:
        options = self._options(use_threads=False, names=None)
        # Without a handler Arrow refuses bad rows, which is the faster way where there are none.
        if handler is not None:
            options["parse_options"].invalid_row_handler = handler
        with csv.open_csv(self._input(), **options) as reader:
            return reader.schema.names

    def _check_encoding(self) -> None:
        """Refuses a file of another encoding, whose bad rows Arrow could not show.

        Raises:
            UnicodeError: It is of another one.
        """
        if self._prepared is self._content.data:
            self._content.whole().decode(self._form.encoding)

    def table(self, header: list[str]) -> tuple[pa.Table, list[csv.InvalidRow]]:
        """Returns the rows that have as many fields as the header, and the others."""
        try:
            # With threads first; only a file that fails is read again, for the bad rows.
            return self._read(header, None), []
        except pa.ArrowInvalid:
            self._check_encoding()
        bad: list[csv.InvalidRow] = []
        try:
            return self._read(header, bad), bad
        except pa.ArrowInvalid as error:
            # A quoted text that is longer than a block, which only larger blocks take whole.
            if "straddling" not in str(error):
                raise
        # The rows of the first try would be told twice.
        bad.clear()
        return self._read(header, bad, block_size=_LONGEST_BLOCK), bad

    def pieces(self, header: list[str], bad: list[csv.InvalidRow]) -> Iterator[pa.Table]:
        """Yields the rows that have as many fields as the header; the others are added to `bad`."""

        def keep(row: csv.InvalidRow) -> str:
            bad.append(row)
            return "skip"

        names = None
        if self._form.names:
            names = _arrow_names(header)
        options = self._options(use_threads=False, names=names)
        options["read_options"].block_size = PIECE
        options["parse_options"].invalid_row_handler = keep
        text = self._as_text(header)
        named = [column.strip() for column in header if column.strip()]
        with csv.open_csv(self._input(), convert_options=text, **options) as reader:
            for batch in reader:
                yield pa.Table.from_batches([batch]).rename_columns(named)

    def padded(self, texts: list[str], header: list[str]) -> pa.Table:
        """Returns rows whose fields were completed, each from its text."""
        data = "\n".join(texts).encode()
        options = self._options(use_threads=False, names=_arrow_names(header))
        # These are rows alone: what stands before them in the file is not here.
        options["read_options"].skip_rows = 0
        options["read_options"].encoding = "utf8"
        return csv.read_csv(io.BytesIO(data), convert_options=self._as_text(header), **options)

    def missing_words(self, column: str) -> dict[str, int]:
        """Returns the words of a column that were read as missing: word -> its number.

        The column is read again: Arrow does not count what it takes for missing.
        """
        header = self.header()
        names = _arrow_names(header) if self._form.names else None
        options = self._options(use_threads=False, names=names)
        options["parse_options"].invalid_row_handler = lambda row: "skip"
        options["read_options"].block_size = _LONGEST_BLOCK
        only = [name for name in header if name.strip() == column]
        (values,) = csv.read_csv(self._input(), convert_options=_as_text(only, ()), **options)
        is_word = pc.is_in(values, value_set=pa.array(self._form.missing, pa.string()))
        counts = pc.value_counts(values.filter(is_word)).to_pylist()
        # An empty field is no word.
        return {count["values"]: count["counts"] for count in counts if count["values"]}

    def _as_text(self, header: list[str]) -> csv.ConvertOptions:
        return _as_text(header, self._form.missing)

    def _read(
        self, header: list[str], bad: list[csv.InvalidRow] | None, block_size: int | None = None
    ) -> pa.Table:
        names = None
        if self._form.names:
            names = _arrow_names(header)
        options = self._options(use_threads=bad is None, names=names)
        if block_size:
            options["read_options"].block_size = block_size
        if bad is not None:

            def keep(row: csv.InvalidRow) -> str:
                bad.append(row)
                return "skip"

            options["parse_options"].invalid_row_handler = keep
        table = csv.read_csv(self._input(), convert_options=self._as_text(header), **options)
        # After reading: Arrow looks columns up by the names in the file, spaces included.
        return table.rename_columns([column.strip() for column in header if column.strip()])

    def _options(self, *, use_threads: bool, names: list[str] | None) -> dict[str, Any]:
        encoding = self._form.encoding if self._prepared is self._content.data else "utf8"
        read = csv.ReadOptions(
            column_names=names,
            autogenerate_column_names=bool(self._form.names) and names is None,
            encoding=encoding,
            use_threads=use_threads,
            skip_rows=self._form.skip_lines,
        )
        # Quoted fields may hold line breaks, as descriptions of items do.
        quote = quote_of(self._form) or False
        parse = csv.ParseOptions(
            delimiter=arrow_delimiter(self._form),
            quote_char=quote,
            newlines_in_values=bool(quote),
        )
        return {"read_options": read, "parse_options": parse}

    def _input(self) -> str | io.BytesIO:
        if self._prepared is None:
            # The path, so that Arrow decompresses and decodes by itself, in blocks.
            return str(self._content.path)
        return io.BytesIO(self._prepared)

    def _first_line(self) -> str:
        lines = self._content.head().decode(self._form.encoding, errors="replace").splitlines()
        return first_line(lines[self._form.skip_lines :], self._form.comment)[:_SHOWN]


def _arrow_names(header: list[str]) -> list[str]:
    """Returns a name for every column, also for those that are left out."""
    return [name or f"\0{i}" for i, name in enumerate(header)]


def _as_text(header: Sequence[str], missing: Sequence[str]) -> csv.ConvertOptions:
    """Returns the options to read columns as text, with null for some words."""
    # A column without a name is the index that pandas writes, or follows a trailing delimiter.
    named = [column for column in header if column.strip()]
    # Text even for columns of digits: leading zeros of ids would be lost.
    return csv.ConvertOptions(
        column_types=dict.fromkeys(named, pa.string()),
        include_columns=named,
        strings_can_be_null=bool(missing),
        null_values=list(missing),
    )


def _check_header(header: list[str], path: Path, name: str) -> None:
    # Arrow accepts two columns of one name, and fails only when one is looked up.
    names = [column for column in header if column]
    repeated = sorted({column for column in names if names.count(column) > 1})
    if repeated:
        raise ConfigError(
            f"{name}: {path} has several columns named {repeated[0]!r}; names must differ. Its "
            f"header is {names}. If it has no header line, set config.data.{name}.names."
        )


def _prepare(content: Content, form: TableConfig) -> bytes:
    """Returns a file as UTF-8 without comments, and with a delimiter of one character."""
    text = content.whole().decode(form.encoding)
    if form.comment:
        lines = text.splitlines(keepends=True)
        # Empty ones stay in their place, so that skipped lines are counted right.
        text = "".join("\n" if line.startswith(form.comment) else line for line in lines)
    if form.delimiter == WHITESPACE:
        text = re.sub(r"(?m)^[ \t]+|[ \t]+$", "", text)
        text = re.sub(r"[ \t]+", _FIELD_SEPARATOR, text)
    elif len(form.delimiter) > 1:
        # The stand-in is a control character that texts do not hold.
        text = text.replace(form.delimiter, _FIELD_SEPARATOR)
    return text.encode()


def _with_bad_rows(
    rows: TextRows, bad: list[csv.InvalidRow], header: list[str], reading: _Reading
) -> TextRows:
    """Returns the rows with the padded ones among them, and the numbers of their records."""
    if not bad:
        return rows
    form = rows.form
    # Arrow numbers the good rows among themselves: what is not bad is good, in order.
    numbers = _records_of(bad, form)
    good = np.delete(np.arange(len(rows.table) + len(bad)), numbers)
    # Rows that are left out, or refused below, leave gaps in the numbers of the others.
    return _padded(dataclasses.replace(rows, records=good, skipped=numbers), bad, header, reading)


def _padded(
    rows: TextRows, bad: list[csv.InvalidRow], header: list[str], reading: _Reading
) -> TextRows:
    """Returns rows with those among them that are to be padded, which are skipped so far.

    Rows that have too many fields stay out, to be refused.
    """
    form = rows.form
    if form.bad_rows != "pad" or not bad or _too_long(bad, arrow_delimiter(form)):
        return rows
    texts = [_pad(row, arrow_delimiter(form)) for row in bad]
    table = pa.concat_tables([rows.table, reading.padded(texts, header)])
    assert rows.records is not None, "rows beside bad ones are numbered"
    records = np.concatenate([rows.records, rows.skipped])
    # The order of the file is the order of time where a log has no times.
    order = np.argsort(records)
    return dataclasses.replace(
        rows,
        table=table.take(pa.array(order)),
        records=records[order],
        skipped=np.zeros(0, np.int64),
    )


def _records_of(bad: list[csv.InvalidRow], form: TableConfig) -> np.ndarray:
    """Returns the numbers of records, from 0 and without the header, int64 [B]."""
    # Arrow counts from 1, skipped lines and the header too.
    first = form.skip_lines + 1 + (not form.names)
    return np.array([row.number - first for row in bad], np.int64)


def _pad(row: csv.InvalidRow, separator: str) -> str:
    missing = row.expected_columns - row.actual_columns
    if missing > 0:
        return row.text + separator * missing
    return row.text[:missing]


def _too_long(bad: list[csv.InvalidRow], separator: str) -> list[csv.InvalidRow]:
    """Returns the rows with fields beyond those of the header that are not empty."""
    long = []
    for row in bad:
        extra = max(row.actual_columns - row.expected_columns, 0)
        # Empty fields at the end are what spreadsheets leave behind.
        if not row.text.endswith(separator * extra):
            long.append(row)
    return long


def _check_rows(rows: TextRows, bad: list[csv.InvalidRow], name: str) -> None:
    """Refuses a file for all that is wrong with its rows, at once.

    Raises:
        ConfigError: The first of each kind, with its line, and how many there are.
    """
    problems = [*_bad_row_problems(rows, bad, name), *_text_problems(rows, name)]
    if not problems:
        return
    # Named by file and line already.
    if len(problems) == 1:
        raise ConfigError(f"{name}: {problems[0]}")
    listed = "\n  ".join(problems)
    raise ConfigError(f"{name}: {rows.content.path} cannot be read:\n  {listed}")


def _bad_row_problems(rows: TextRows, bad: list[csv.InvalidRow], name: str) -> Iterator[str]:
    """Yields what is wrong with the rows that have other fields than the header."""
    form = rows.form
    records = _records_of(bad, form)
    # A quote that takes in what follows leaves one row, with too few fields.
    is_open = np.array(["\n" in row.text for row in bad], bool)
    for i in np.flatnonzero(is_open)[:1]:
        text = bad[i].text
        line = _line_of(rows.content, form, int(records[i]))
        yield _swallowed(rows, line, text, int(is_open.sum()), name)
    ragged = [row for row in bad if "\n" not in row.text]
    separator = arrow_delimiter(form)
    if form.bad_rows == "pad":
        ragged = _too_long(ragged, separator)
    if not ragged:
        return
    record = int(_records_of(ragged[:1], form)[0])
    line = _line_of(rows.content, form, record)
    shown = ragged[0].text.replace(_FIELD_SEPARATOR, form.delimiter)[:_SHOWN]
    words = (
        f"{rows.content.path}, line {line}: {ragged[0].actual_columns} fields in the place of "
        f"{ragged[0].expected_columns}: {shown!r}{_others(len(ragged))}"
    )
    if form.bad_rows == "skip":
        logging.warning("%s: %s: skipped", name, words)
        return
    yield f"{words}. {_ragged_cure(ragged, form, separator, name)}"


def _ragged_cure(ragged: list[csv.InvalidRow], form: TableConfig, separator: str, name: str) -> str:
    field = f"config.data.{name}"
    # Rows of many widths are lists of items, not damaged rows.
    widths = {row.actual_columns for row in ragged}
    if len(widths) > _FEW_WIDTHS:
        return (
            "Lines of many lengths are no table: a user with their items on each has "
            "config.data.source='user_lists', a basket without a user 'baskets'."
        )
    if form.bad_rows == "pad":
        return f"bad_rows='pad' cuts empty fields only: set {field}.bad_rows='skip'"
    cures = [f"{field}.bad_rows='skip' leaves such rows out"]
    if not _too_long(ragged, separator):
        cures.append(
            f"{field}.bad_rows='pad' fills what is missing and cuts empty fields at the end"
        )
    if form.quoting != "off" and any(form.quoting in row.text for row in ragged):
        cures.append(f"{field}.quoting='off' is for files whose quotes are part of the text")
    return "; ".join(cures) + "."


def _others(count: int) -> str:
    """Returns words for further rows of a kind."""
    if count == 1:
        return ""
    return f" (and {count - 1:,} more such rows)"


def _text_problems(rows: TextRows, name: str) -> Iterator[str]:
    """Yields what is wrong with texts: NUL characters, and quotes that take in whole rows."""
    for column in rows.table.column_names:
        low, _ = _byte_range(rows.table[column])
        # Neither a NUL nor a line break: nearly all columns, at the cost of one look at each byte.
        if low > ord("\r"):
            continue
        if low == 0:
            yield from _nul_problem(rows, column, name)
        # Without quotes a line break ends a row, and nothing can be taken in.
        if quote_of(rows.form):
            yield from _swallowed_problem(rows, column, name)


def _byte_range(column: pa.ChunkedArray) -> tuple[int, int]:
    """Returns the least and the greatest byte of all texts of a column."""
    low = 255
    high = 0
    for chunk in column.chunks:
        data = chunk.buffers()[2]
        # Chunks as Arrow reads them are no slices: all their bytes are texts of the column.
        if data is not None and len(data):
            values = np.frombuffer(data, np.uint8)
            low = min(low, int(values.min()))
            high = max(high, int(values.max()))
    return low, high


def _may_have_marks(column: pa.ChunkedArray) -> bool:
    """Returns whether a column has the first byte of a byte-order mark, which few letters have."""
    _, high = _byte_range(column)
    return high >= _BOM.encode()[0]


def _nul_problem(rows: TextRows, column: str, name: str) -> Iterator[str]:
    is_bad = pc.match_substring(rows.table[column], "\0")
    count = pc.sum(is_bad).as_py()
    if not count:
        return
    row = pc.index(is_bad, True).as_py()
    value = rows.table[column][row].as_py()
    yield (
        f"{rows.content.path}, line {rows.line(row)}, column {column!r}: {value!r} has a NUL "
        f"character{_others(count)}. Where every second byte is one, the file is UTF-16: "
        f"set config.data.{name}.encoding='utf-16-le'."
    )


def _swallowed_problem(rows: TextRows, column: str, name: str) -> Iterator[str]:
    index = rows.header.index(column)
    found = find_swallowed(rows.columns(), index, rows.form.delimiter)
    if not len(found):
        return
    row = int(found[0])
    text = rows.table[column][row].as_py()
    yield _swallowed(rows, rows.line(row), text, len(found), name)


def _swallowed(rows: TextRows, line: int, text: str, count: int, name: str) -> str:
    shown = text[:_SHOWN]
    return (
        f"{rows.content.path}, line {line}: a quoted text takes in {text.count(chr(10)):,} line "
        f"breaks and the rows between them: {shown!r}{_others(count)}. A quote on this line is not "
        f"closed. Close or double it, or set config.data.{name}.quoting='off', where quotes are "
        "part of the text."
    )


def _without_repeated_headers(rows: TextRows, name: str) -> TextRows:
    """Leaves out rows that repeat the header, as files that were put together have."""
    names = rows.table.column_names
    if not names:
        return rows
    first = rows.table[0]
    low, high = _byte_range(first)
    # A column of numbers holds no letter of its name.
    letters = names[0].encode()
    if letters and not low <= min(letters) <= max(letters) <= high:
        return rows
    marks = ("", _BOM) if _may_have_marks(first) else ("",)
    # One comparison of the first column, which no row of nearly all files passes.
    if not any(pc.any(pc.equal(first, mark + names[0])).as_py() for mark in marks):
        return rows
    is_header = np.ones(len(rows.table), bool)
    for column, values in zip(names, rows.table.columns):
        trimmed = pc.utf8_trim_whitespace(values)
        same = pc.is_in(trimmed, value_set=pa.array([column, _BOM + column]))
        is_header &= same.to_numpy()
    count = int(is_header.sum())
    if not count:
        return rows
    line = rows.line(int(np.flatnonzero(is_header)[0]))
    logging.warning(
        "%s: %s, line %d repeats the header%s: left out",
        name,
        rows.content.path,
        line,
        _others(count),
    )
    records = rows.records
    if records is None:
        records = np.arange(len(rows.table))
    kept = rows.table.filter(pa.array(~is_header))
    return dataclasses.replace(rows, table=kept, records=records[~is_header])


def _without_marks(rows: TextRows) -> TextRows:
    """Returns the rows without the byte-order marks that begin a file among others."""
    first = rows.table[0]
    if not _may_have_marks(first) or not pc.any(pc.starts_with(first, _BOM)).as_py():
        return rows
    bare = pc.utf8_ltrim(first, characters=_BOM)
    table = rows.table.set_column(0, rows.table.column_names[0], bare)
    return dataclasses.replace(rows, table=table)


def _line_of(content: Content, form: TableConfig, record: int) -> int:
    """Returns the line, from 1, of a record, from 0 and without the header."""
    # Only for messages: the whole file is gone through once more.
    starts = record_lines(
        content.whole().decode(form.encoding, errors="replace"),
        delimiter=form.delimiter,
        quote=quote_of(form),
        comment=form.comment,
        skip_lines=form.skip_lines,
    )
    if not form.names:
        record += 1
    return next(itertools.islice(starts, record, None), 0)

"""Records of a text file: the lines on which they begin, and quoted texts that take in others.

A quote that is not closed makes one text of all that follows, line breaks and delimiters too. A
description of several lines looks alike to a parser, but its lines do not look like records.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from twotower.core.arrays import evenly_spaced
from twotower.core.arrow import pc

_SAMPLE = 2_000  # values of a column that are looked at
_LINES = 200  # lines of a text that are looked at
_MAX_SHAPES = 30  # shapes of a column of ids; a column of texts has more
_LINE_BREAK = r"\r?\n|\r"


def record_lines(
    text: str, *, delimiter: str, quote: str, comment: str, skip_lines: int
) -> Iterator[int]:
    """Yields the line, from 1, on which each record of a file begins, the header among them.

    Args:
        text: Text of the file.
        delimiter: Separator of the fields.
        quote: Character that quotes fields; empty for none.
        comment: Beginning of lines that are no records; empty for none.
        skip_lines: Number of lines before the first record.
    """
    has_quotes = bool(quote) and quote in text
    is_open = False
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if number <= skip_lines:
            continue
        if not is_open:
            is_comment = comment and line.startswith(comment)
            if line == "\n" or is_comment:
                continue
            yield number
        if has_quotes and (is_open or quote in line):
            is_open = _is_open_after(line, delimiter, quote, is_open=is_open)


def _is_open_after(line: str, delimiter: str, quote: str, *, is_open: bool) -> bool:
    """Returns whether a quoted text goes on after a line; `is_open` says so of the line before."""
    position = 0
    while position >= 0:
        # Only at the beginning of a field a quote is more than a character.
        if not is_open and line.startswith(quote, position):
            is_open = True
            position += 1
        if is_open:
            position = _end_of_quoted(line, quote, position)
            if position < 0:
                return True
            is_open = False
        after = line.find(delimiter, position)
        position = after + 1 if after >= 0 else -1
    return False


def _end_of_quoted(line: str, quote: str, position: int) -> int:
    """Returns the position after the quote that closes a text; -1 if the line has none."""
    while True:
        end = line.find(quote, position)
        if end < 0:
            return -1
        # Two quotes stand for one in the text.
        if not line.startswith(quote, end + 1):
            return end + 1
        position = end + 2


def find_swallowed(
    columns: Sequence[pa.ChunkedArray | None], index: int, delimiter: str
) -> np.ndarray:
    """Returns the rows whose text in a column takes in other rows of the file, int64 [K].

    Args:
        columns: Columns of text, all those of the file; None for one that was not read.
        index: Number of the column.
        delimiter: Separator of the fields.
    """
    values = columns[index]
    assert values is not None
    has_break = pc.fill_null(pc.match_substring_regex(values, _LINE_BREAK), False)
    rows = np.flatnonzero(has_break.to_numpy())
    if not rows.size:
        return rows
    texts = values.take(pa.array(rows)).combine_chunks()
    likely = _with_lines_like_records(texts, index, len(columns), delimiter)
    rows = rows[likely]
    if not rows.size:
        return rows
    # Only now: most line breaks are those of descriptions, and were ruled out by counting.
    looks = [_look_at(column) for column in columns]
    found = []
    for row in rows.tolist():
        lines = re.split(_LINE_BREAK, values[row].as_py(), maxsplit=_LINES)
        if _holds_records(lines, looks, index, delimiter):
            found.append(row)
    return np.array(found, np.int64)


def _with_lines_like_records(
    texts: pa.StringArray, index: int, num_columns: int, delimiter: str
) -> np.ndarray:
    """Marks the texts with a line that has as many delimiters as a record would: bool [N]."""
    lines = pc.split_pattern_regex(texts, _LINE_BREAK)
    ends = np.cumsum(pc.list_value_length(lines).to_numpy())
    count = pc.count_substring(lines.flatten(), delimiter).to_numpy()
    is_like = count == num_columns - 1
    # The last line begins a record that ends after the text; the first one ends one.
    # -1 for none: in the first column it begins nothing, and each line without a delimiter would
    # do.
    is_like[ends - 1] = count[ends - 1] == (index or -1)
    starts = np.concatenate([[0], ends[:-1]])
    is_like[starts] = count[starts] == ((num_columns - 1 - index) or -1)
    return np.logical_or.reduceat(is_like, starts)


@dataclasses.dataclass(frozen=True)
class _Column:
    """Looks of the values of a column.

    Attributes:
        shapes: Their shapes, if these are few.
        is_distinct: Whether other texts would hardly look so.
    """

    shapes: frozenset[str]
    is_distinct: bool

    def fits(self, field: str) -> bool:
        # An empty field is missing, which is of no shape.
        return not self.shapes or not field or _shape(field) in self.shapes


def _look_at(column: pa.ChunkedArray | None) -> _Column:
    if column is None:
        return _Column(frozenset(), is_distinct=False)
    sample = column.take(pa.array(evenly_spaced(np.arange(len(column)), _SAMPLE))).drop_null()
    shapes = {_shape(value) for value in sample.to_pylist()}
    # Texts of any shape tell nothing apart.
    if len(shapes) > _MAX_SHAPES:
        return _Column(frozenset(), is_distinct=False)
    # Words are the same in any text.
    has_digits = all("9" in shape for shape in shapes)
    return _Column(frozenset(shapes), is_distinct=bool(shapes) and has_digits)


def _shape(text: str) -> str:
    """Returns a text with each run of digits as 9, and each of letters as a.

    >>> _shape("u17-BX")
    'a9-a'
    """
    return re.sub(r"[^\W\d_]+", "a", re.sub(r"\d+", "9", text.strip()))


def _holds_records(
    lines: list[str], columns: Sequence[_Column], index: int, delimiter: str
) -> bool:
    """Returns whether lines of a text are rows of a file with these columns.

    Args:
        lines: The lines: the end of a record, records, and the beginning of one.
        columns: All columns of the file.
        index: Column of the text.
        delimiter: Separator of the fields.
    """
    parts = [(lines[0].split(delimiter)[1:], columns[index + 1 :])]
    parts += [(line.split(delimiter), columns) for line in lines[1:-1]]
    parts.append((lines[-1].split(delimiter)[:-1], columns[:index]))
    if any(_is_record(fields, of) for fields, of in parts):
        return True
    # Where the columns are words throughout, only several records in a row tell.
    middle = parts[1:-1]
    has_no_looks = not any(column.is_distinct for column in columns)
    return has_no_looks and len(middle) > 1 and all(len(f) == len(of) for f, of in middle)


def _is_record(fields: list[str], columns: Sequence[_Column]) -> bool:
    if len(fields) != len(columns):
        return False
    fits = all(column.fits(field) for field, column in zip(fields, columns))
    is_told = any(column.is_distinct and field for field, column in zip(fields, columns))
    return fits and is_told

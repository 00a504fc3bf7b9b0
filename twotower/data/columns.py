"""Columns as files have them into columns of our types: text, seconds, numbers.

Everything works on whole columns. Where a value cannot be understood, `BadValue` says in which row.
"""

from __future__ import annotations

import json
import math
import re

import pyarrow as pa

from twotower.core.arrow import BadValue, Convert, convert_rows, is_list, pc
from twotower.core.times import TimeForm

_ISO = re.compile(r"\s*\d{4}-\d{2}-\d{2}([T ]\d|\s*$)")
# Only tells which conversions to try; Arrow's own parser decides.
_NUMBER = re.compile(r"\s*-?\d+(\.\d*)?([eE][+-]?\d+)?\s*$")
# Numbers that are codes: a zero leads, or no int64 holds their digits.
_CODE = r"^\s*-?0\d|^\s*-?\d{19,}\s*$"


def id_text(value: object) -> str:
    """Returns one id as text, as `to_ids` does for a column.

    >>> id_text(42), id_text(42.0), id_text("042")
    ('42', '42', '042')
    """
    # A frame's column of whole ids with gaps is one of floats.
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def to_numbers(column: pa.ChunkedArray, *, smallest: float = -math.inf) -> pa.ChunkedArray:
    """Returns float32 numbers.

    Raises:
        BadValue: A text is no number, or a number is below `smallest`.
    """
    # Compared as float64: float32 would round first.
    values = convert_rows(column, lambda x: _trim(x).cast(pa.float64()), "is not a number")
    # -1 without such a row; null and NaN are not below anything.
    row = pc.index(pc.less(values, smallest), True).as_py()
    if row >= 0:
        raise BadValue(column[row].as_py(), f"is not at least {smallest:g}", row)
    # float32, as in the arrays that training reads.
    return values.cast(pa.float32())


def infer_type(column: pa.ChunkedArray, *, form: str = "") -> pa.ChunkedArray:
    """Returns a column of text as another type if all its values are of that type, else as text.

    The types are whole numbers, numbers, booleans, and seconds of times. Codes keep their text:
    numbers with leading zeros, and more digits than an integer can hold.

    Args:
        column: Text.
        form: Strptime form of times in addition to ISO 8601.
    """
    first = first_value(column)
    if first is None:
        return column
    # The first value decides which types are worth a try on the whole column.
    if _NUMBER.match(first):
        attempts: list[Convert] = [lambda x: _parse_number(_trim(x))]
        if _any_match(column, _CODE):
            return column
    elif first.strip().lower() in ("true", "false"):
        attempts = [lambda x: _trim(x).cast(pa.bool_())]
    else:
        attempts = []
        if _ISO.match(first):
            attempts.append(TimeForm().column)
        if form:
            attempts.append(TimeForm(format=form).column)
    # From the narrowest type to the widest; the first one that fits every value is taken.
    for convert in attempts:
        try:
            return convert(column)
        except (pa.ArrowInvalid, BadValue):
            continue
    return column


def simplify_type(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns a typed column as one of few types.

    They are strings, numbers, booleans, int64 seconds of times, and lists of strings or of floating
    point numbers.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        # Dictionaries of several files have different codes for one value.
        return simplify_type(decode_dictionary(column))
    if pa.types.is_date(kind) or pa.types.is_timestamp(kind):
        # Seconds as everywhere, whatever unit the file has.
        return TimeForm().column(column)
    if pa.types.is_decimal(kind):
        return column.cast(pa.float64())
    if is_list(kind):
        # No feature reads lists of lists or structs from a table.
        if pa.types.is_nested(kind.value_type):
            return to_json_text(column)
        # Vectors: as text they would be ten times as large.
        if kind.value_type in (pa.float32(), pa.float64()):
            return column.cast(pa.list_(kind.value_type))
        return column.cast(pa.list_(pa.string()))
    if _is_text_like(kind):
        return column.cast(pa.string())
    return column


def decode_dictionary(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns the values of a column of categories."""
    kind = column.type
    if not pa.types.is_string_view(kind.value_type):
        return column.cast(kind.value_type)
    # Arrow has no cast for these, which frames of polars have.
    chunks = []
    for chunk in column.chunks:
        chunks.append(chunk.dictionary.cast(pa.string()).take(chunk.indices))
    return pa.chunked_array(chunks, pa.string())


def first_value(column: pa.ChunkedArray) -> str | None:
    """Returns the first value that is not null, or None without one."""
    row = pc.index(pc.is_valid(column), True).as_py()
    if row < 0:
        return None
    return column[row].as_py()


def to_json_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns the values of a column as text: text as it is, others as JSON."""
    texts = [value_to_text(value) for value in column.to_pylist()]
    return pa.chunked_array([pa.array(texts, pa.string())])


def value_to_text(value: object) -> str | None:
    """Returns text as it is, None as None, and any other value as JSON."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, default=str, ensure_ascii=False)


def _is_text_like(kind: pa.DataType) -> bool:
    return (
        pa.types.is_null(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_binary(kind)
    )


def _parse_number(column: pa.ChunkedArray) -> pa.ChunkedArray:
    try:
        # Whole numbers first: float64 would lose digits beyond 2^53.
        return column.cast(pa.int64())
    except pa.ArrowInvalid:
        return column.cast(pa.float64())


def _trim(column: pa.ChunkedArray) -> pa.ChunkedArray:
    # Trimming copies the column, so only columns that need it are trimmed.
    if pa.types.is_string(column.type) and _any_match(column, r"^\s|\s$"):
        return pc.utf8_trim_whitespace(column)
    return column


def _any_match(column: pa.ChunkedArray, pattern: str) -> bool:
    return bool(pc.any(pc.match_substring_regex(column, pattern)).as_py())


def _all_match(column: pa.ChunkedArray, pattern: str) -> bool:
    # The first value tells most columns, without a look at the others.
    first = first_value(column)
    if first is None or not re.match(pattern, first):
        return False
    return pc.all(pc.match_substring_regex(column, pattern)).as_py()

"""Columns as files have them into columns of our types: text, seconds, numbers.

Everything works on whole columns. Where a value cannot be understood, `BadValue` says in which row.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable

import numpy as np
import pyarrow as pa

from twotower.core.arrow import UNITS_PER_SECOND, is_list, pc

_ISO = re.compile(r"\s*\d{4}-\d{2}-\d{2}([T ]\d|\s*$)")
# Only tells which conversions to try; Arrow's own parser decides.
_NUMBER = re.compile(r"\s*-?\d+(\.\d*)?([eE][+-]?\d+)?\s*$")
# Numbers that are codes: a zero leads, or no int64 holds their digits.
_CODE = r"^\s*-?0\d|^\s*-?\d{19,}\s*$"
# Arrow parses ISO 8601 by the type that it is cast to: with or without a zone, up to nanoseconds.
_ISO_TYPES = tuple(pa.timestamp(unit, zone) for unit in ("us", "ns") for zone in (None, "UTC"))

Convert = Callable[[pa.ChunkedArray], pa.ChunkedArray]


class BadValue(ValueError):
    """A value of the wrong type for its column.

    Attributes:
        row: Row of the whole table, from 0.
        value: Value as it was read.
        right: Words for a right value, such as "a number".
    """

    def __init__(self, row: int, value: object, right: str):
        super().__init__(f"row {row}: {value!r} is not {right}")
        self.row = row
        self.value = value
        self.right = right


def to_ids(column: pa.ChunkedArray, *, is_typed: bool) -> pa.ChunkedArray:
    """Returns ids as strings: 42 is "42" and so is 42.0; empty ones are null.

    Args:
        column: Ids.
        is_typed: Whether the file stores types, as Parquet does. If it does not, and every id ends
            in ".0", the ending is removed: pandas writes whole numbers with gaps so.
    """
    # Before text is made of them: "42.0" would be another id than "42".
    if pa.types.is_floating(column.type):
        # pandas turns whole ids with gaps into floats, with NaN in the gaps.
        column = pc.if_else(pc.is_nan(column), None, column)
        is_whole = pc.all(pc.equal(pc.floor(column), column)).as_py()
        if is_whole:
            column = column.cast(pa.int64())
    column = column.cast(pa.string())
    # An id that is empty text is missing, as in CSV files, where the two look the same.
    column = pc.if_else(pc.equal(column, ""), None, column)
    # Every id or none: a single "1.0" among others is an id of its own.
    if not is_typed and _all_match(column, r"^-?\d+\.0+$"):
        column = pc.replace_substring_regex(column, r"\.0+$", "")
    return column


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
    values = _convert(column, lambda x: _trim(x).cast(pa.float64()), "a number")
    # -1 without such a row; null and NaN are not below anything.
    row = pc.index(pc.less(values, smallest), True).as_py()
    if row >= 0:
        raise BadValue(row, column[row].as_py(), f"at least {smallest:g}")
    # float32, as in the arrays that training reads.
    return values.cast(pa.float32())


def to_seconds(column: pa.ChunkedArray, *, form: str = "", unit: str = "s") -> pa.ChunkedArray:
    """Returns int64 seconds since the epoch, UTC.

    Args:
        column: Times, dates, numbers, or text.
        form: Strptime form of text; empty means ISO 8601, or numbers.
        unit: Unit of numbers, a key of `UNITS_PER_SECOND`.

    Raises:
        BadValue: A text is no time.
    """
    # Typed columns first: their meaning does not depend on the options for text.
    kind = column.type
    if pa.types.is_temporal(kind):
        return _time_to_seconds(column)
    if form:
        return _parse_form(column.cast(pa.string()), form)
    if not pa.types.is_string(kind):
        return _scale(column, UNITS_PER_SECOND[unit])
    # The first value decides between numbers and dates for the whole column.
    first = first_value(column)
    if first is None or _NUMBER.match(first):
        return _convert(
            column,
            lambda x: _scale(_parse_number(_trim(x)), UNITS_PER_SECOND[unit]),
            f"a number (of {unit})",
        )
    right = (
        "an ISO 8601 time such as 2025-01-31 18:30:00 (else set timestamp_format, for example "
        f"{_guess_form(first)!r})"
    )
    return _convert(column, _parse_iso, right)


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
            attempts.append(_parse_iso)
        if form:
            attempts.append(lambda x: _parse_form(x, form))
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
        return _time_to_seconds(column)
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


def _convert(column: pa.ChunkedArray, convert: Convert, right: str) -> pa.ChunkedArray:
    """Converts a column, or raises BadValue for the first row at which that fails.

    The row is found by halving: Arrow's messages do not say which it was.
    """
    try:
        return convert(column)
    except pa.ArrowInvalid:
        pass
    # About twenty conversions for a million rows; row by row it would be a million.
    low = 0
    high = len(column)
    # Rows before `low` convert, and those before `high` do not.
    while high - low > 1:
        middle = (low + high) // 2
        try:
            convert(column.slice(low, middle - low))
            low = middle
        except pa.ArrowInvalid:
            high = middle
    raise BadValue(low, column[low].as_py(), right)


def _time_to_seconds(column: pa.ChunkedArray) -> pa.ChunkedArray:
    # The zone is kept, so that this changes the unit alone: Arrow stores UTC whatever the zone.
    zone = getattr(column.type, "tz", None)
    # Through microseconds, which Arrow casts dates and all times to. Not safe: fractions of a
    # second are dropped.
    fine = column.cast(pa.timestamp("us", zone), safe=False)
    return fine.cast(pa.timestamp("s", zone), safe=False).cast(pa.int64())


def _parse_iso(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns the seconds of ISO 8601 times.

    Raises:
        pa.ArrowInvalid: A value is no such time.
    """
    column = _trim(column)
    # Zones and fractions differ between files, but rarely within a column.
    for kind in _ISO_TYPES[:-1]:
        try:
            return _time_to_seconds(column.cast(kind))
        except pa.ArrowInvalid:
            continue
    return _time_to_seconds(column.cast(_ISO_TYPES[-1]))


def _parse_form(column: pa.ChunkedArray, form: str) -> pa.ChunkedArray:
    # With `error_is_null` all failed rows are null at once; below they are told apart from missing
    # values.
    times = pc.strptime(column, format=form, unit="s", error_is_null=True)
    failed = pc.and_(pc.is_null(times), pc.is_valid(column)).to_numpy()
    rows = np.flatnonzero(failed)
    if rows.size:
        row = int(rows[0])
        raise BadValue(row, column[row].as_py(), f"a time of the form {form!r}")
    return times.cast(pa.int64())


def _scale(column: pa.ChunkedArray, per_second: int) -> pa.ChunkedArray:
    """Returns numbers of a unit as whole seconds, rounded down."""
    if pa.types.is_integer(column.type):
        column = column.cast(pa.int64())
        # Integers are divided as such: nanoseconds have more digits than a float holds.
        if per_second == 1:
            return column
        return pc.divide(column, per_second)
    # NaN has no integer: the cast below would fail.
    column = pc.if_else(pc.is_nan(column), None, column)
    # Down, not towards 0: times before 1970 are negative.
    return pc.floor(pc.divide(column, float(per_second))).cast(pa.int64())


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


def _guess_form(text: str) -> str:
    """Returns a strptime form that a time might have, as an example for a message."""
    if "/" in text:
        day = "%d/%m/%Y"
    elif "." in text:
        day = "%d.%m.%Y"
    else:
        day = "%d %b %Y"
    if ":" not in text:
        return day
    return f"{day} %H:%M"

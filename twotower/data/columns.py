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

from twotower.core.arrow import pc
from twotower.core.times import UNITS_PER_SECOND

_ISO = re.compile(r"\s*\d{4}-\d{2}-\d{2}([T ]\d|\s*$)")
_NUMBER = re.compile(r"\s*-?\d+(\.\d*)?([eE][+-]?\d+)?\s*$")
# Numbers that are codes: a zero leads, or no int64 holds their digits.
_CODE = r"^\s*-?0\d|^\s*-?\d{19,}\s*$"
# Arrow parses ISO 8601 by the type that it is cast to: with or without a zone, up to nanoseconds.
_ISO_TYPES = tuple(pa.timestamp(unit, zone) for unit in ("us", "ns") for zone in (None, "UTC"))

Convert = Callable[[pa.ChunkedArray], pa.ChunkedArray]


class BadValue(ValueError):
    """A value that is not what its column asks for.

    Attributes:
        row: Row of the whole table, from 0.
        value: The value as it was read.
        right: What would be right, such as "a number".
    """

    def __init__(self, row: int, value: object, right: str):
        super().__init__(f"row {row}: {value!r} is not {right}")
        self.row = row
        self.value = value
        self.right = right


def to_ids(column: pa.ChunkedArray, *, is_typed: bool) -> pa.ChunkedArray:
    """Returns ids as strings: 42 is "42" and so is 42.0; empty ones are null.

    Args:
        column: The ids.
        is_typed: Whether the file knows types, as Parquet does. If it does not, and every id ends
            in ".0", that ending goes: it is what pandas makes of whole numbers with gaps.
    """
    if pa.types.is_floating(column.type):
        # pandas turns whole ids with gaps into floats, with NaN in the gaps.
        column = pc.if_else(pc.is_nan(column), None, column)
        is_whole = pc.all(pc.equal(pc.floor(column), column)).as_py()
        column = column.cast(pa.int64()) if is_whole else column
    column = column.cast(pa.string())
    column = pc.if_else(pc.equal(column, ""), None, column)
    if not is_typed and _all_match(column, r"^-?\d+\.0+$"):
        column = pc.replace_substring_regex(column, r"\.0+$", "")
    return column


def to_numbers(column: pa.ChunkedArray, *, smallest: float = -math.inf) -> pa.ChunkedArray:
    """Returns float32 numbers.

    Raises:
        BadValue: A text is no number, or a number is below `smallest`.
    """
    # Compared as float64: float32 would round first.
    values = _convert(column, lambda x: _trim(x).cast(pa.float64()), "a number")
    row = pc.index(pc.less(values, smallest), True).as_py()
    if row >= 0:
        raise BadValue(row, column[row].as_py(), f"at least {smallest:g}")
    return values.cast(pa.float32())


def to_seconds(column: pa.ChunkedArray, *, form: str = "", unit: str = "s") -> pa.ChunkedArray:
    """Returns int64 seconds since the epoch, UTC.

    Args:
        column: Times, dates, numbers, or text.
        form: strptime form of text; empty means ISO 8601, or numbers.
        unit: Unit of numbers, a key of `UNITS_PER_SECOND`.

    Raises:
        BadValue: A text is no time.
    """
    kind = column.type
    if pa.types.is_temporal(kind):
        return _time_to_seconds(column)
    if form:
        return _parse_form(column.cast(pa.string()), form)
    if not pa.types.is_string(kind):
        return _scale(column, UNITS_PER_SECOND[unit])
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
    """Returns a column of text as another type where every value is of it, else as it is.

    The types are whole numbers, numbers, booleans, and seconds of times. Codes keep their text:
    numbers with leading zeros, and more digits than an integer can hold.

    Args:
        column: The text.
        form: strptime form of times beside ISO 8601.
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
        attempts = [_parse_iso] if _ISO.match(first) else []
        if form:
            attempts.append(lambda x: _parse_form(x, form))
    for convert in attempts:
        try:
            return convert(column)
        except (pa.ArrowInvalid, BadValue):
            continue
    return column


def simplify_type(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns a typed column as one of few types.

    They are strings, numbers, booleans, int64 seconds of times, and lists of strings.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        return simplify_type(column.cast(kind.value_type))
    if pa.types.is_date(kind) or pa.types.is_timestamp(kind):
        return _time_to_seconds(column)
    if pa.types.is_decimal(kind):
        return column.cast(pa.float64())
    if is_list(kind):
        if pa.types.is_nested(kind.value_type):
            return to_json_text(column)
        return column.cast(pa.list_(pa.string()))
    if _is_text_like(kind):
        return column.cast(pa.string())
    return column


def is_list(kind: pa.DataType) -> bool:
    """Returns whether a type is one of Arrow's three types of lists."""
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def first_value(column: pa.ChunkedArray) -> str | None:
    """Returns the first value that is not null, or None without one."""
    row = pc.index(pc.is_valid(column), True).as_py()
    return None if row < 0 else column[row].as_py()


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
    zone = getattr(column.type, "tz", None)
    # Through microseconds, which Arrow casts dates and all times to. Not safe: fractions of a
    # second are dropped.
    fine = column.cast(pa.timestamp("us", zone), safe=False)
    return fine.cast(pa.timestamp("s", zone), safe=False).cast(pa.int64())


def _parse_iso(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns the seconds of ISO 8601 times.

    Raises:
        pa.ArrowInvalid: A value is none.
    """
    column = _trim(column)
    for kind in _ISO_TYPES[:-1]:
        try:
            return _time_to_seconds(column.cast(kind))
        except pa.ArrowInvalid:
            continue
    return _time_to_seconds(column.cast(_ISO_TYPES[-1]))


def _parse_form(column: pa.ChunkedArray, form: str) -> pa.ChunkedArray:
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
        return column if per_second == 1 else pc.divide(column, per_second)
    column = pc.if_else(pc.is_nan(column), None, column)
    return pc.floor(pc.divide(column, float(per_second))).cast(pa.int64())


def _parse_number(column: pa.ChunkedArray) -> pa.ChunkedArray:
    try:
        return column.cast(pa.int64())
    except pa.ArrowInvalid:
        return column.cast(pa.float64())


def _trim(column: pa.ChunkedArray) -> pa.ChunkedArray:
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
    return f"{day} %H:%M" if ":" in text else day

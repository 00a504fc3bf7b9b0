"""Columns as files have them -> columns as the library wants them: ids as text, times as seconds,
numbers as numbers.

Everything works on whole columns. Where a value cannot be understood, `BadValue` says in which row.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.json

from twotower.core.arrow import pc
from twotower.core.times import UNITS_PER_SECOND

_ISO = re.compile(r"\s*\d{4}-\d{2}-\d{2}([T ]\d|\s*$)")
_NUMBER = re.compile(r"\s*-?\d+(\.\d*)?([eE][+-]?\d+)?\s*$")
_TIMES = tuple(pa.timestamp(unit, zone) for unit in ("us", "ns") for zone in (None, "UTC"))


class BadValue(ValueError):
    """The value at `row` (from 0, of the whole table) is not `right`."""

    def __init__(self, row: int, value: object, right: str):
        super().__init__(f"row {row}: {value!r} is not {right}")
        self.row, self.value, self.right = row, value, right


def ids(column: pa.ChunkedArray, *, typed: bool) -> pa.ChunkedArray:
    """Ids as strings: 42 is "42" and so is 42.0; empty ones are null.

    Args:
        typed: the file knows types (Parquet); else "42.0" everywhere is what pandas makes of whole
            numbers with gaps.
    """
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
        whole = pc.all(pc.equal(pc.floor(column), column)).as_py()
        column = column.cast(pa.int64()) if whole else column
    column = column.cast(pa.string())
    column = pc.if_else(pc.equal(column, ""), None, column)
    if not typed and _all_match(column, r"^-?\d+\.0+$"):
        column = pc.replace_substring_regex(column, r"\.0+$", "")
    return column


def numbers(column: pa.ChunkedArray, *, least: float = -math.inf) -> pa.ChunkedArray:
    """float32 numbers; raises BadValue for text that is none, and for what is below `least`."""
    values = _converted(column, lambda c: _trimmed(c).cast(pa.float64()), "a number")
    low = pc.index(pc.less(values, least), True).as_py()
    if low >= 0:
        raise BadValue(low, column[low].as_py(), f"at least {least:g}")
    return values.cast(pa.float32())


def seconds(column: pa.ChunkedArray, *, form: str = "", unit: str = "s") -> pa.ChunkedArray:
    """int64 seconds since the epoch, UTC, of times, dates, numbers of `unit`, or text (`form`, or
    ISO 8601)."""
    kind = column.type
    if pa.types.is_temporal(kind):
        return (
            column.cast(pa.timestamp("us", getattr(kind, "tz", None)), safe=False)
            .cast(pa.timestamp("s", getattr(kind, "tz", None)), safe=False)
            .cast(pa.int64())
        )
    if form:
        return _by_format(column.cast(pa.string()), form)
    if not pa.types.is_string(kind):
        return _scaled(column, UNITS_PER_SECOND[unit])
    first = _first(column)
    if first is None or _NUMBER.match(first):
        return _converted(
            column,
            lambda c: _scaled(_numeric(_trimmed(c)), UNITS_PER_SECOND[unit]),
            f"a number (of {unit})",
        )
    right = f"an ISO 8601 time such as 2025-01-31 18:30:00 (else set timestamp_format, for example {_guess(first)!r})"
    return _converted(column, _iso, right)


def inferred(column: pa.ChunkedArray, *, form: str = "") -> pa.ChunkedArray:
    """A column of text as whole numbers, numbers, booleans or seconds, where every value is one;
    else as it is.

    Codes keep their text: numbers with leading zeros, and more digits than a float can hold.
    """
    first = _first(column)
    if first is None:
        return column
    if _NUMBER.match(first):
        kinds = [lambda c: _numeric(_trimmed(c))]
        if _any_match(column, r"^\s*-?0\d|^\s*-?\d{19,}\s*$"):
            return column
    elif first.strip().lower() in ("true", "false"):
        kinds = [lambda c: _trimmed(c).cast(pa.bool_())]
    else:
        kinds = [_iso] if _ISO.match(first) else []
        kinds += [lambda c: _by_format(c, form)] if form else []
    for convert in kinds:
        try:
            return convert(column)
        except (pa.ArrowInvalid, BadValue):
            continue
    return column


def plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A typed column in one of few types: string, number, boolean, int64 seconds of times, lists of
    strings."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return plain(column.cast(kind.value_type))
    if pa.types.is_date(kind) or pa.types.is_timestamp(kind):
        return seconds(column)
    if pa.types.is_decimal(kind):
        return column.cast(pa.float64())
    if any(
        test(kind)
        for test in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    ):
        return (
            _as_text(column)
            if pa.types.is_nested(kind.value_type)
            else column.cast(pa.list_(pa.string()))
        )
    textual = (
        pa.types.is_null,
        pa.types.is_large_string,
        pa.types.is_string_view,
        pa.types.is_binary,
    )
    if any(test(kind) for test in textual):
        return column.cast(pa.string())
    return column


def expand(table: pa.Table, *, wanted: set[str]) -> pa.Table:
    """Fields of structs and of text columns of JSON objects as columns `column.field`, in place of
    their column.

    Args:
        wanted: columns whose fields are asked for: for these a value that is no JSON object is an
            error, while another column of which only some values are objects stays text.
    """
    columns: dict[str, pa.ChunkedArray] = {}
    for name in table.column_names:
        column = table[name]
        if pa.types.is_string(column.type) and _is_object(_first(column)):
            try:
                column = _parsed(column)
            except BadValue:
                if name in wanted:
                    raise
        columns.update(_fields(name, column))
    return pa.table(columns)


def _fields(name: str, column: pa.ChunkedArray) -> dict[str, pa.ChunkedArray]:
    if not pa.types.is_struct(column.type):
        return {name: column}
    fields: dict[str, pa.ChunkedArray] = {}
    for field, values in zip(column.type, column.flatten(), strict=True):
        fields.update(_fields(f"{name}.{field.name}", values))
    return fields


def _is_object(text: str | None) -> bool:
    try:
        return text is not None and text.lstrip()[:1] == "{" and isinstance(json.loads(text), dict)
    except json.JSONDecodeError:
        return False


def _parsed(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """JSON objects as structs, null as a struct of nulls; types that differ between rows become
    text."""
    lines = pc.fill_null(pc.replace_substring_regex(column, r"[\r\n]+", " "), "{}").to_pylist()
    # One more object than there are rows: Arrow refuses text in which no object has a field.
    text = "\n".join([*lines, '{"": null}']).encode()
    options = pyarrow.json.ReadOptions(block_size=len(text) + 1, use_threads=False)
    try:
        table = pyarrow.json.read_json(io.BytesIO(text), read_options=options)
        if len(table) != len(lines) + 1:
            raise pa.ArrowInvalid("a value holds several objects")
    except pa.ArrowInvalid:
        return _parsed_slowly(lines)
    names = [name for name in table.column_names if name]
    table = table.select(names).slice(0, len(lines)).combine_chunks()
    return pa.chunked_array([table.to_struct_array().combine_chunks()])


def _parsed_slowly(lines: list[str]) -> pa.ChunkedArray:
    objects = []
    for row, line in enumerate(lines):
        try:
            objects.append(json.loads(line))
        except json.JSONDecodeError:
            objects.append(None)
        if not isinstance(objects[-1], dict):
            raise BadValue(row, line, "a JSON object")
    names = dict.fromkeys(name for value in objects for name in value)
    arrays = {name: _array([value.get(name) for value in objects]) for name in names}
    return pa.chunked_array([pa.StructArray.from_arrays(list(arrays.values()), list(arrays))])


def _array(values: list) -> pa.Array:
    """Values of one type as such; of several as text, or lists of text where all are lists."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        if all(value is None or isinstance(value, list) for value in values):
            return pa.array(
                [value and [_text(part) for part in value] for value in values],
                pa.list_(pa.string()),
            )
        return pa.array([_text(value) for value in values], pa.string())


def _text(value: object) -> str | None:
    return (
        value
        if value is None or isinstance(value, str)
        else json.dumps(value, default=str, ensure_ascii=False)
    )


def _as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array([_text(value) for value in column.to_pylist()], pa.string())])


def _converted(column: pa.ChunkedArray, convert: Callable, right: str) -> pa.ChunkedArray:
    """`convert(column)`, or BadValue for the first row at which it fails, found by halving."""
    try:
        return convert(column)
    except pa.ArrowInvalid:
        low, high = 0, len(column)  # rows before `low` convert, those before `high` do not
        while high - low > 1:
            middle = (low + high) // 2
            try:
                convert(column.slice(low, middle - low))
                low = middle
            except pa.ArrowInvalid:
                high = middle
        raise BadValue(low, column[low].as_py(), right) from None


def _iso(column: pa.ChunkedArray) -> pa.ChunkedArray:
    column = _trimmed(column)
    for kind in _TIMES:
        try:
            return seconds(column.cast(kind))
        except pa.ArrowInvalid as failed:
            error = failed
    raise error


def _by_format(column: pa.ChunkedArray, form: str) -> pa.ChunkedArray:
    times = pc.strptime(column, format=form, unit="s", error_is_null=True)
    bad = np.flatnonzero(pc.and_(pc.is_null(times), pc.is_valid(column)).to_numpy())
    if bad.size:
        raise BadValue(int(bad[0]), column[int(bad[0])].as_py(), f"a time of the form {form!r}")
    return times.cast(pa.int64())


def _scaled(column: pa.ChunkedArray, per_second: int) -> pa.ChunkedArray:
    if pa.types.is_integer(column.type):
        column = column.cast(pa.int64())
        return column if per_second == 1 else pc.divide(column, per_second)
    column = pc.if_else(pc.is_nan(column), None, column)
    return pc.floor(pc.divide(column, float(per_second))).cast(pa.int64())


def _numeric(column: pa.ChunkedArray) -> pa.ChunkedArray:
    try:
        return column.cast(pa.int64())
    except pa.ArrowInvalid:
        return column.cast(pa.float64())


def _trimmed(column: pa.ChunkedArray) -> pa.ChunkedArray:
    padded = pa.types.is_string(column.type) and _any_match(column, r"^\s|\s$")
    return pc.utf8_trim_whitespace(column) if padded else column


def _any_match(column: pa.ChunkedArray, pattern: str) -> bool:
    return bool(pc.any(pc.match_substring_regex(column, pattern)).as_py())


def _all_match(column: pa.ChunkedArray, pattern: str) -> bool:
    first = _first(
        column
    )  # most columns are told by their first value, without looking at the others
    if first is None or not re.match(pattern, first):
        return False
    return pc.all(pc.match_substring_regex(column, pattern)).as_py()


def _first(column: pa.ChunkedArray) -> str | None:
    at = pc.index(pc.is_valid(column), True).as_py()
    return None if at < 0 else column[at].as_py()


def _guess(text: str) -> str:
    day = "%d/%m/%Y" if "/" in text else "%d.%m.%Y" if "." in text else "%d %b %Y"
    return day + (" %H:%M" if ":" in text else "")

"""Conditions on the columns of a table: (column, operator, value).

The filters of a log and the conditions of a live query share these operators. The module knows
nothing of either, so that a server that filters items loads no data sets.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa

from twotower.core.arrow import BadValue, is_list, is_missing, pc, plain_text
from twotower.core.errors import ConfigError, choose, echo
from twotower.core.fields import check_fields
from twotower.core.times import UNITS_PER_SECOND, TimeForm, TimeUnit

# Text that is a time whatever its column holds: a date comes first.
_ISO_DATE = re.compile(r"\s*\d{4}-\d{1,2}-\d{1,2}([Tt ].*)?")
_NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*")
# Seconds since 1970 of 1973 and of 2100: the newest time of a column of numbers lies between them.
_FIRST_TIME = 10**8
_LAST_TIME = 4_102_444_800
_LARGEST = 2**63  # of the integers that a column can hold, less one


@runtime_checkable
class Comparison(Protocol):
    """A comparison of a column with a value: bool [N], null for null values of the column.

    `field` is the name of the condition in messages.
    """

    def __call__(self, column: pa.ChunkedArray, value: Any, field: str) -> pa.ChunkedArray: ...


@dataclasses.dataclass(frozen=True)
class Operator:
    """An operator of a condition.

    Attributes:
        compare: Comparison of a column with a value.
        is_negated: Whether the rows are those for which `compare` does not hold, nulls included.
    """

    compare: Comparison
    is_negated: bool = False


class Members(NamedTuple):
    """Values of which a list must hold one: what the operator `contains` compares with.

    Attributes:
        values: The values.
        separator: Text between the members of a list that is kept as one text; empty for lists.
    """

    values: tuple[Any, ...]
    separator: str = ""


def _equal(column: pa.ChunkedArray, value: Any, field: str) -> pa.ChunkedArray:
    # Before types are compared: a missing value has none.
    if value is None:
        return pc.is_null(column)
    column, (value,) = _comparable(column, [value], field)
    return pc.equal(column, pa.scalar(value))


def _in(column: pa.ChunkedArray, value: Any, field: str) -> pa.ChunkedArray:
    if not isinstance(value, (tuple, list)):
        raise ConfigError(
            f"{field}: {echo(value)} must be a tuple of values, such as ({echo(value)},)."
        )
    column, members = _comparable(column, value, field)
    try:
        return pc.is_in(column, value_set=pa.array(members).cast(column.type))
    except pa.ArrowInvalid as error:
        raise ConfigError(f"{field}: the column holds {column.type}, and {error}.") from error


def _contains(column: pa.ChunkedArray, value: Any, field: str) -> pa.ChunkedArray:
    if not isinstance(value, Members):
        value = Members(tuple(value) if isinstance(value, (tuple, list)) else (value,))
    if value.separator and pa.types.is_string(column.type):
        column = pc.split_pattern(column, value.separator)
        # "Comedy | Drama" has the member "Drama".
        members = pc.utf8_trim_whitespace(_flat_members(column))
    elif is_list(column.type):
        members = _flat_members(column)
    else:
        raise ConfigError(
            f"{field}: the column holds {column.type}, and 'contains' asks for a member of a list: "
            "compare with '==' or 'starts with'."
        )
    is_member = pc.fill_null(_in(plain_text(members), value.values, field), False)
    # By the rows of the members that match: rows without members stay False.
    mask = np.zeros(len(column), bool)
    rows = pc.list_parent_indices(column.combine_chunks())
    mask[rows.filter(is_member.combine_chunks()).to_numpy()] = True
    return pa.chunked_array([pa.array(mask)])


def _flat_members(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pa.chunked_array([pc.list_flatten(column.combine_chunks())])


def _starts_with(column: pa.ChunkedArray, value: Any, field: str) -> pa.ChunkedArray:
    if not pa.types.is_string(column.type) or not isinstance(value, str):
        raise ConfigError(
            f"{field}: a prefix needs a column of text and a text, not {column.type} and "
            f"{type(value).__name__}."
        )
    _check_text(value, field)
    return pc.starts_with(column, value)


def _order(compare: Callable[[pa.ChunkedArray, pa.Scalar], pa.ChunkedArray]) -> Comparison:
    """Returns a comparison by one of Arrow's functions for <, <=, > and >=."""

    def order(column: pa.ChunkedArray, value: Any, field: str) -> pa.ChunkedArray:
        if pa.types.is_string(column.type):
            column, value = _ordered_texts(column, value, field)
        column, (value,) = _comparable(column, [value], field)
        return compare(column, pa.scalar(value))

    return order


OPERATORS: dict[str, Operator] = {
    "==": Operator(_equal),
    "!=": Operator(_equal, is_negated=True),
    "<": Operator(_order(pc.less)),
    "<=": Operator(_order(pc.less_equal)),
    ">": Operator(_order(pc.greater)),
    ">=": Operator(_order(pc.greater_equal)),
    "in": Operator(_in),
    "not in": Operator(_in, is_negated=True),
    "contains": Operator(_contains),
    "not contains": Operator(_contains, is_negated=True),
    "starts with": Operator(_starts_with),
    "not starts with": Operator(_starts_with, is_negated=True),
}


def matches(
    rows: pa.Table, condition: tuple, *, field: str, table: str = "the interactions table"
) -> pa.ChunkedArray:
    """Marks the rows that satisfy a condition: bool [N], never null.

    A null satisfies the negations `!=`, `not in`, `not contains` and `not starts with` and nothing
    else; `== None` and `!= None` select by being null. A column of times, whether Arrow's or
    numbers since 1970, compares with dates, times and ISO 8601. Text is ordered as times or as
    numbers where the value is one.

    Args:
        rows: Table with N rows.
        condition: (column, operator, value).
        field: Name of the condition in messages.
        table: Name of the table in messages.

    Raises:
        ConfigError: An unknown column or operator, or a value that cannot be compared with the
            column.
    """
    # Conditions are written by hand in files and requests, where a type says nothing.
    if len(condition) != 3:
        raise ConfigError(
            f"{field} must be (column, operator, value), such as ('rating', '>=', 4)."
        )
    name, symbol, value = condition
    check_fields({str(name): value}, rows.column_names, f"{field}: {table}")
    operator = choose(OPERATORS, str(symbol), f"{field}: the operator")
    # A condition is about values, not about the codes that stand for them.
    column = plain_text(rows[name])
    try:
        mask = operator.compare(column, value, field)
    # Such as a column of structs, or numbers of two types that have no common one.
    except pa.ArrowException as error:
        raise ConfigError(f"{field}: the column holds {column.type}: {error}.") from error
    # Null before the negation: a row without a value is none of those that a negation leaves out.
    mask = pc.fill_null(mask, False)
    if operator.is_negated:
        return pc.invert(mask)
    return mask


def unit_of(number: float | np.number) -> TimeUnit | None:
    """Returns the unit in which a number is a time between 1973 and 2100, None without one."""
    # One unit at most: these years are fewer than the step to the next.
    for unit, per_second in UNITS_PER_SECOND.items():
        if _FIRST_TIME * per_second <= abs(number) < _LAST_TIME * per_second:
            return unit
    return None


def is_iso_time(value: object) -> bool:
    """Returns whether a value is a time, or text that begins with a date of ISO 8601."""
    if isinstance(value, str):
        return _ISO_DATE.fullmatch(value) is not None
    return isinstance(value, (datetime.date, np.datetime64))


def _comparable(
    column: pa.ChunkedArray, values: Sequence[Any], field: str
) -> tuple[pa.ChunkedArray, list[Any]]:
    """Returns a column and values that Arrow can compare with it.

    Numbers compare with numbers, text with text, and times with times, never across.

    Raises:
        ConfigError: A value is of another type than the column.
    """
    # A value of NumPy is neither int nor float to the checks below.
    plain = [_plain_value(value) for value in values]
    # Before the type is looked at: of a CSV all columns are text.
    column = _as_meant(column, plain)
    kind = column.type
    if is_list(kind):
        raise ConfigError(
            f"{field}: the column holds lists ({kind}), which no single value equals: ask for a "
            "member by 'contains'."
        )
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return TimeForm().column(column), [_seconds(kind, value, field) for value in plain]
    if _is_number(kind):
        # A date against whole numbers: they are times since 1970 in some unit.
        if pa.types.is_integer(kind) and any(map(is_iso_time, plain)):
            plain = _as_numbers(column, plain, field)
        for value in plain:
            _check_number(kind, value, field)
        return column, plain
    for value in plain:
        is_right = isinstance(value, str) if pa.types.is_string(kind) else isinstance(value, bool)
        if not is_right or not (pa.types.is_string(kind) or pa.types.is_boolean(kind)):
            raise _incomparable(kind, value, field)
        _check_text(value, field)
    return column, plain


def _as_meant(column: pa.ChunkedArray, values: Sequence[Any]) -> pa.ChunkedArray:
    """Returns text as numbers or booleans where the values are such: files hold text alone."""
    if not pa.types.is_string(column.type) or not values:
        return column
    is_flag = all(isinstance(value, bool) for value in values)
    is_number = all(isinstance(value, (int, float)) for value in values)
    if not is_flag and not is_number:
        return column
    try:
        if is_flag:
            return column.cast(pa.bool_())
        return pc.utf8_trim_whitespace(column).cast(pa.float64())
    except pa.ArrowInvalid:
        return column


def _plain_value(value: Any) -> Any:
    """Returns a value of NumPy or Arrow as that of Python."""
    if isinstance(value, pa.Scalar):
        value = value.as_py()
    # A time of NumPy becomes a number of its unit by `item`, and would lose what it is.
    if isinstance(value, np.generic) and not isinstance(value, np.datetime64):
        return value.item()
    return value


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)


def _check_number(kind: pa.DataType, value: Any, field: str) -> None:
    """Refuses what is no number, NaN, and integers that no column can hold."""
    # A boolean is an int for Python, and no number here.
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise _incomparable(kind, value, field)
    if isinstance(value, int) and not -_LARGEST <= value < _LARGEST:
        raise ConfigError(f"{field}: {echo(value)} has more than 64 bits; no column holds it.")
    if math.isnan(value):
        raise ConfigError(f"{field}: NaN compares with nothing: ask for missing values by None.")


def _check_text(value: Any, field: str) -> None:
    """Refuses half of a character, which no column can hold."""
    if not isinstance(value, str):
        return
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{field}: {echo(value)} holds half of a character (a lone surrogate)."
        ) from None


def _as_numbers(column: pa.ChunkedArray, values: Sequence[Any], field: str) -> list[Any]:
    """Returns times as numbers in the unit of a column of whole numbers."""
    # Of the newest or the oldest, whichever is further from 1970: films are older than that.
    bounds = [value for value in pc.min_max(column).as_py().values() if value is not None]
    unit = unit_of(max(map(abs, bounds), default=_FIRST_TIME))
    if unit is None:
        raise _incomparable(column.type, next(filter(is_iso_time, values)), field)
    numbers = []
    for value in values:
        if is_iso_time(value):
            value = _seconds(column.type, value, field) * UNITS_PER_SECOND[unit]
        numbers.append(value)
    return numbers


def _seconds(kind: pa.DataType, value: Any, field: str) -> int:
    """Returns the seconds since 1970 of a time."""
    # True would be the first second of 1970.
    if isinstance(value, bool) or is_missing(value):
        raise _incomparable(kind, value, field)
    try:
        seconds = TimeForm().one(value)
    except BadValue as error:
        raise ConfigError(f"{field}: {error}") from None
    if seconds is None:
        raise _incomparable(kind, value, field)
    return seconds


def _ordered_texts(column: pa.ChunkedArray, value: Any, field: str) -> tuple[pa.ChunkedArray, Any]:
    """Returns a column of text, and a value, in the order that is meant: that of times, of numbers,
    or of letters.

    Raises:
        ConfigError: A number would be compared letter by letter, so that "9" is above "10".
    """
    if is_iso_time(value):
        try:
            return TimeForm().column(column), _seconds(column.type, value, field)
        # The column holds other text than times.
        except BadValue:
            return column, value
    # Refused and not converted: whether "10" or 10 is meant is for the caller to say.
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        raise ConfigError(
            f"{field}: the column holds text, which has no order of numbers ('9' would be above "
            "'10'): give a number, where all of it are numbers."
        )
    return column, value


def _incomparable(kind: pa.DataType, value: Any, field: str) -> ConfigError:
    return ConfigError(
        f"{field}: the column holds {kind}, which cannot be compared with {echo(value)} "
        f"({type(value).__name__})."
    )

"""Conditions on the columns of a table: (column, operator, value).

The filters of a log and the conditions of a live query share these operators. The module knows
nothing of either, so that a server that filters items loads no data sets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa

from twotower.core.arrow import pc
from twotower.core.errors import ConfigError, choose
from twotower.core.fields import check_fields


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


def _equal(column: pa.ChunkedArray, value: Any, field: str) -> pa.ChunkedArray:
    if value is None:
        return pc.is_null(column)
    return pc.equal(column, _scalar(column, value, field))


def _in(column: pa.ChunkedArray, value: Any, field: str) -> pa.ChunkedArray:
    if not isinstance(value, (tuple, list)):
        raise ConfigError(f"{field}: {value!r} must be a tuple of values, such as ({value!r},).")
    # Each by itself, so that the message names the one that does not fit.
    # One after the other before the look-up below, which converts all at once.
    for member in value:
        _scalar(column, member, field)
    try:
        return pc.is_in(column, value_set=pa.array(value).cast(column.type))
    except pa.ArrowInvalid as error:
        raise ConfigError(f"{field}: the column holds {column.type}, and {error}.") from error


def _starts_with(column: pa.ChunkedArray, value: Any, field: str) -> pa.ChunkedArray:
    is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    if not is_text or not isinstance(value, str):
        raise ConfigError(
            f"{field}: a prefix needs a column of text and a text, not {column.type} and "
            f"{type(value).__name__}."
        )
    return pc.starts_with(column, value)


def _order(compare: Callable[[pa.ChunkedArray, pa.Scalar], pa.ChunkedArray]) -> Comparison:
    """Returns a comparison by one of Arrow's functions for <, <=, > and >=."""
    return lambda column, value, field: compare(column, _scalar(column, value, field))


OPERATORS: dict[str, Operator] = {
    "==": Operator(_equal),
    "!=": Operator(_equal, is_negated=True),
    "<": Operator(_order(pc.less)),
    "<=": Operator(_order(pc.less_equal)),
    ">": Operator(_order(pc.greater)),
    ">=": Operator(_order(pc.greater_equal)),
    "in": Operator(_in),
    "not in": Operator(_in, is_negated=True),
    "starts with": Operator(_starts_with),
    "not starts with": Operator(_starts_with, is_negated=True),
}


def matches(
    rows: pa.Table, condition: tuple, *, field: str, table: str = "the interactions table"
) -> pa.ChunkedArray:
    """Marks the rows that satisfy a condition: bool [N], never null.

    A null satisfies `!=`, `not in` and `not starts with` and nothing else; `== None` and `!= None`
    select by being null.

    Args:
        rows: Table with N rows.
        condition: (column, operator, value).
        field: Name of the condition in messages.
        table: Name of the table in messages.

    Raises:
        ConfigError: An unknown column or operator, or a value that cannot be compared with the
            column.
    """
    if len(condition) != 3:
        raise ConfigError(
            f"{field} must be (column, operator, value), such as ('rating', '>=', 4)."
        )
    name, symbol, value = condition
    check_fields({name: value}, rows.column_names, f"{field}: {table}")
    operator = choose(OPERATORS, symbol, f"{field}: the operator")
    column = rows[name]
    # A condition is about values, not about the codes that stand for them.
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    # Null before the negation: a row without a value is none of those that a negation leaves out.
    mask = pc.fill_null(operator.compare(column, value, field), False)
    if operator.is_negated:
        return pc.invert(mask)
    return mask


def _scalar(column: pa.ChunkedArray, value: Any, field: str) -> pa.Scalar:
    """Returns a value as a scalar that Arrow can compare with a column.

    Numbers compare with numbers and text with text, never across.
    """
    kind = column.type
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    try:
        # A boolean is an int for Python, and no number here.
        if is_number and isinstance(value, (int, float)) and not isinstance(value, bool):
            return pa.scalar(value)
        if not is_number and value is not None:
            return pa.scalar(value, type=kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        pass
    raise ConfigError(
        f"{field}: the column holds {kind}, which cannot be compared with {value!r} "
        f"({type(value).__name__})."
    )

"""The conditions of `config.data.where` as SQL, with the meaning that they have in memory."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from twotower.core.errors import ConfigError
from twotower.core.times import TimeForm
from twotower.data.filters import EQUALITIES, MAX_HINTS, with_separator
from twotower.data.operators import OPERATORS, is_iso_time, matches
from twotower.pipeline.engines.warehouse.columns import Column

_COMPARISONS = {"==": "=", "!=": "=", "<": "<", "<=": "<=", ">": ">", ">=": ">="}


def failed_condition(
    conditions: Sequence[tuple], columns: Mapping[str, Column], separators: Mapping[str, str]
) -> str:
    """Returns the number of the first condition that a row fails, that of conditions where none.

    Args:
        conditions: Option `config.data.where`.
        columns: Our name -> column.
        separators: Columns whose texts are lists, with the text between the members.

    Raises:
        ConfigError: A condition cannot be used, or not by this engine.
    """
    cases = []
    for number, condition in enumerate(conditions):
        field = f"config.data.where[{number}]={condition!r}"
        # By the rules of a log in memory, on a table with these types and no rows.
        empty = pa.schema([(column.name, column.type) for column in columns.values()]).empty_table()
        matches(empty, with_separator(condition, field, separators), field=field)
        name, symbol, value = condition
        mask = f"COALESCE({_compare(columns[name], symbol, value, field)}, FALSE)"
        # A row that has no value satisfies the negations and nothing else.
        fails = mask if OPERATORS[symbol].is_negated else f"NOT {mask}"
        cases.append(f"WHEN {fails} THEN {number}")
    if not cases:
        return "0"
    listed = "".join(f"\n    {case}" for case in cases)
    return f"CASE{listed}\n    ELSE {len(conditions)}\n  END"


class Texts(NamedTuple):
    """A condition that compares with texts, of which a misspelt one is told.

    Attributes:
        number: Number of the condition.
        column: Name of its column in the tables of the script.
        is_meant: Comparison that is true of the texts that it names.
        limit: Number of texts that are enough to tell.
    """

    number: int
    column: str
    is_meant: str
    limit: int


def find_texts(conditions: Sequence[tuple], columns: Mapping[str, Column]) -> list[Texts]:
    """Returns the conditions that compare with texts."""
    found = []
    for number, (name, symbol, value) in enumerate(conditions):
        column = columns[name]
        if column.type != pa.string() or value is None:
            continue
        if symbol not in EQUALITIES and symbol != "not starts with":
            continue
        members = len(value) if isinstance(value, (tuple, list)) else 1
        is_meant = _compare(column, symbol, value, "")
        found.append(Texts(number, column.variable, is_meant, MAX_HINTS + members))
    return found


def literal(value: Any) -> str:
    r"""Returns a value as a literal of SQL.

    >>> print(literal("it's a \\"), literal(2.5), literal(float("inf")), literal(True))
    'it\'s a \\' 2.5 CAST('inf' AS FLOAT64) TRUE
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else f"CAST('{value}' AS FLOAT64)"
    if not isinstance(value, str):
        raise TypeError(f"{value!r} of {type(value).__name__} is no literal")
    letters = []
    for letter in value:
        if letter in "\\'":
            letters.append(f"\\{letter}")
        elif letter.isprintable():
            letters.append(letter)
        else:
            letters.append(f"\\U{ord(letter):08x}")
    return f"'{''.join(letters)}'"


def _compare(column: Column, symbol: str, value: Any, field: str) -> str:
    """Returns the comparison of a condition, before it is negated."""
    name = column.variable
    if symbol in ("contains", "not contains"):
        raise _undone(field, "asks for members of lists")
    if symbol in ("starts with", "not starts with"):
        return f"STARTS_WITH({name}, {literal(value)})"
    if value is None:
        return f"{name} IS NULL"
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        name = f"UNIX_SECONDS(TIMESTAMP({name}))"
        if pa.types.is_timestamp(column.type):
            name = f"UNIX_SECONDS({column.variable})"
    if symbol in ("in", "not in"):
        members = [_value(column, each, field) for each in value]
        return f"{name} IN ({', '.join(members)})" if members else "FALSE"
    if column.type == pa.string() and symbol not in EQUALITIES and is_iso_time(value):
        raise _undone(field, "orders texts as times")
    return f"{name} {_COMPARISONS[symbol]} {_value(column, value, field)}"


def _value(column: Column, value: Any, field: str) -> str:
    if column.type == pa.string():
        # In memory such a text counts as the number that it spells.
        if not isinstance(value, str):
            raise _undone(field, "compares texts with a number")
        return literal(value)
    is_time = pa.types.is_timestamp(column.type) or pa.types.is_date(column.type)
    if is_time or isinstance(value, (datetime.date, np.datetime64)) or is_iso_time(value):
        # The unit of other whole numbers is told by their size.
        if not is_time and column.name != "timestamp":
            raise _undone(field, "compares whole numbers with a time")
        return literal(TimeForm().one(value))
    return literal(value)


def _undone(field: str, words: str) -> ConfigError:
    return ConfigError(
        f"{field} {words}, which is not done by --engine=bigquery: write it into "
        "config.data.interactions.query, or use --engine=memory."
    )

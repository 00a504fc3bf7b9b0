"""Conditions that items must satisfy, on their display columns."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa

from twotower.core.arrow import pc
from twotower.core.errors import ConfigError, did_you_mean
from twotower.data.operators import matches

# (column, operator, value) each, with the operators of `config.data.where`. Hashable, so that the
# items that match can be cached by their conditions.
Conditions = tuple[tuple[str, str, Any], ...]
# What a caller may give: {column: value or values}, or (column, operator, value) each.
ConditionsLike = Mapping[str, Any] | Sequence[Sequence[Any]] | None
# A column, an operator and a value in one text, such as "price <= 20".
_WRITTEN = re.compile(
    r"\s*(?P<column>.+?)"
    r"\s*(?P<operator><=|>=|==|!=|<|>|=|\s(?:not\s+)?in\s|\s(?:not\s+)?starts\s+with\s)"
    r"\s*(?P<value>.*?)\s*"
)
MAX_SHOWN_VALUES = 10  # values of a column that a message lists
MAX_COMPARED_VALUES = 20_000  # values of a column that are compared with a misspelt one


def as_conditions(where: ConditionsLike) -> Conditions:
    """Returns conditions as tuples of (column, operator, value).

    >>> as_conditions({"brand": "x", "size": ["s", "m"]})
    (('brand', '==', 'x'), ('size', 'in', ('s', 'm')))

    Raises:
        ConfigError: A value is neither text nor number, nor a list of these.
    """
    if not where:
        return ()
    # A list of values means any of them, as in the filters of most services.
    if isinstance(where, Mapping):
        triples = [(name, "in" if _is_list(x) else "==", x) for name, x in where.items()]
    else:
        triples = [tuple(condition) for condition in where]
    conditions = []
    for triple in triples:
        if len(triple) != 3:
            raise ConfigError(
                f"where {triple!r} must be (column, operator, value), such as ('price', '<=', 20)."
            )
        column, operator, value = triple
        # A tuple can be hashed, and is what the operators take.
        if _is_list(value):
            value = tuple(value)
        conditions.append((column, operator, value))
    # A value that cannot be hashed, such as a nested list, cannot be compared with a column either.
    try:
        hash(tuple(conditions))
    except TypeError as error:
        raise ConfigError(
            f"where={where!r} must hold texts, numbers, and lists of them: {error}."
        ) from None
    return tuple(conditions)


def matching_items(items: pa.Table, where: Conditions) -> np.ndarray:
    """Marks the items that satisfy all conditions, bool [N].

    Args:
        items: Display columns of N items.
        where: Conditions; none of them marks every item.

    Raises:
        ConfigError: A column or an operator is unknown; the nearest is named.
    """
    mask = np.ones(len(items), bool)
    for condition in where:
        field = f"where {condition!r}"
        matching = matches(items, condition, field=field, table="the bundle")
        mask &= matching.to_numpy()
    return mask


def parse_condition(text: str, items: pa.Table) -> tuple[str, str, Any]:
    """Returns the condition that a text describes, with a value of the type of its column.

    Args:
        text: "price <= 20", "category = lamp", "category = lamp, clock" (any of them), or any other
            operator of conditions. Quotes keep a comma: "brand = 'Smith, Sons'".
        items: Display columns of the items.

    Raises:
        ConfigError: The text is no condition, the column is not there, or no item has the value;
            the message names the nearest that there are.

    >>> items = pa.table({"price": [5.0, 20.0], "category": ["lamp", "clock"]})
    >>> parse_condition("price <= 20", items)
    ('price', '<=', 20.0)
    >>> parse_condition("category=lamp,clock", items)
    ('category', 'in', ('lamp', 'clock'))
    """
    written = _WRITTEN.fullmatch(text)
    if not written:
        raise ConfigError(
            f"--where={text!r} must be a column, an operator and a value, such as 'price <= 20' or "
            "'category=lamp,clock'."
        )
    column = written["column"]
    if column not in items.column_names:
        raise ConfigError(
            f"--where={text!r}: the items of the bundle have no column {column!r}"
            f"{did_you_mean(column, items.column_names)} They have: "
            f"{', '.join(items.column_names)} (those of config.retrieval.display)."
        )
    operator = " ".join(written["operator"].split())
    # One sign of equality is what most people write.
    if operator == "=":
        operator = "=="
    values = _parse_values(written["value"], items[column], f"--where={text!r}")
    if operator in ("==", "!=", "in", "not in"):
        _check_values_exist(values, column, items[column], f"--where={text!r}")
    is_list = operator in ("in", "not in")
    if len(values) == 1 and not is_list:
        return column, operator, values[0]
    if not is_list:
        lists = {"==": "in", "!=": "not in"}
        if operator not in lists:
            raise ConfigError(f"--where={text!r}: {operator!r} compares with one value.")
        operator = lists[operator]
    return column, operator, tuple(values)


def _parse_values(text: str, column: pa.ChunkedArray, field: str) -> list[Any]:
    """Returns the values of a written condition, in the type of their column."""
    quoted = re.fullmatch(r"(['\"])(.*)\1", text)
    if quoted:
        return [quoted[2]]
    parts = [part.strip() for part in text.strip("[]()").split(",")]
    if _is_number(column.type):
        return [_parse_number(part, field) for part in parts]
    if pa.types.is_boolean(column.type):
        return [_parse_boolean(part, field) for part in parts]
    # A text with a comma that items have needs no quotes.
    if len(parts) > 1 and text in pc.unique(column).to_pylist():
        return [text]
    return [part.strip("'\"") for part in parts]


def _parse_number(text: str, field: str) -> float | int:
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    raise ConfigError(f"{field}: the column holds numbers, and {text!r} is none.")


def _parse_boolean(text: str, field: str) -> bool:
    known = {"true": True, "false": False, "1": True, "0": False}
    if text.lower() not in known:
        raise ConfigError(f"{field}: the column holds true or false, and {text!r} is neither.")
    return known[text.lower()]


def _check_values_exist(
    values: Sequence[Any], name: str, column: pa.ChunkedArray, field: str
) -> None:
    """Refuses a value that no item has: no list could follow from it but an empty one."""
    # Lists and times are compared, or refused, by the operators.
    if not (_is_number(column.type) or _is_text(column.type)):
        return
    known = pc.unique(column).drop_null().to_pylist()
    for value in values:
        if value not in known:
            _refuse_value(value, name, known, field)


def _refuse_value(value: Any, name: str, known: list[Any], field: str) -> NoReturn:
    if isinstance(value, str):
        texts = known[:MAX_COMPARED_VALUES]
        nearest = difflib.get_close_matches(value, texts, n=MAX_SHOWN_VALUES, cutoff=0.0)
    else:
        nearest = sorted(known, key=lambda other: abs(other - value))[:MAX_SHOWN_VALUES]
    listed = ", ".join(map(str, nearest))
    more = ""
    if len(known) > len(nearest):
        more = f" and {len(known) - len(nearest):,} more"
    raise ConfigError(
        f"{field}: no item has {value!r} in column {name!r}. The nearest that there are: "
        f"{listed}{more}."
    )


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple, set, frozenset))

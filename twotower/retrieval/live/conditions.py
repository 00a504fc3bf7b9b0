"""Conditions that items must satisfy, on their display columns."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa

from twotower.core.arrow import BadValue, is_list, pc, plain_text
from twotower.core.errors import ConfigError, did_you_mean, echo, most_alike
from twotower.core.ids import ReadsIds
from twotower.core.times import UNITS_PER_SECOND, TimeForm, TimeUnit
from twotower.data.operators import OPERATORS, Members, is_iso_time, matches, unit_of
from twotower.index.base import check_k
from twotower.retrieval.requests import PLAIN, Forms, spellings

# (column, operator, value) each, with the operators of `config.data.where`, and "latest". Hashable,
# so that the items that match can be cached by their conditions.
Conditions = tuple[tuple[str, str, Any], ...]
# What a caller may give: {column: value or values}, or (column, operator, value) each.
ConditionsLike = Mapping[str, Any] | Sequence[Sequence[Any]] | None
# The operator of the items with the greatest values of a column, such as the newest ones.
LATEST = "latest"
# A column, an operator and a value in one text, such as "price <= 20".
_WRITTEN = re.compile(
    r"\s*(?P<column>.+?)"
    r"\s*(?P<operator><=|>=|==|!=|<|>|=|\s(?:not\s+)?(?:in|contains|starts\s+with)\s|\slatest\s)"
    r"\s*(?P<value>.*?)\s*"
)
_ORDERS = ("<", "<=", ">", ">=")
_EQUALITIES = ("==", "!=", "in", "not in")
_MEMBERSHIPS = ("contains", "not contains")
_MISSING = {"==": "is missing", "!=": "is not missing"}
_LARGEST_SPELT = 2**63  # numbers of more digits are text, if anything
LOOKED_AT = 8  # values by which a column of text is told from one of times
MAX_SHOWN_NAME = 80  # letters of a column's name that a message shows as they are
MAX_SHOWN_VALUES = 10  # values of a column that a message lists
MAX_COMPARED_VALUES = 20_000  # values of a column among which the nearest of one are sought


def as_conditions(where: ConditionsLike, forms: Forms = PLAIN) -> Conditions:
    """Returns conditions as tuples of (column, operator, value).

    >>> as_conditions({"brand": "x", "size": ["s", "m"]})
    (('brand', '==', 'x'), ('size', 'in', ('s', 'm')))

    Args:
        where: Conditions of a caller.
        forms: Forms of ids, times and lists.

    Raises:
        ConfigError: A condition is no column, operator and value, or its value is no single value
            of the kind that the column has.
    """
    if where is None:
        return ()
    if isinstance(where, Mapping):
        # A list of values means any of them, as in the filters of most services.
        triples = [(name, "in" if _is_list(x) else "==", x) for name, x in where.items()]
    elif isinstance(where, (list, tuple)):
        # A single condition is often written without the list around it.
        is_single = (
            len(where) == 3 and isinstance(where[1], str) and where[1] in (*OPERATORS, LATEST)
        )
        triples = [where] if is_single else list(where)
    else:
        raise _no_condition(where)
    conditions = [_as_condition(triple, forms) for triple in triples]
    # A value that cannot be hashed, such as a nested list, cannot be compared with a column either.
    try:
        hash(tuple(conditions))
    except TypeError as error:
        raise ConfigError(
            f"where={echo(where)} must hold texts, numbers, and lists of them: {error}."
        ) from None
    return tuple(conditions)


def _as_condition(triple: Any, forms: Forms) -> tuple[str, str, Any]:
    """Returns a condition with its value in the form that its column has."""
    if not isinstance(triple, (list, tuple)) or len(triple) != 3:
        raise _no_condition(triple)
    name, operator, value = triple
    if not isinstance(name, str) or not isinstance(operator, str):
        raise _no_condition(triple)
    # Conditions that were read before, such as those of a command line, keep their members.
    if isinstance(value, Members):
        return name, operator, value
    # A tuple can be hashed, and is what the operators take.
    if _is_list(value):
        value = tuple(_members(value))
    return _in_form(name, operator, value, forms)


def _in_form(name: str, operator: str, value: Any, forms: Forms) -> tuple[str, str, Any]:
    """Returns a condition with its value in the form that its column has."""
    is_equality = operator in _EQUALITIES
    if operator == LATEST:
        return name, operator, check_k(value, f"where {name!r} latest")
    # A missing list is null, whatever lists are written as.
    if name in forms.separators and not (value is None and is_equality):
        return name, operator, _as_members(name, operator, value, forms)
    # Prefixes and orders of ids are compared as text.
    if name == "item_id" and is_equality:
        return name, operator, _each(value, lambda x: _id(x, forms.item_id))
    form = forms.contract.columns.get(f"item.{name}")
    if isinstance(form, TimeForm):
        return name, operator, _each(value, lambda x: _time_number(x, "s", form))
    if name in forms.units:
        unit = forms.units[name]
        return name, operator, _each(value, lambda x: _time_number(x, unit, forms.time))
    if name in forms.texts and is_equality:
        return _as_texts(name, operator, value)
    return name, operator, value


def _no_condition(where: object) -> ConfigError:
    return ConfigError(
        f'where {echo(where)} must be (column, operator, value), such as ["price", "<=", 20], in a '
        "list, or a mapping of columns to values."
    )


def _as_members(name: str, operator: str, value: Any, forms: Forms) -> Members:
    """Returns the value of a condition on a column that holds lists as one text."""
    if operator not in _MEMBERSHIPS:
        wanted = describe([(name, "contains", value)])
        raise ConfigError(
            f"where {describe([(name, operator, value)])}: {name!r} holds lists, which no single "
            f"value equals or precedes: ask for a member by {wanted}."
        )
    values = value if isinstance(value, tuple) else (value,)
    return Members(values, forms.separators[name])


def _as_texts(name: str, operator: str, value: Any) -> tuple[str, str, Any]:
    """Returns a condition on a column of text, in which numbers and flags are spelt in each way."""
    values = value if isinstance(value, tuple) else (value,)
    plain = [member.item() if isinstance(member, np.generic) else member for member in values]
    if not any(isinstance(member, (bool, int, float)) for member in plain):
        return name, operator, value
    texts: list[Any] = []
    for member in plain:
        is_spelt = isinstance(member, (bool, int, float)) and abs(member) < _LARGEST_SPELT
        texts += spellings(member) if is_spelt else [member]
    # One value in several spellings is a list of texts.
    return name, {"==": "in", "!=": "not in"}.get(operator, operator), tuple(texts)


def _each(value: Any, convert: Any) -> Any:
    """Returns a value, or each of a tuple of values, converted."""
    if isinstance(value, tuple):
        return tuple(convert(member) for member in value)
    return convert(value)


def _id(value: Any, form: ReadsIds) -> str | None:
    if value is None:
        return None
    try:
        return form.one(value)
    except BadValue as error:
        raise ConfigError(f"where 'item_id': {echo(value)} {error.problem}.") from None


def _time_number(value: Any, unit: TimeUnit, form: TimeForm) -> Any:
    """Returns a time as a number in the unit of its column; other values as they are.

    A number is taken as the column has it unless only another unit makes it a time of our days, as
    in a log of milliseconds whose items came with dates.
    """
    if isinstance(value, (np.integer, np.floating)):
        value = value.item()
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        other = unit_of(value)
        if other is not None:
            return value * UNITS_PER_SECOND[unit] // UNITS_PER_SECOND[other]
        # Such as 20231114, where the log has its times so.
        if not form.format:
            return value
    elif not isinstance(value, (str, datetime.date, np.datetime64)):
        return value
    try:
        seconds = form.one(value)
    # The operators read ISO 8601 besides, and refuse the rest in their own words.
    except BadValue:
        return value
    return value if seconds is None else seconds * UNITS_PER_SECOND[unit]


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
        field = f"where {describe([condition])}"
        matching = matches(items, condition, field=field, table="the bundle")
        mask &= matching.to_numpy()
    return mask


def describe(where: Iterable[tuple[str, str, Any]]) -> str:
    """Returns conditions as people write them, as `parse_condition` reads most of them.

    >>> describe([("price", "<=", -1), ("brand", "in", ("a", "b")), ("size", "!=", None)])
    "price <= -1 and brand in 'a', 'b' and size is not missing"
    """
    shown = []
    for column, relation, value in where:
        name = _plain(column)
        operator = _plain(relation)
        if isinstance(value, Members):
            value = value.values
        if value is None and operator in _MISSING:
            shown.append(f"{name} {_MISSING[operator]}")
        elif isinstance(value, tuple) and len(value) <= MAX_SHOWN_VALUES:
            shown.append(f"{name} {operator} {', '.join(map(echo, value))}")
        else:
            shown.append(f"{name} {operator} {echo(value)}")
    return " and ".join(shown)


def _plain(text: str) -> str:
    """Returns a name of a request as it is written, or as Python does where it cannot be shown."""
    is_shown = len(text) <= MAX_SHOWN_NAME and text.isprintable()
    return text if is_shown else echo(text)


def latest_condition(column: pa.ChunkedArray, name: str, count: int) -> tuple[str, str, Any]:
    """Returns the condition of the items with the `count` greatest values of a column.

    Equal values are all among them.

    Args:
        column: Values of all items: numbers, times, or text of times.
        name: Name of the column.
        count: Number of items.

    Raises:
        ConfigError: The column holds neither numbers nor times.
    """
    values = plain_text(column).drop_null()
    order = values
    if not _is_number(values.type):
        try:
            order = read_times(values)
        except BadValue as error:
            raise ConfigError(
                f"where {name} latest {count}: the column holds neither times nor numbers: {error}"
            ) from None
    # All that have a value at all.
    if len(values) <= count:
        return name, "!=", None
    # By the order of times, and then the value as the column has it, with which it is compared.
    rows = pc.array_sort_indices(order.combine_chunks(), order="descending")
    return name, ">=", values[rows[count - 1].as_py()].as_py()


def read_times(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns times of text as int64 [N], in seconds since 1970.

    Raises:
        BadValue: A value is no time.
    """
    # A few first: to find in all titles of a catalogue that they are no times takes long, and a
    # server would do it again with each wrong request.
    TimeForm().column(values.drop_null().slice(0, LOOKED_AT))
    return TimeForm().column(values)


def parse_condition(text: str, items: pa.Table, forms: Forms = PLAIN) -> tuple[str, str, Any]:
    """Returns the condition that a text describes, with a value of the type of its column.

    Args:
        text: "price <= 20", "category = lamp", "category = lamp, clock" (any of them), "genres
            contains Drama", "released >= 2024-01-31", "released latest 50", or any other operator
            of conditions. Quotes keep a comma: "brand = 'Smith, Sons'".
        items: Display columns of the items.
        forms: Forms of ids, times and lists.

    Raises:
        ConfigError: The text is no condition, the column is not there, or no item has the value;
            the message names the nearest that there are.

    >>> items = pa.table({"price": [5.0, 20.0], "category": ["lamp", "clock"]})
    >>> parse_condition("price <= 20", items)
    ('price', '<=', 20)
    >>> parse_condition("category=lamp,clock", items)
    ('category', 'in', ('lamp', 'clock'))
    """
    field = f"--where={echo(text)}"
    written = _WRITTEN.fullmatch(text)
    if not written:
        raise ConfigError(
            f"{field} must be a column, an operator and a value, such as 'price <= 20' or "
            "'category=lamp,clock'."
        )
    name = written["column"]
    if name not in items.column_names:
        raise ConfigError(
            f"{field}: the items of the bundle have no column {name!r}"
            f"{did_you_mean(name, items.column_names)} They have: "
            f"{', '.join(items.column_names)} (those of config.retrieval.display)."
        )
    operator = " ".join(written["operator"].split())
    # One sign of equality is what most people write.
    if operator == "=":
        operator = "=="
    column = plain_text(items[name])
    if name in forms.separators:
        column = pc.split_pattern(column, forms.separators[name])
    # Values are members: a list is never named whole.
    if is_list(column.type) and operator in _MEMBERSHIPS:
        members = pc.list_flatten(column.combine_chunks())
        column = pa.chunked_array([members])
        if pa.types.is_string(members.type):
            column = pc.utf8_trim_whitespace(column)
    values = _parse_values(written["value"], operator, column, field)
    (condition,) = as_conditions([_one_or_many(name, operator, values, field)], forms)
    # A bound may lie between values; equality with a value that no item has is a misspelling.
    if operator in (*_EQUALITIES, *_MEMBERSHIPS):
        compared = condition[2]
        if isinstance(compared, Members):
            compared = compared.values
        _check_values_exist(
            compared if isinstance(compared, tuple) else (compared,), name, column, field
        )
    return condition


def _one_or_many(name: str, operator: str, values: list[Any], field: str) -> tuple[str, str, Any]:
    """Returns a condition on one value, or on several where the operator takes them."""
    takes_lists = ("in", "not in", *_MEMBERSHIPS)
    if operator in takes_lists:
        return name, operator, tuple(values)
    if len(values) == 1:
        return name, operator, values[0]
    lists = {"==": "in", "!=": "not in"}
    if operator not in lists:
        raise ConfigError(f"{field}: {operator!r} compares with one value.")
    return name, lists[operator], tuple(values)


def _parse_values(text: str, operator: str, column: pa.ChunkedArray, field: str) -> list[Any]:
    """Returns the values of a written condition, in the type of their column."""
    kind = column.type
    # In quotes nothing means anything else.
    quoted = re.fullmatch(r"(['\"])(.*)\1", text)
    if quoted:
        return [quoted[2]]
    parts = [part.strip() for part in text.strip("[]()").split(",")]
    if _is_number(kind) or operator == LATEST:
        return [_parse_number(part, field) for part in parts]
    if pa.types.is_boolean(kind):
        return [_parse_boolean(part, field) for part in parts]
    # Text that is ordered by a number holds numbers.
    if operator in _ORDERS or pa.types.is_temporal(kind):
        return [_number_or_text(part) for part in parts]
    # A text with a comma that items have needs no quotes.
    if len(parts) > 1 and _is_text(kind) and text in pc.unique(column).to_pylist():
        return [text]
    return [part.strip("'\"") for part in parts]


def _parse_number(text: str, field: str) -> float | int | str:
    value = _number_or_text(text)
    # The operators tell whether the numbers are times.
    if isinstance(value, str) and not is_iso_time(value):
        raise ConfigError(f"{field}: the column holds numbers, and {text!r} is none.")
    return value


def _number_or_text(text: str) -> float | int | str:
    # int first: float would lose digits of large numbers.
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _parse_boolean(text: str, field: str) -> bool:
    known = {"true": True, "false": False, "1": True, "0": False}
    if text.lower() not in known:
        raise ConfigError(f"{field}: the column holds true or false, and {text!r} is neither.")
    return known[text.lower()]


def _check_values_exist(
    values: Sequence[Any], name: str, column: pa.ChunkedArray, field: str
) -> None:
    """Refuses a value that no item has: no list could follow from it but an empty one."""
    # Times are compared, or refused, by the operators.
    if not (_is_number(column.type) or _is_text(column.type)):
        return
    known = pc.unique(column).drop_null().to_pylist()
    for value in values:
        is_time = isinstance(value, str) and _is_number(column.type)
        if value not in known and not is_time:
            _refuse_value(value, name, known, field)


def _refuse_value(value: Any, name: str, known: list[Any], field: str) -> NoReturn:
    if isinstance(value, str):
        texts = sorted(known[:MAX_COMPARED_VALUES])
        nearest = most_alike(value, texts, MAX_SHOWN_VALUES)
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
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_list(value: Any) -> bool:
    """Returns whether a value is several: a list, a set, or an array of any library."""
    if isinstance(value, (str, bytes, Mapping)):
        return False
    has_members = isinstance(value, Iterable) and hasattr(value, "__len__")
    # An array without dimensions is a single number.
    return has_members and getattr(value, "ndim", 1) == 1


def _members(values: Any) -> list[Any]:
    if isinstance(values, (pa.Array, pa.ChunkedArray)):
        return values.to_pylist()
    return list(values)

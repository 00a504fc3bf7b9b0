"""Conditions that items must satisfy, on their display columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from twotower.core.errors import ConfigError
from twotower.data.operators import matches

# (column, operator, value) each, with the operators of `config.data.where`. Hashable, so that the
# items that match can be cached by their conditions.
Conditions = tuple[tuple[str, str, Any], ...]
# What a caller may give: {column: value or values}, or (column, operator, value) each.
ConditionsLike = Mapping[str, Any] | Sequence[Sequence[Any]] | None


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


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple, set, frozenset))

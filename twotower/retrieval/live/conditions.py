"""Conditions that items must satisfy, on their display columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from twotower.core.errors import ConfigError
from twotower.data.filters import matches

# (column, operator, value) each, as of `config.data.where`; what a cache may be keyed by.
Where = tuple[tuple[str, str, Any], ...]


def conditions(where: Mapping[str, Any] | Sequence[Sequence[Any]] | None) -> Where:
    """Conditions in one form: {"brand": "x", "size": ["s", "m"]} asks for equality or
    membership."""
    if not where:
        return ()
    if isinstance(where, Mapping):
        where = [(name, "in" if _several(value) else "==", value) for name, value in where.items()]
    found = tuple(
        tuple(tuple(part) if _several(part) else part for part in condition) for condition in where
    )
    try:
        hash(found)
    except TypeError as error:
        raise ConfigError(
            f"where={where!r} must hold texts, numbers, and lists of them: {error}."
        ) from None
    return found


def matching(items: pa.Table, where: Where) -> np.ndarray:
    """bool [N], which items satisfy all conditions; raises `ConfigError` where a column or operator
    is unknown."""
    mask = np.ones(len(items), bool)
    for condition in where:
        mask &= matches(
            items, condition, field=f"where {condition!r}", table="the bundle"
        ).to_numpy()
    return mask


def _several(value: Any) -> bool:
    return isinstance(value, (list, tuple, set, frozenset))

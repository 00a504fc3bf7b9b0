"""Which rows of a log to keep: conditions on columns, repeated pairs, and the k-core."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from absl import logging

from twotower.config import DataConfig
from twotower.core.arrow import pc
from twotower.core.errors import ConfigError, choose
from twotower.core.fields import check_fields
from twotower.data.dataset import Dataset
from twotower.data.interactions import codes, pair_codes, timestamps


def filter_rows(dataset: Dataset, config: DataConfig) -> Dataset:
    """Keeps the rows that `config.where`, `config.duplicates` and `config.k_core` ask for, in their
    order.

    A k-core also restricts the tables of users and items to those that survive; the other filters
    leave them whole.

    Raises:
        ConfigError: an unknown column or operator, a value that cannot be compared with its column,
            or no row left (the message counts what each filter removed).
    """
    rows, removed = dataset.interactions, []
    for name, mask in _filters(config):
        kept = rows.filter(pa.array(mask(rows)))
        removed.append(
            f"{name} removed {rows.num_rows - kept.num_rows:,} of {rows.num_rows:,} rows"
        )
        rows = kept
    for line in removed:
        logging.info("%s", line)
    if not rows.num_rows:
        raise ConfigError(
            f"no training rows are left after the filters of config.data: {'; '.join(removed) or 'the log is empty'}."
        )
    dataset = dataclasses.replace(dataset, interactions=rows)
    return _survivors(dataset) if config.k_core > 0 else dataset


def _filters(
    config: DataConfig,
) -> Iterator[tuple[str, Callable[[pa.Table], np.ndarray | pa.ChunkedArray]]]:
    for i, condition in enumerate(config.where):
        yield (
            f"where {condition!r}",
            lambda rows, c=condition, i=i: matches(rows, c, field=f"config.data.where[{i}]={c!r}"),
        )
    if config.duplicates != "all":
        yield (
            f"duplicates={config.duplicates!r}",
            lambda rows: one_per_pair(rows, keep=config.duplicates),
        )
    if config.k_core > 0:
        yield (
            f"k_core={config.k_core}",
            lambda rows: in_core(codes(rows["user_id"]), codes(rows["item_id"]), k=config.k_core),
        )


def _equal(column: pa.ChunkedArray, value: Any, field: str) -> pa.ChunkedArray:
    return pc.is_null(column) if value is None else pc.equal(column, _scalar(column, value, field))


def _member(column: pa.ChunkedArray, values: Any, field: str) -> pa.ChunkedArray:
    if not isinstance(values, (tuple, list)):
        raise ConfigError(f"{field}: {values!r} must be a tuple of values, such as ({values!r},).")
    for value in values:
        _scalar(column, value, field)
    try:
        return pc.is_in(column, value_set=pa.array(values).cast(column.type))
    except pa.ArrowInvalid as error:
        raise ConfigError(f"{field}: the column holds {column.type}, and {error}.") from error


def _prefix(column: pa.ChunkedArray, value: Any, field: str) -> pa.ChunkedArray:
    if not (
        pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    ) or not isinstance(value, str):
        raise ConfigError(
            f"{field}: a prefix needs a column of text and a text, not {column.type} and {type(value).__name__}."
        )
    return pc.starts_with(column, value)


def _ordered(compare: Callable) -> Callable:
    return lambda column, value, field: compare(column, _scalar(column, value, field))


# operator -> (what it computes, whether the result is inverted)
OPERATORS: dict[str, tuple[Callable[[pa.ChunkedArray, Any, str], pa.ChunkedArray], bool]] = {
    "==": (_equal, False),
    "!=": (_equal, True),
    "<": (_ordered(pc.less), False),
    "<=": (_ordered(pc.less_equal), False),
    ">": (_ordered(pc.greater), False),
    ">=": (_ordered(pc.greater_equal), False),
    "in": (_member, False),
    "not in": (_member, True),
    "starts with": (_prefix, False),
    "not starts with": (_prefix, True),
}


def matches(
    rows: pa.Table, condition: tuple, *, field: str, table: str = "the interactions table"
) -> pa.ChunkedArray:
    """Which rows satisfy `condition`: bool [N], never null.

    A null satisfies `!=`, `not in` and `not starts with` and nothing else; `== None` and `!= None`
    ask for nulls.
    """
    if len(condition) != 3:
        raise ConfigError(
            f"{field} must be (column, operator, value), such as ('rating', '>=', 4)."
        )
    name, operator, value = condition
    check_fields({name: value}, rows.column_names, f"{field}: {table}")
    compute, inverted = choose(OPERATORS, operator, f"{field}: the operator")
    column = rows[name]
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    mask = pc.fill_null(compute(column, value, field), False)
    return pc.invert(mask) if inverted else mask


def _scalar(column: pa.ChunkedArray, value: Any, field: str) -> pa.Scalar:
    """`value` for a comparison with `column`; numbers compare with numbers and text with text,
    never across."""
    number = (
        pa.types.is_integer(column.type)
        or pa.types.is_floating(column.type)
        or pa.types.is_decimal(column.type)
    )
    try:
        if number and isinstance(value, (int, float)) and not isinstance(value, bool):
            return pa.scalar(value)
        if not number and value is not None:
            return pa.scalar(value, type=column.type)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        pass
    raise ConfigError(
        f"{field}: the column holds {column.type}, which cannot be compared with {value!r} ({type(value).__name__})."
    )


def one_per_pair(rows: pa.Table, *, keep: str) -> np.ndarray:
    """Marks the "first" or "last" row of each (user, item), bool [N]: in time if rows have one,
    then in file order."""
    pairs, times = pair_codes(rows), timestamps(rows)
    order = np.arange(len(pairs)) if times is None else np.argsort(times, kind="stable")
    order = order if keep == "first" else order[::-1]
    _, first = np.unique(pairs[order], return_index=True)
    mask = np.zeros(len(pairs), bool)
    mask[order[first]] = True
    return mask


def in_core(users: np.ndarray, items: np.ndarray, *, k: int) -> np.ndarray:
    """Marks the rows of the k-core, bool [N]: the largest set in which every user and every item
    has at least k rows.

    Args:
        users, items: codes from 0, int64 [N].
    """
    rows = np.arange(len(users))
    while True:
        kept = (np.bincount(users[rows])[users[rows]] >= k) & (
            np.bincount(items[rows])[items[rows]] >= k
        )
        if kept.all():
            break
        rows = rows[kept]
    mask = np.zeros(len(users), bool)
    mask[rows] = True
    return mask


def _survivors(dataset: Dataset) -> Dataset:
    """Restricts the users, the items and the true factors, which are aligned with them, to ids of
    the interactions."""
    alive = {
        side: pc.is_in(
            getattr(dataset, f"{side}s")[f"{side}_id"],
            value_set=pc.unique(dataset.interactions[f"{side}_id"]),
        )
        for side in ("user", "item")
    }
    truth = dataset.truth and dataclasses.replace(
        dataset.truth,
        user_factors=dataset.truth.user_factors[alive["user"].to_numpy()],
        item_factors=dataset.truth.item_factors[alive["item"].to_numpy()],
    )
    return dataclasses.replace(
        dataset,
        users=dataset.users.filter(alive["user"]),
        items=dataset.items.filter(alive["item"]),
        truth=truth,
    )

"""Which rows of a log to keep: conditions on columns, one row a pair, and the k-core."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from absl import logging

from twotower.config import DataConfig
from twotower.core.arrow import pc
from twotower.core.errors import ConfigError, choose
from twotower.core.fields import check_fields
from twotower.data.dataset import Dataset
from twotower.data.interactions import codes, pair_codes, timestamps

# From the rows of a log to the mask of those to keep: bool [N].
RowMask = Callable[[pa.Table], np.ndarray | pa.ChunkedArray]


@runtime_checkable
class Comparison(Protocol):
    """A comparison of a column with a value: bool [N], null where the column is.

    `field` is the name of the condition in messages.
    """

    def __call__(self, column: pa.ChunkedArray, value: Any, field: str) -> pa.ChunkedArray: ...


@dataclasses.dataclass(frozen=True)
class Operator:
    """An operator of a condition.

    Attributes:
        compare: What it computes.
        is_negated: Whether rows are kept where `compare` does not hold; these include nulls.
    """

    compare: Comparison
    is_negated: bool = False


def filter_rows(dataset: Dataset, config: DataConfig) -> Dataset:
    """Keeps the rows that `where`, `duplicates` and `k_core` of the configuration ask for.

    Rows keep their order. A k-core also restricts the tables of users and items to those that
    survive; the other filters leave them whole.

    Raises:
        ConfigError: An unknown column or operator, a value that cannot be compared with its column,
            or no row left (the message counts what each filter removed).
    """
    rows = dataset.interactions
    reports = []
    # One after the other: a k-core is one of the rows that the conditions leave.
    for name, keep in _filters(config):
        kept = rows.filter(pa.array(keep(rows)))
        removed = rows.num_rows - kept.num_rows
        reports.append(f"{name} removed {removed:,} of {rows.num_rows:,} rows")
        rows = kept
    for report in reports:
        logging.info("%s", report)
    if not rows.num_rows:
        reason = "; ".join(reports) or "the log is empty"
        raise ConfigError(f"no training rows are left after the filters of config.data: {reason}.")
    dataset = dataclasses.replace(dataset, interactions=rows)
    return _drop_absent_entities(dataset) if config.k_core > 0 else dataset


def _filters(config: DataConfig) -> list[tuple[str, RowMask]]:
    """Returns name and mask of the configured filters, in the order in which they apply."""
    filters: list[tuple[str, RowMask]] = []
    for i, condition in enumerate(config.where):
        field = f"config.data.where[{i}]={condition!r}"
        filters.append((f"where {condition!r}", _where(condition, field)))
    if config.duplicates != "all":
        filters.append((f"duplicates={config.duplicates!r}", _duplicates(config.duplicates)))
    if config.k_core > 0:
        filters.append((f"k_core={config.k_core}", _k_core(config.k_core)))
    return filters


def _where(condition: tuple, field: str) -> RowMask:
    return lambda rows: matches(rows, condition, field=field)


def _duplicates(keep: str) -> RowMask:
    return lambda rows: one_row_per_pair(rows, keep=keep)


def _k_core(k: int) -> RowMask:
    return lambda rows: k_core(codes(rows["user_id"]), codes(rows["item_id"]), k=k)


def _equal(column: pa.ChunkedArray, value: Any, field: str) -> pa.ChunkedArray:
    if value is None:
        return pc.is_null(column)
    return pc.equal(column, _scalar(column, value, field))


def _in(column: pa.ChunkedArray, value: Any, field: str) -> pa.ChunkedArray:
    if not isinstance(value, (tuple, list)):
        raise ConfigError(f"{field}: {value!r} must be a tuple of values, such as ({value!r},).")
    # Each by itself, so that the message names the one that does not fit.
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
    """Returns a comparison by one of Arrow's functions of order."""
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
    ask for nulls.

    Args:
        rows: The table.
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
    mask = pc.fill_null(operator.compare(column, value, field), False)
    return pc.invert(mask) if operator.is_negated else mask


def _scalar(column: pa.ChunkedArray, value: Any, field: str) -> pa.Scalar:
    """Returns a value as Arrow compares it with a column.

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


def one_row_per_pair(rows: pa.Table, *, keep: str) -> np.ndarray:
    """Marks one row of each (user, item) pair: bool [N].

    Args:
        rows: The log.
        keep: "first" or "last", in time if rows have one, and then in file order.
    """
    pairs = pair_codes(rows)
    times = timestamps(rows)
    order = np.arange(len(pairs)) if times is None else np.argsort(times, kind="stable")
    if keep == "last":
        order = order[::-1]
    # `unique` returns the first position of each value, so the order decides which row that is.
    _, first = np.unique(pairs[order], return_index=True)
    mask = np.zeros(len(pairs), bool)
    mask[order[first]] = True
    return mask


def k_core(users: np.ndarray, items: np.ndarray, *, k: int) -> np.ndarray:
    """Marks the rows of the k-core: bool [N].

    It is the largest set of rows in which every user and every item has at least k.

    Args:
        users: Code of the user of each row, from 0, int64 [N].
        items: Code of the item of each row, likewise.
        k: Least number of rows.
    """
    rows = np.arange(len(users))
    # Dropping a user may leave an item with too few rows, and so on: until nothing changes.
    while True:
        rows_of_user = np.bincount(users[rows])[users[rows]]
        rows_of_item = np.bincount(items[rows])[items[rows]]
        is_kept = (rows_of_user >= k) & (rows_of_item >= k)
        if is_kept.all():
            break
        rows = rows[is_kept]
    mask = np.zeros(len(users), bool)
    mask[rows] = True
    return mask


def _drop_absent_entities(dataset: Dataset) -> Dataset:
    """Restricts the tables of users and items, and the true factors, to ids of the log."""
    log = dataset.interactions
    has_user = pc.is_in(dataset.users["user_id"], value_set=pc.unique(log["user_id"]))
    has_item = pc.is_in(dataset.items["item_id"], value_set=pc.unique(log["item_id"]))
    truth = dataset.truth
    if truth is not None:
        # The rows of the factors are those of the tables.
        truth = dataclasses.replace(
            truth,
            user_factors=truth.user_factors[has_user.to_numpy()],
            item_factors=truth.item_factors[has_item.to_numpy()],
        )
    return dataclasses.replace(
        dataset,
        users=dataset.users.filter(has_user),
        items=dataset.items.filter(has_item),
        truth=truth,
    )

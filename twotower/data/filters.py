"""Filters of the rows of a log: conditions on columns, one row a pair, and the k-core."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa

from twotower.config import DataConfig
from twotower.core.arrow import pc
from twotower.core.codes import distinct
from twotower.core.errors import ConfigError, did_you_mean
from twotower.data.dataset import Dataset, Dropped
from twotower.data.interactions import codes, pair_codes, timestamps
from twotower.data.operators import Members, matches

# Operators that compare with whole values.
EQUALITIES = ("==", "!=", "in", "not in")
# Values of a column among which the nearest to an absent one is looked for.
MAX_HINTS = 1_000
# A function from the rows of a log to the mask of those to keep: bool [N].
RowMask = Callable[[pa.Table], np.ndarray | pa.ChunkedArray]


def filter_rows(
    dataset: Dataset, config: DataConfig, *, separators: Mapping[str, str] | None = None
) -> Dataset:
    """Applies the filters `where`, `duplicates` and `k_core` of the configuration.

    Rows keep their order. A k-core also restricts the tables of users and items to those in it; the
    other filters leave the tables whole.

    Args:
        dataset: The log.
        config: Options of the data.
        separators: Columns whose texts are lists, with the text between the members.

    Raises:
        ConfigError: An unknown column or operator, a value that cannot be compared with its column,
            a list that is compared as a whole, or no row left (the message counts the rows that
            each filter removed).
    """
    kept = dataset
    dropped = []
    # One after the other: a k-core is one of the rows that the conditions leave.
    for name, keep in _filters(config, separators or {}):
        before = len(kept.interactions)
        kept = kept.keep_rows(np.asarray(keep(kept.interactions)))
        removed = before - len(kept.interactions)
        dropped.append(Dropped(f"by {name}", removed, before))
    # After the filters, which refuse conditions that cannot be read.
    warnings = describe_absent_values(dataset.interactions, config.where)
    if not len(kept.interactions):
        raise no_rows_left(dropped, warnings)
    dataset = dataclasses.replace(
        kept,
        dropped=(*dataset.dropped, *dropped),
        warnings=(*dataset.warnings, *warnings),
    )
    if config.k_core == 0:
        return dataset
    return _drop_absent_entities(dataset)


def no_rows_left(dropped: Sequence[Dropped], warnings: Sequence[str]) -> ConfigError:
    """Returns the error of filters that leave no row.

    Args:
        dropped: Note of each filter.
        warnings: Sentences on their conditions.
    """
    reports = []
    for note in dropped:
        name = note.reason.removeprefix("by ")
        reports.append(f"{name} removed {note.rows:,} of {note.total:,} rows")
    reason = "; ".join(reports) or "the log is empty"
    sentences = [f"no training rows are left after the filters of config.data: {reason}."]
    return ConfigError(" ".join([*sentences, *warnings]))


def _filters(config: DataConfig, separators: Mapping[str, str]) -> list[tuple[str, RowMask]]:
    """Returns name and mask of the configured filters, in the order in which they apply."""
    filters: list[tuple[str, RowMask]] = []
    for i, condition in enumerate(config.where):
        field = f"config.data.where[{i}]={condition!r}"
        # `_where` and its like are functions of their own, as a lambda made here would read the
        # last condition of the loop.
        name = f"where {condition!r}"
        filters.append((name, _where(with_separator(condition, field, separators), field)))
    if config.duplicates != "all":
        filters.append((f"duplicates={config.duplicates!r}", _duplicates(config.duplicates)))
    # Last: any later filter could leave a user with fewer rows.
    if config.k_core > 0:
        filters.append((f"k_core={config.k_core}", _k_core(config.k_core)))
    return filters


def with_separator(condition: tuple, field: str, separators: Mapping[str, str]) -> tuple:
    """Returns a condition that divides the texts of a column of lists.

    Raises:
        ConfigError: It compares the whole text of a list.
    """
    # A condition of another form is refused where it is applied.
    if len(condition) != 3 or condition[0] not in separators:
        return condition
    name, symbol, value = condition
    separator = separators[name]
    if symbol in EQUALITIES and value is not None:
        raise ConfigError(
            f"{field}={condition!r}: the column {name!r} holds lists with {separator!r} between "
            f"their members, and {symbol!r} compares the whole text: write "
            f"({name!r}, 'contains', {value!r})."
        )
    if symbol not in ("contains", "not contains"):
        return condition
    return name, symbol, Members(_members(value), separator)


def _members(value: object) -> tuple:
    """Returns the values that a condition compares with."""
    if isinstance(value, (tuple, list)):
        return tuple(value)
    return (value,)


def describe_absent_values(rows: pa.Table, conditions: Sequence[tuple]) -> list[str]:
    """Returns a sentence on each text of a condition that no row has.

    Args:
        rows: Rows of the log, or the values that their columns have.
        conditions: Option `config.data.where`.
    """
    sentences = []
    for name, symbol, value in conditions:
        column = rows[name]
        if pa.types.is_dictionary(column.type):
            column = pa.chunked_array([distinct(column)])
        if not pa.types.is_string(column.type):
            continue
        if symbol == "not starts with" and not pc.any(pc.starts_with(column, value)).as_py():
            sentences.append(f"config.data.where: no {name} starts with {value!r}.")
        if symbol not in EQUALITIES:
            continue
        known = pc.unique(column)
        for text in _members(value):
            # Numbers are compared with the numbers that a text holds.
            if isinstance(text, str) and not pc.any(pc.equal(known, text)).as_py():
                hint = did_you_mean(text, known[:MAX_HINTS].drop_null().to_pylist())
                sentences.append(f"config.data.where: no row has {name}={text!r}{hint}")
    return sentences


def _where(condition: tuple, field: str) -> RowMask:
    return lambda rows: matches(rows, condition, field=field)


def _duplicates(keep: str) -> RowMask:
    return lambda rows: one_row_per_pair(rows, keep=keep)


def _k_core(k: int) -> RowMask:
    return lambda rows: k_core(codes(rows["user_id"]), codes(rows["item_id"]), k=k)


def one_row_per_pair(rows: pa.Table, *, keep: str) -> np.ndarray:
    """Marks one row of each (user, item) pair: bool [N].

    Args:
        rows: The log.
        keep: "first" or "last" row, by timestamp if rows have one, and then by file order.
    """
    pairs = pair_codes(rows)
    times = timestamps(rows)
    order = np.arange(len(pairs))
    if times is not None:
        # Stable: rows of one second stay in file order.
        order = np.argsort(times, kind="stable")
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
        # Counted anew in each round, over the rows that are left.
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
    has_user = pc.is_in(dataset.users["user_id"], value_set=distinct(log["user_id"]))
    has_item = pc.is_in(dataset.items["item_id"], value_set=distinct(log["item_id"]))
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

"""Rows into train, validation and test: by time, leave-last-out, at random, or as the log says."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa

from twotower.config import SplitConfig
from twotower.core.arrow import pc
from twotower.core.errors import ConfigError, choose
from twotower.data.interactions import PARTS, Split, count_later_rows, describe, timestamps

# Number of each part in the arrays of this file: its position in `PARTS`.
TRAIN = 0
VALIDATION = 1
TEST = 2

# With fewer rows a user would have nothing, or one row, left to learn from.
MIN_ROWS_TO_HOLD_OUT = 3


@runtime_checkable
class PartOfRows(Protocol):
    """A way to divide a log: the number of the part of each row, int8 [N]."""

    def __call__(self, rows: pa.Table, config: SplitConfig) -> np.ndarray: ...


@runtime_checkable
class ValidationRows(Protocol):
    """A way to choose validation rows among training rows: their positions, int64 [M]."""

    def __call__(self, rows: pa.Table, config: SplitConfig) -> np.ndarray: ...


def split(interactions: pa.Table, config: SplitConfig) -> Split:
    """Divides a log as `config.kind` says.

    Args:
        interactions: The log, N rows in file order.
        config: Kind of split and the share of each part.

    Raises:
        ConfigError: The kind is unknown, needs a column that is missing, or leaves a part empty
            whose share is above 0.
    """
    divide = choose(SPLITS, config.kind, "config.split.kind")
    part_of_row = divide(interactions, config)
    tables = [interactions.filter(pa.array(part_of_row == part)) for part in range(len(PARTS))]
    is_needed = (True, config.validation > 0, config.test > 0)
    for name, table, needed in zip(PARTS, tables, is_needed):
        if needed and not table.num_rows:
            raise ConfigError(
                f"config.split.kind={config.kind!r} with validation={config.validation} and "
                f"test={config.test} leaves no {name} rows of {interactions.num_rows:,}. "
                f"{_HINTS[config.kind]}"
            )
    positions = [np.flatnonzero(part_of_row == part) for part in range(len(PARTS))]
    return Split(*tables, file_positions=tuple(positions))


def split_by_time(rows: pa.Table, config: SplitConfig) -> np.ndarray:
    """Cuts the log at two moments: train < t_validation <= validation < t_test <= test.

    The moments are quantiles of the timestamps. Rows of one second stay together, so a part may
    exceed its share.
    """
    times = timestamps(rows)
    if times is None:
        raise ConfigError(
            "config.split.kind='time' needs a column 'timestamp'; choose leave_last_out, random or "
            "fixed without one."
        )
    held_out, test = _held_out_counts(rows, config)
    ordered = np.sort(times)
    parts = np.full(len(times), TRAIN, np.int8)
    # Test last: its rows were marked as validation first.
    for count, part in ((held_out, VALIDATION), (test, TEST)):
        if count:
            parts[times >= ordered[len(times) - count]] = part
    return parts


def leave_last_out(rows: pa.Table, config: SplitConfig) -> np.ndarray:
    """Holds out the last row of each user for test and the one before it for validation.

    Rows are ordered by timestamp where there is one; file order breaks ties, or is the order. Users
    with fewer than three rows stay in train. A part whose share is 0 gets no rows.
    """
    shares = ((TEST, config.test), (VALIDATION, config.validation))
    held_out_parts = [part for part, share in shares if share > 0]
    later, rows_of_user = count_later_rows(rows)
    parts = np.full(len(later), TRAIN, np.int8)
    # The parts that are wanted take the last rows in turn: without test, validation has the last.
    for position_from_end, part in enumerate(held_out_parts):
        is_held_out = (later == position_from_end) & (rows_of_user >= MIN_ROWS_TO_HOLD_OUT)
        parts[is_held_out] = part
    return parts


def split_at_random(rows: pa.Table, config: SplitConfig) -> np.ndarray:
    """Draws exactly round(N * share) rows for validation and for test, by the seed."""
    held_out, test = _held_out_counts(rows, config)
    order = np.random.default_rng(config.seed).permutation(rows.num_rows)
    parts = np.full(rows.num_rows, TRAIN, np.int8)
    # The first `test` of the rows held out become test rows again.
    parts[order[:held_out]] = VALIDATION
    parts[order[:test]] = TEST
    return parts


def split_by_column(rows: pa.Table, config: SplitConfig) -> np.ndarray:
    """Follows the column `split` of the log.

    If no row says validation, a share of the training rows becomes it, chosen as `config.held`
    says.
    """
    if "split" not in rows.column_names:
        raise ConfigError(
            "config.split.kind='fixed' needs a column 'split' of train, validation and test, or a "
            "file config.data.test.path."
        )
    index = pc.index_in(rows["split"].cast(pa.string()), value_set=pa.array(PARTS))
    if index.null_count:
        row = pc.index(pc.is_null(index), True).as_py()
        raise ConfigError(
            f"interactions row {row + 1} ({describe(rows, row)}): "
            f"split={rows['split'][row].as_py()!r} must be one of {', '.join(PARTS)}."
        )
    parts = index.to_numpy().astype(np.int8)
    if not (parts == VALIDATION).any():
        train = np.flatnonzero(parts == TRAIN)
        hold_out = choose(HELD, config.held, "config.split.held")
        held_out = hold_out(rows.take(pa.array(train)), config)
        parts[train[held_out]] = VALIDATION
    return parts


SPLITS: dict[str, PartOfRows] = {
    "time": split_by_time,
    "leave_last_out": leave_last_out,
    "random": split_at_random,
    "fixed": split_by_column,
}

_HINTS = {
    "time": "Change the shares, or give finer timestamps: rows of one second are never divided.",
    "leave_last_out": "Only users with at least three rows have one held out.",
    "random": "Change the shares, or bring more rows.",
    "fixed": "The column 'split' decides it; set the share to 0 for a part that is not wanted.",
}


def _random_share(rows: pa.Table, config: SplitConfig) -> np.ndarray:
    """Draws a share of all rows by the seed."""
    order = np.random.default_rng(config.seed).permutation(rows.num_rows)
    return order[: round(rows.num_rows * config.validation)]


def _latest_share_of_users(rows: pa.Table, config: SplitConfig) -> np.ndarray:
    """Takes the latest share of each user's rows."""
    later, rows_of_user = count_later_rows(rows)
    return np.flatnonzero(later < np.round(rows_of_user * config.validation))


# Kinds of `config.split.held`, for a log whose column `split` names no validation rows.
HELD: dict[str, ValidationRows] = {
    "random": _random_share,
    "latest": _latest_share_of_users,
}


def _held_out_counts(rows: pa.Table, config: SplitConfig) -> tuple[int, int]:
    """Returns the number of rows for validation and test together, and for test alone."""
    if config.validation + config.test >= 1:
        raise ConfigError(
            f"config.split.validation={config.validation} and config.split.test={config.test} must "
            "leave a share for train."
        )
    test = round(rows.num_rows * config.test)
    validation = round(rows.num_rows * config.validation)
    return test + validation, test

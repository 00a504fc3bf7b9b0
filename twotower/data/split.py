"""Splits of a log into train, validation and test: by time, last rows, chance or a column."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa

from twotower.config import SplitConfig
from twotower.core.arrays import index_type
from twotower.core.arrow import pc
from twotower.core.errors import ConfigError, choose
from twotower.core.kinds import Kinds
from twotower.data.interactions import (
    PARTS,
    Split,
    codes,
    count_later_moments,
    count_later_rows,
    describe,
    pair_codes,
    timestamps,
)

# Number of each part in the arrays of this file: its position in `PARTS`.
TRAIN = 0
VALIDATION = 1
TEST = 2

# With fewer rows a user would have none left to learn from after two are held out.
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
    """Divides a log by the kind of split that `config.kind` names.

    Args:
        interactions: The log, N rows in file order.
        config: Kind of split and the share of each part.

    Raises:
        ConfigError: The kind is unknown, needs a column that is missing, or leaves a part empty
            whose share is above 0.
    """
    divide = SPLITS.choose(config.kind, "config.split.kind")
    # A part for each row instead of three tables, so that rows keep their file order.
    if config.validation_by == "kind" or not config.validation:
        part_of_row = divide(interactions, config)
    else:
        part_of_row = _with_validation(interactions, divide, config)
    # Kept because file order breaks ties of time when the parts are joined again.
    positions = []
    for part in range(len(PARTS)):
        rows = np.flatnonzero(part_of_row == part)
        positions.append(rows.astype(index_type(len(part_of_row))))
    check_parts([len(rows) for rows in positions], config)
    tables = [_rows_at(interactions, rows) for rows in positions]
    return Split(*tables, file_positions=tuple(positions))


def check_parts(sizes: Sequence[int], config: SplitConfig) -> None:
    """Refuses a split that leaves a part empty whose share is above 0.

    Args:
        sizes: Number of rows of each part.
        config: Kind of split and the share of each part.

    Raises:
        ConfigError: Train, or a part with a share, has no rows.
    """
    # Train is always needed; a part with a share of 0 may be empty.
    is_needed = (True, config.validation > 0, config.test > 0)
    for name, size, needed in zip(PARTS, sizes, is_needed):
        if needed and not size:
            raise ConfigError(
                f"config.split.kind={config.kind!r} with validation={config.validation} and "
                f"test={config.test} leaves no {name} rows of {sum(sizes):,}. "
                f"{_HINTS.get(config.kind, '')}"
            )


def _with_validation(rows: pa.Table, divide: PartOfRows, config: SplitConfig) -> np.ndarray:
    """Returns the number of the part of each row, with validation rows as `validation_by` says."""
    # Without validation rows of its own, so that all that is not the test is training at first.
    parts = divide(rows, dataclasses.replace(config, validation=0.0))
    if (parts == VALIDATION).any():
        raise validation_twice(config)
    train = np.flatnonzero(parts == TRAIN)
    hold_out = VALIDATION_BY[config.validation_by]
    parts[train[hold_out(rows.take(pa.array(train)), config)]] = VALIDATION
    return parts


def validation_twice(config: SplitConfig) -> ConfigError:
    """Returns the error of a log with validation rows of its own, beside which some are chosen."""
    return ConfigError(
        f"config.split.validation_by={config.validation_by!r} chooses validation rows, and the "
        "log has some of its own: leave out one of them."
    )


def _rows_at(rows: pa.Table, positions: np.ndarray) -> pa.Table:
    """Returns the rows at rising positions, without a copy where these follow each other."""
    if not len(positions):
        return rows.slice(0, 0)
    first = int(positions[0])
    if positions[-1] - first + 1 == len(positions):
        return rows.slice(first, len(positions))
    mask = np.zeros(len(rows), bool)
    mask[positions] = True
    return rows.filter(pa.array(mask))


def split_by_time(rows: pa.Table, config: SplitConfig) -> np.ndarray:
    """Cuts the log at two moments: train < t_validation <= validation < t_test <= test.

    The moments are quantiles of the timestamps. Rows of one second stay together, so a part may
    exceed its share.
    """
    times = timestamps(rows)
    if times is None:
        raise ConfigError(
            "config.split.kind='time' needs a column 'timestamp', and the log has none: "
            f"{cure_without_order(rows)}."
        )
    parts = _parts_by_time(times, config)
    if not _is_divided(parts, config):
        values, counts = np.unique(times, return_counts=True)
        most = int(values[counts.argmax()])
        cure = cure_without_order(rows)
        raise undivided(config, len(times), int(counts.max()), most, cure)
    return parts


def undivided(config: SplitConfig, total: int, count: int, time: int, cure: str) -> ConfigError:
    """Returns the error of a log whose times leave too few training rows.

    Args:
        config: Shares of the parts.
        total: Number of rows.
        count: Number of rows of the most frequent time.
        time: That time in seconds.
        cure: Options for a log without order, as a part of a sentence.
    """
    return ConfigError(
        f"config.split.kind='time' with validation={config.validation} and test={config.test} "
        f"leaves no train rows, or too few, of {total:,}: rows of one second are never divided, "
        f"and {count:,} rows have timestamp={time}. Name another column of times by "
        f"config.data.interactions.columns={{'timestamp': ...}}, or {cure}."
    )


def _parts_by_time(times: np.ndarray, config: SplitConfig) -> np.ndarray:
    """Returns the number of the part of each row, int8 [N], by the moments that divide the log."""
    # Numbers of rows rather than quantiles: quantiles interpolate between times.
    held_out, test = held_out_counts(len(times), config)
    first_rows = [len(times) - count for count in (held_out, test) if count]
    ordered = np.partition(times, first_rows) if first_rows else times
    # int8: one byte a row for three values.
    parts = np.full(len(times), TRAIN, np.int8)
    # Test last: its rows were marked as validation first.
    for count, part in ((held_out, VALIDATION), (test, TEST)):
        if count:
            parts[times >= ordered[len(times) - count]] = part
    return parts


def _is_divided(parts: np.ndarray, config: SplitConfig) -> bool:
    """Returns whether a split by time leaves at least half of the training rows that it should."""
    return is_enough((parts == TRAIN).mean(), config)


def is_enough(share: float, config: SplitConfig) -> bool:
    """Returns whether a share of training rows is at least half of what it should be."""
    train_share = 1 - config.validation - config.test
    return bool(share >= train_share / 2)


def has_order(rows: pa.Table, config: SplitConfig) -> bool:
    """Returns whether the log has times by which it can be divided in the configured shares."""
    times = timestamps(rows)
    if times is None:
        return False
    if config.validation + config.test >= 1:
        return True
    return _is_divided(_parts_by_time(times, config), config)


def kinds_without_order(rows: pa.Table) -> list[str]:
    """Returns the kinds of split that suit a log without times, the better one first."""
    _, rows_of_user = count_later_rows(rows)
    # Where most rows are of users who keep some to be known by after two are held out.
    if (rows_of_user >= 2 * MIN_ROWS_TO_HOLD_OUT).mean() > 0.5:
        return ["leave_last_out", "random"]
    return ["random"]


def cure_without_order(rows: pa.Table) -> str:
    """Returns all options to set for a log whose times give no order, as a part of a sentence."""
    kind = kinds_without_order(rows)[0]
    meanings = {
        "leave_last_out": "the last rows of each user, by the order of the file",
        "random": "rows drawn at random",
    }
    cure = f"set config.split.kind={kind!r} ({meanings[kind]})"
    repeats = len(rows) - pc.count_distinct(pa.array(pair_codes(rows))).as_py()
    if repeats:
        cure += (
            f" and config.data.duplicates='first', as {repeats:,} rows have the user and item of "
            "an earlier row"
        )
    return cure


def leave_last_out(rows: pa.Table, config: SplitConfig) -> np.ndarray:
    """Holds out the last rows of each user for test and those before them for validation.

    Each part takes `config.held_out` of them. Rows are ordered by timestamp, and equal timestamps
    as `config.ties` says; absent ones by file order. Users who would have no row, or moment, left
    of both parts stay in train. A part whose share is 0 gets no rows.
    """
    # `later` counts from the end of each user: 0 is the last row.
    later, rows_of_user = _count_later(rows, config)
    return parts_by_later_rows(later, rows_of_user, config)


def parts_by_later_rows(
    later: np.ndarray, rows_of_user: np.ndarray, config: SplitConfig
) -> np.ndarray:
    """Returns the part of each row by what follows it; see `leave_last_out`.

    Args:
        later: Number of later rows, or moments, of the same user, int [N].
        rows_of_user: Number of all rows, or moments, of the user, int [N].
        config: Share of each part, and how many last rows each takes.

    Returns:
        int8 [N].
    """
    # Test first: it takes the very last row.
    shares = ((TEST, config.test), (VALIDATION, config.validation))
    held_out_parts = [part for part, share in shares if share > 0]
    parts = np.full(len(later), TRAIN, np.int8)
    # Parts with a share take the last rows in turn: without test, validation has the last.
    for number, part in enumerate(held_out_parts):
        is_held_out = (later // config.held_out == number) & (rows_of_user > 2 * config.held_out)
        parts[is_held_out] = part
    return parts


def _count_later(rows: pa.Table, config: SplitConfig) -> tuple[np.ndarray, np.ndarray]:
    """Counts what follows each row and what its user has: rows, or moments with ties together."""
    if config.ties == "together":
        return count_later_moments(rows)
    if config.ties == "drawn" and timestamps(rows) is not None:
        # One number a row, so that equal times are ordered alike for all users and in every run.
        draws = np.random.default_rng(config.seed).permutation(len(rows))
        return count_later_rows(rows, ties=draws)
    return count_later_rows(rows)


def split_at_random(rows: pa.Table, config: SplitConfig) -> np.ndarray:
    """Draws exactly round(N * share) rows for validation and for test, by the seed."""
    held_out, test = held_out_counts(rows.num_rows, config)
    # A permutation instead of a draw a row: the sizes are exact.
    order = np.random.default_rng(config.seed).permutation(rows.num_rows)
    parts = np.full(rows.num_rows, TRAIN, np.int8)
    # The first `test` of the rows held out become test rows again.
    parts[order[:held_out]] = VALIDATION
    parts[order[:test]] = TEST
    return parts


def split_by_column(rows: pa.Table, config: SplitConfig) -> np.ndarray:
    """Divides the log by its column `split`.

    If no row is marked "validation", a share of the training rows is held out, chosen by the kind
    that `config.held` names.
    """
    if "split" not in rows.column_names:
        raise without_split_column()
    # The index in PARTS is the number of the part.
    index = pc.index_in(rows["split"].cast(pa.string()), value_set=pa.array(PARTS))
    if index.null_count:
        row = pc.index(pc.is_null(index), True).as_py()
        raise no_part(row, describe(rows, row), rows["split"][row].as_py())
    parts = index.to_numpy().astype(np.int8)
    if not (parts == VALIDATION).any():
        train = np.flatnonzero(parts == TRAIN)
        hold_out = choose(HELD, config.held, "config.split.held")
        # Positions among the training rows, not in the log.
        held_out = hold_out(rows.take(pa.array(train)), config)
        parts[train[held_out]] = VALIDATION
    return parts


def without_split_column() -> ConfigError:
    """Returns the error of a log that is to be divided by a column which it has not."""
    return ConfigError(
        "config.split.kind='fixed' needs a column 'split' of train, validation and test, or "
        "the files config.data.validation.path and config.data.test.path."
    )


def no_part(row: int, example: str, value: object) -> ConfigError:
    """Returns the error of a row whose column `split` names no part.

    Args:
        row: Number of the row, from 0.
        example: Description of the row.
        value: Its value.
    """
    return ConfigError(
        f"interactions row {row + 1} ({example}): split={value!r} must be one of "
        f"{', '.join(PARTS)}."
    )


def hold_nothing_out(rows: pa.Table, config: SplitConfig) -> np.ndarray:
    """Puts every row into train, as for a model that was chosen before."""
    del config
    return np.full(rows.num_rows, TRAIN, np.int8)


SPLITS: Kinds[PartOfRows] = Kinds(
    "split",
    {
        "time": split_by_time,
        "leave_last_out": leave_last_out,
        "random": split_at_random,
        "fixed": split_by_column,
        "none": hold_nothing_out,
    },
    synonyms={
        "temporal": "time",
        "chronological": "time",
        "global_time": "time",
        "leave_one_out": "leave_last_out",
        "loo": "leave_last_out",
        "last": "leave_last_out",
        "ratio": "random",
        "holdout": "random",
        "uniform": "random",
        "predefined": "fixed",
        "column": "fixed",
        "given": "fixed",
    },
)

_HINTS = {
    "time": "Change the shares: rows of one second are never divided.",
    "leave_last_out": "Only users with at least three rows have one held out (2 held_out + 1).",
    "random": "Change the shares, or use a log with more rows.",
    "fixed": "The column 'split' decides it; set the share to 0 for a part that is not needed.",
    "none": "It holds nothing out: set both shares to 0.",
}


def _random_share(rows: pa.Table, config: SplitConfig) -> np.ndarray:
    """Draws a share of all rows by the seed."""
    order = np.random.default_rng(config.seed).permutation(rows.num_rows)
    return order[: round(rows.num_rows * config.validation)]


def _latest_share_of_users(rows: pa.Table, config: SplitConfig) -> np.ndarray:
    """Takes the latest share of each user's rows."""
    later, rows_of_user = count_later_rows(rows)
    # A user with few rows may round to none held out.
    return np.flatnonzero(later < np.round(rows_of_user * config.validation))


# Kinds of `config.split.held`, for a log whose column `split` names no validation rows.
HELD: dict[str, ValidationRows] = {
    "random": _random_share,
    "latest": _latest_share_of_users,
}


def _latest_rows(rows: pa.Table, config: SplitConfig) -> np.ndarray:
    """Takes the latest share of all rows; rows of one second stay together."""
    times = timestamps(rows)
    if times is None:
        raise ConfigError(
            "config.split.validation_by='time' needs a column 'timestamp', and the log has none: "
            "'last' takes the last rows of each user by the order of the file."
        )
    # At least one: a share above 0 asks for some.
    count = max(1, round(len(rows) * config.validation))
    first = np.partition(times, len(times) - count)[len(times) - count]
    return np.flatnonzero(times >= first)


def _last_rows_of_users(rows: pa.Table, config: SplitConfig) -> np.ndarray:
    """Takes the last rows of each user with more than two parts would hold out."""
    later, rows_of_user = _count_later(rows, config)
    return np.flatnonzero((later < config.held_out) & (rows_of_user > 2 * config.held_out))


def _rows_of_some_users(rows: pa.Table, config: SplitConfig) -> np.ndarray:
    """Takes all rows of a share of the users, drawn by the seed."""
    users = codes(rows["user_id"])
    distinct = np.unique(users)
    count = max(1, round(len(distinct) * config.validation))
    drawn = np.random.default_rng(config.seed).permutation(distinct)[:count]
    return np.flatnonzero(np.isin(users, drawn))


# Ways of `config.split.validation_by` to choose validation rows among those left beside the test.
VALIDATION_BY: dict[str, ValidationRows] = {
    "time": _latest_rows,
    "last": _last_rows_of_users,
    "user": _rows_of_some_users,
}


def held_out_counts(num_rows: int, config: SplitConfig) -> tuple[int, int]:
    """Returns the number of rows for validation and test together, and for test alone."""
    # Each share is checked by `SplitConfig`, their sum only here: leave_last_out does not use it.
    if config.validation + config.test >= 1:
        raise ConfigError(
            f"config.split.validation={config.validation} and config.split.test={config.test} must "
            "leave a share for train."
        )
    # Rounded one by one, so that a part has the same size whatever the other is.
    test = round(num_rows * config.test)
    validation = round(num_rows * config.validation)
    return test + validation, test

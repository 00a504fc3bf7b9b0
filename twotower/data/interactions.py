"""Rows of a log as NumPy columns: codes of their ids, their times, and the parts of a split."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa

from twotower.core.arrays import pair_keys
from twotower.core.arrow import pc
from twotower.core.codes import codes_and_values
from twotower.core.errors import ConfigError

PARTS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Split:
    """A log divided into three parts, each of which keeps its rows in file order.

    Attributes:
        train: Rows to learn from.
        validation: Rows to choose a model by.
        test: Rows to report on.
        file_positions: Position in the file of each row, one int64 array a part; None if the parts
            follow each other in the file.
    """

    train: pa.Table
    validation: pa.Table
    test: pa.Table
    file_positions: tuple[np.ndarray, ...] | None = None

    @property
    def tables(self) -> tuple[pa.Table, pa.Table, pa.Table]:
        """The three parts in the order of `PARTS`."""
        return self.train, self.validation, self.test

    def joined_file_positions(self) -> np.ndarray:
        """Returns the position in the file, int64 [N], of each row of the three parts joined."""
        if self.file_positions is None:
            return np.arange(len(self.train) + len(self.validation) + len(self.test))
        return np.concatenate(self.file_positions)


def codes(column: pa.ChunkedArray) -> np.ndarray:
    """Numbers the distinct values of a column from 0.

    Of a column of codes these are the numbers, some of which no row may have; values of others are
    numbered in order of first appearance.

    Returns:
        int64 [N]; null has a number like other values.
    """
    if pa.types.is_dictionary(column.type):
        numbers, values = codes_and_values(column)
        return np.where(numbers < 0, len(values), numbers).astype(np.int64)
    # The chunks share one dictionary, so that their codes can be joined.
    # "encode": without it null would have no code, and -1 or a gap in its place.
    encoded = pc.dictionary_encode(column, null_encoding="encode")
    chunks = [chunk.indices.to_numpy(zero_copy_only=False) for chunk in encoded.chunks]
    if not chunks:
        return np.zeros(0, np.int64)
    return np.concatenate(chunks).astype(np.int64)


def pair_codes(rows: pa.Table) -> np.ndarray:
    """Numbers the (user, item) pairs of a log: int64 [N], equal if both ids are."""
    # One number a pair: pairs can then be sorted, hashed and compared as a column.
    return pair_keys(codes(rows["user_id"]), codes(rows["item_id"]))


def has_timestamps(rows: pa.Table) -> bool:
    """Returns whether any row has a timestamp."""
    # A column without any value counts as none, as files with an empty column have.
    return "timestamp" in rows.column_names and rows["timestamp"].null_count < rows.num_rows


def timestamps(rows: pa.Table) -> np.ndarray | None:
    """Returns the seconds since the epoch of each row, int64 [N], or None for a log without times.

    Raises:
        ConfigError: Some rows have a timestamp and others have none, so that they have no order.
    """
    if not has_timestamps(rows):
        return None
    column = rows["timestamp"]
    if column.null_count:
        row = pc.index(pc.is_null(column), True).as_py()
        first = f"row {row + 1} ({describe(rows, row)})"
        raise missing_times(column.null_count, rows.num_rows, first)
    # A view where the column is one chunk of seconds.
    return column.to_numpy().astype(np.int64, copy=False)


def missing_times(missing: int, total: int, first: str) -> ConfigError:
    """Returns the error of a log in which some rows have a timestamp and others have none.

    Args:
        missing: Number of rows without.
        total: Number of all rows.
        first: Description of the first row without.
    """
    return ConfigError(
        f"interactions: {missing:,} of {total:,} rows have no timestamp, the first of them "
        f"{first}, so the log has no order in time. Give every row a timestamp, or drop these by "
        "config.data.where=(('timestamp', '!=', None),)."
    )


def count_later_rows(
    rows: pa.Table, *, ties: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Counts, for each row, the later rows of the same user, and all rows of that user.

    Args:
        rows: The log. Rows are ordered by timestamp, and equal or absent timestamps by file order.
        ties: Numbers that order equal timestamps in place of the file, int64 [N].

    Returns:
        Later rows, int64 [N], and all rows, int64 [N].
    """
    users = codes(rows["user_id"])
    order = _order_of_users(users, timestamps(rows), ties)
    counts = np.bincount(users)
    # In sorted order each user's rows lie together, and end at the running count.
    last_of_user = np.cumsum(counts)[users[order]] - 1
    later = np.empty(len(users), np.int64)
    later[order] = last_of_user - np.arange(len(users))
    return later, counts[users]


def count_later_moments(rows: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Counts, for each row, the later moments of the same user, and all moments of that user.

    A moment is a time at which the user has any rows; without times each row is one.

    Returns:
        Later moments, int64 [N], and all moments, int64 [N].
    """
    times = timestamps(rows)
    if times is None:
        return count_later_rows(rows)
    users = codes(rows["user_id"])
    order = _order_of_users(users, times, None)
    is_new_user = np.diff(users[order], prepend=-1) != 0
    is_new_moment = is_new_user | (np.diff(times[order], prepend=-1) != 0)
    moment = np.empty(len(users), np.int64)
    moment[order] = np.cumsum(is_new_moment) - 1
    # The moments of a user follow each other: the last is that of the last row.
    last = np.zeros(users.max(initial=-1) + 1, np.int64)
    np.maximum.at(last, users, moment)
    counts = np.bincount(users[order][is_new_moment], minlength=len(last))
    return last[users] - moment, counts[users]


def _order_of_users(
    users: np.ndarray, times: np.ndarray | None, ties: np.ndarray | None
) -> np.ndarray:
    """Returns the rows by user, then by time, then by `ties` or as the file has them, int64 [N]."""
    # `lexsort` sorts by its last key first, and is stable: equal keys stay in file order.
    # Without times the order of the file is that of time.
    keys = [key for key in (ties, times) if key is not None]
    return np.lexsort([*keys, users])


def describe(rows: pa.Table, row: int) -> str:
    """Returns one row as text for a message: its ids and, if it has one, its timestamp."""
    names = [name for name in ("user_id", "item_id", "timestamp") if name in rows.column_names]
    return ", ".join(f"{name}={rows[name][row].as_py()!r}" for name in names)

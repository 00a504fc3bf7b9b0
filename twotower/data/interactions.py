"""Rows of a log as NumPy columns: codes of their ids, their times, and the parts they are divided
into."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pyarrow as pa

from twotower.core.arrow import pc
from twotower.core.errors import ConfigError
from twotower.core.ragged import pair_keys


@dataclasses.dataclass(frozen=True)
class Split:
    """Rows of the interactions, each in exactly one part, in file order within a part.

    Attributes:
        places: of each part, where its rows stood in the file, int64; None: the parts follow each
            other.
    """

    train: pa.Table
    validation: pa.Table
    test: pa.Table
    places: tuple[np.ndarray, ...] | None = None

    def file_order(self) -> np.ndarray:
        """int64 [N], where each row of the joined parts stood in the file."""
        if self.places is None:
            return np.arange(len(self.train) + len(self.validation) + len(self.test))
        return np.concatenate(self.places)


def codes(column: pa.ChunkedArray) -> np.ndarray:
    """Numbers distinct values from 0 in the order of first appearance: int64 [N]; null is a value
    like others."""
    encoded = pc.dictionary_encode(column, null_encoding="encode")
    chunks = [chunk.indices.to_numpy(zero_copy_only=False) for chunk in encoded.chunks]
    return np.concatenate(chunks).astype(np.int64) if chunks else np.zeros(0, np.int64)


def pair_codes(rows: pa.Table) -> np.ndarray:
    """Numbers the (user, item) pairs of `rows`: int64 [N], equal where both ids are."""
    return pair_keys(codes(rows["user_id"]), codes(rows["item_id"]))


def has_timestamps(rows: pa.Table) -> bool:
    """Whether any row says when it happened."""
    return "timestamp" in rows.column_names and rows["timestamp"].null_count < rows.num_rows


def timestamps(rows: pa.Table) -> np.ndarray | None:
    """Seconds since the epoch, int64 [N], or None when no row says when it happened.

    Raises:
        ConfigError: some rows have a timestamp and others do not, so that they have no order.
    """
    if not has_timestamps(rows):
        return None
    column = rows["timestamp"]
    if column.null_count:
        row = pc.index(pc.is_null(column), True).as_py()
        raise ConfigError(
            f"interactions: {column.null_count:,} of {rows.num_rows:,} rows have no timestamp, the first of them row "
            f"{row + 1} ({describe(rows, row)}), so the log has no order in time. Give every row a timestamp, or drop "
            f"these by config.data.where=(('timestamp', '!=', None),)."
        )
    return column.to_numpy().astype(np.int64)


def places_from_end(rows: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """How many later rows the user of each row has, and how many in all: int64 [N] each.

    Rows are ordered by timestamp where there is one; file order breaks ties, or is the order.
    """
    users, times = codes(rows["user_id"]), timestamps(rows)
    keys = (users,) if times is None else (times, users)  # the last key is the first to sort by
    order = np.lexsort(keys)  # stable: equal keys stay in file order
    counts = np.bincount(users)
    later = np.empty(len(users), np.int64)
    later[order] = np.cumsum(counts)[users[order]] - 1 - np.arange(len(users))
    return later, counts[users]


def describe(rows: pa.Table, row: int) -> str:
    """One row for a message: its ids and, where there is one, its timestamp."""
    names = [name for name in ("user_id", "item_id", "timestamp") if name in rows.column_names]
    return ", ".join(f"{name}={rows[name][row].as_py()!r}" for name in names)


def fingerprint(rows: pa.Table) -> str:
    """Hex digest of who met which item and when, in order; the same however the columns are cut
    into chunks."""
    digest = hashlib.sha256()
    for name in ("user_id", "item_id", "timestamp"):
        if name in rows.column_names:
            digest.update(f"{name} {rows.num_rows} ".encode())
            for part in _bytes_of(rows[name]):
                digest.update(part)
    return digest.hexdigest()[:16]


def _bytes_of(column: pa.ChunkedArray) -> list[np.ndarray]:
    """The values of a column of text or integers as bytes, without a detour over Python objects."""
    if not pa.types.is_string(column.type):
        return [np.asarray(pc.fill_null(column.cast(pa.int64()), np.iinfo(np.int64).min))]
    lengths = np.asarray(pc.fill_null(pc.binary_length(column), -1), np.int32)
    return [lengths, *(_text_bytes(chunk.drop_null()) for chunk in column.chunks)]


def _text_bytes(values: pa.StringArray) -> np.ndarray:
    _, offsets, text = values.buffers()
    if not len(values) or text is None:
        return np.zeros(0, np.uint8)
    ends = np.frombuffer(offsets, np.int32)[values.offset : values.offset + len(values) + 1]
    return np.frombuffer(text, np.uint8)[ends[0] : ends[-1]]

"""Lists of different lengths as two flat arrays (compressed sparse rows)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np


@dataclasses.dataclass(frozen=True)
class Ragged:
    """`num_rows` lists of integers: list r is `values[offsets[r]:offsets[r + 1]]`.

    Attributes:
        offsets: int64 [num_rows + 1], from 0, never falling.
        values: int32 [M].
    """

    offsets: np.ndarray
    values: np.ndarray

    @classmethod
    def from_pairs(cls, rows: np.ndarray, values: np.ndarray, *, num_rows: int) -> Ragged:
        """The pairs (row, value) grouped by row; the values of a row keep the order of the
        pairs."""
        rows = np.asarray(rows, np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < num_rows:
            raise ValueError(
                f"Csr rows must lie in [0, {num_rows}), not in [{rows.min()}, {rows.max()}]."
            )
        order = np.argsort(rows, kind="stable")
        offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=num_rows))]).astype(
            np.int64
        )
        return cls(offsets=offsets, values=np.asarray(values)[order].astype(np.int32))

    @classmethod
    def empty(cls, num_rows: int) -> Ragged:
        return cls(offsets=np.zeros(num_rows + 1, np.int64), values=np.zeros(0, np.int32))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int | np.integer) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[row] for row in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """int64 [num_rows]."""
        return np.diff(self.offsets)

    @property
    def rows(self) -> np.ndarray:
        """int64 [M]: the row of each value."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def take(self, rows: np.ndarray) -> Ragged:
        """The lists of `rows`, in that order; a row of -1 is an empty list."""
        rows = np.asarray(rows, np.int64)
        if len(rows) == 1 and rows[0] >= 0:
            values = np.asarray(self[rows[0]])
            return Ragged(offsets=np.array([0, len(values)], np.int64), values=values)
        lengths = (
            np.where(rows >= 0, self.lengths[rows], 0)
            if len(self)
            else np.zeros(len(rows), np.int64)
        )
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        starts = self.offsets[rows] - offsets[:-1]
        return Ragged(
            offsets=offsets, values=self.values[np.repeat(starts, lengths) + np.arange(offsets[-1])]
        )

    def filter(self, keep: np.ndarray) -> Ragged:
        """Only the values where `keep` (bool [M]) holds; as many rows as before."""
        return Ragged.from_pairs(self.rows[keep], self.values[keep], num_rows=len(self))

    def joined(self, other: Ragged) -> Ragged:
        """Each list followed by the other's."""
        rows, values = (
            np.concatenate([self.rows, other.rows]),
            np.concatenate([self.values, other.values]),
        )
        return Ragged.from_pairs(rows, values, num_rows=len(self))

    def distinct(self, *, keep: str = "first") -> Ragged:
        """Each value once a row, where it stands "first" or "last"."""
        values = self.values if keep == "first" else self.values[::-1]
        rows = self.rows if keep == "first" else self.rows[::-1]
        _, index = np.unique(pair_keys(rows, values), return_index=True)
        kept = np.zeros(len(values), bool)
        kept[index] = True
        return self.filter(kept if keep == "first" else kept[::-1])

    def contains(self, rows: np.ndarray, values: np.ndarray) -> np.ndarray:
        """bool, of the shape of `values`: whether each value stands in the list of its row (-1
        never does)."""
        rows, values = np.broadcast_arrays(rows, values)
        return np.isin(pair_keys(rows, values), pair_keys(self.rows, self.values)) & (values >= 0)


def pair_keys(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns one integer for each pair (row, value), int64; both fit in 32 bits.

    Keys are equal where both are, and sort by row and then by value. A value of -1 is one as well:
    whoever looks for values must leave it out.
    """
    return (np.asarray(rows, np.int64) << 32) | (np.asarray(values, np.int64) & 0xFFFFFFFF)

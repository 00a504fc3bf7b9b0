"""NumPy arrays: lists of different lengths as two flat ones (compressed sparse rows), arrays padded
to few shapes, so that few programs are compiled, samples of rows, their order, and hashes of
integers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

# Values that are counted, or of lists that are made distinct, at once.
_BLOCK = 2**22


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Lists of integers: list r is `values[offsets[r]:offsets[r + 1]]`.

    Attributes:
        offsets: int64 [R + 1], from 0, never falling, of R lists.
        values: int32 [M], the lists one after the other.
    """

    # Two arrays instead of a list of arrays: a list a user would be a Python object a user.
    offsets: np.ndarray
    values: np.ndarray

    @classmethod
    def from_pairs(cls, rows: np.ndarray, values: np.ndarray, *, num_rows: int) -> Ragged:
        """Returns the values of pairs (row, value) as one list a row.

        The values of a row keep the order of the pairs.

        Args:
            rows: int [M], in [0, num_rows).
            values: int [M].
            num_rows: Number R of lists.

        Raises:
            ValueError: A row is out of range.
        """
        rows = np.asarray(rows)
        if rows.dtype != np.int32:
            rows = rows.astype(np.int64, copy=False)
        # `bincount` would grow past `num_rows`, and give more lists than were named.
        if rows.size and not 0 <= rows.min() <= rows.max() < num_rows:
            raise ValueError(
                f"Rows must lie in [0, {num_rows}), not in [{rows.min()}, {rows.max()}]."
            )
        # Stable, since the order within a row is the order in time.
        order = stable_argsort(rows)
        lengths = np.bincount(rows, minlength=num_rows)
        return cls(_offsets(lengths), np.asarray(values)[order].astype(np.int32))

    @classmethod
    def empty(cls, num_rows: int) -> Ragged:
        """Returns `num_rows` empty lists."""
        return cls(np.zeros(num_rows + 1, np.int64), np.zeros(0, np.int32))

    @classmethod
    def one(cls, values: np.ndarray) -> Ragged:
        """Returns a single list.

        Args:
            values: int32 [M].
        """
        return cls(np.array([0, len(values)], np.int64), values)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int | np.integer) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[row] for row in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """The length of each list, int64 [R]."""
        return np.diff(self.offsets)

    @property
    def longest(self) -> int:
        """The length of the longest list; 0 without lists."""
        if len(self) == 1:
            return len(self.values)
        return int(self.lengths.max(initial=0))

    @property
    def rows(self) -> np.ndarray:
        """The row of each value, int64 [M]."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def take(self, rows: np.ndarray) -> Ragged:
        """Returns the lists of `rows`, in that order; a row of -1 gives an empty list."""
        rows = np.asarray(rows, np.int64)
        # A request takes one row: its values need no copy.
        if len(rows) == 1:
            row = rows.item()
            values = self.values[:0]
            if row >= 0:
                values = self.values[self.offsets.item(row) : self.offsets.item(row + 1)]
            return Ragged.one(np.asarray(values))
        starts = self.offsets[rows]
        # Of these lists alone: `lengths` would be that of all lists. -1 reads no list's bounds
        # here; its length is replaced by 0.
        lengths = np.where(rows >= 0, self.offsets[rows + 1] - starts, 0)
        offsets = _offsets(lengths)
        # A value's position here is the start of its list and the distance from there.
        shifts = starts - offsets[:-1]
        positions = np.repeat(shifts, lengths) + np.arange(offsets[-1])
        return Ragged(offsets, self.values[positions])

    def filter(self, keep: np.ndarray) -> Ragged:
        """Returns the lists without the values whose `keep` is False.

        Args:
            keep: bool [M].
        """
        counts = np.zeros(len(keep) + 1, np.int64)
        np.cumsum(keep, out=counts[1:])
        return Ragged(counts[self.offsets], self.values[keep])

    def join(self, other: Ragged) -> Ragged:
        """Returns each list followed by that of the same row of `other`."""
        if len(self) == 1:
            # Somebody new has seen nothing but what the request says.
            if not len(self.values):
                return other
            return Ragged.one(np.concatenate([self.values, other.values]))
        rows = np.concatenate([self.rows, other.rows])
        values = np.concatenate([self.values, other.values])
        return Ragged.from_pairs(rows, values, num_rows=len(self))

    def distinct(self, *, keep: Literal["first", "last"] = "first") -> Ragged:
        """Returns each value once a row, at its first or its last position."""
        kept = np.zeros(len(self.values), bool)
        # By blocks of lists, so that the keys of a long log are never in memory at once.
        edges = np.searchsorted(self.offsets, np.arange(0, len(kept) + _BLOCK, _BLOCK))
        for first, end in itertools.pairwise(np.minimum(edges, len(self))):
            lists = Ragged(self.offsets[first : end + 1] - self.offsets[first], self.values)
            block = slice(self.offsets[first], self.offsets[end])
            keys = pair_keys(lists.rows, self.values[block])
            order = stable_argsort(keys)
            keys = keys[order]
            # Of equal keys, which keep their order, the first or the last.
            is_other = keys[1:] != keys[:-1]
            ends = (True, is_other) if keep == "first" else (is_other, True)
            kept[block][order] = np.append(*ends)[: len(keys)]
        return self.filter(kept)

    def contains(self, rows: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Marks the values that are in the list of their row.

        Args:
            rows: int, of a shape that broadcasts with that of `values`.
            values: int; -1 is in no list.

        Returns:
            bool, of the broadcast shape.
        """
        rows, values = np.broadcast_arrays(rows, values)
        # The lists that are asked alone: a block of queries asks few of a million users' lists.
        is_asked = np.zeros(len(self), bool)
        is_asked[rows] = True
        asked = np.flatnonzero(is_asked)
        lists = self.take(asked)
        held = np.sort(pair_keys(asked[lists.rows], lists.values))
        if not len(held):
            return np.zeros(rows.shape, bool)
        # One search of all pairs at once, instead of one in each list.
        keys = pair_keys(rows, values)
        position = np.minimum(np.searchsorted(held, keys), len(held) - 1)
        return (held[position] == keys) & (values >= 0)


def pair_keys(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns one integer for each pair (row, value), int64; both fit in 32 bits.

    Two keys are equal if both numbers are, and keys sort by row and then by value. A value of -1
    has a key like others: callers that search for values leave it out.
    """
    # The mask keeps the sign bits of -1 out of the half that holds the row.
    return (np.asarray(rows, np.int64) << 32) | (np.asarray(values, np.int64) & 0xFFFFFFFF)


def _offsets(lengths: np.ndarray) -> np.ndarray:
    """Returns the sums of the lengths before each list, and of all: int64 [R + 1]."""
    # int64: a large log has more values than int32 can count.
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def next_power_of_two(n: int) -> int:
    """Returns the least power of two that is at least `n`; 1 for 0.

    >>> [next_power_of_two(n) for n in (0, 1, 3, 4)]
    [1, 1, 4, 4]
    """
    # Shapes that are powers of two cost at most twice the work, and a program for each doubling
    # alone.
    return 1 << max(0, n - 1).bit_length()


def round_up(n: int, multiple: int) -> int:
    """Returns the least multiple of `multiple` that is at least `n`.

    >>> [round_up(n, 8) for n in (0, 1, 8, 9)]
    [0, 8, 8, 16]
    """
    # Floor division of the negated number rounds up, without the rounding of floats.
    return -(-n // multiple) * multiple


def pad_rows(array: np.ndarray, size: int) -> np.ndarray:
    """Returns `array` with rows of zeros appended up to `size` rows."""
    # Rows alone grow; callers pass over the added ones by their number, not by their value.
    widths = [(0, 0)] * array.ndim
    widths[0] = (0, size - len(array))
    return np.pad(array, widths)


def pad_pairs(
    rows: np.ndarray, columns: np.ndarray, size: int, *, num_columns: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pads the pairs (row, column) of a scatter with pairs that it drops.

    Args:
        rows: int [E].
        columns: int [E], below `num_columns`.
        size: Number of pairs to return, at least E.
        num_columns: Width of the array that is written to. Padding points at this column, which
            lies outside of it: a scatter with mode="drop" passes over it.

    Returns:
        (rows, columns), int32 [size] each.
    """
    # Row 0 with a column past the end: no real pair can be hit, whatever the row.
    missing = size - len(rows)
    rows = np.pad(rows, (0, missing))
    columns = np.pad(columns, (0, missing), constant_values=num_columns)
    # JAX computes with int32 indices; int64 ones would be converted at every call.
    return rows.astype(np.int32), columns.astype(np.int32)


def count_values(values: np.ndarray, size: int) -> np.ndarray:
    """Returns how often each number of [0, size) is there, int64 [size].

    By blocks, as the numbers may be mapped: `bincount` makes a copy of eight bytes each.

    Args:
        values: int [N], below `size`; -1 stands for nothing.

    >>> count_values(np.array([2, 0, -1, 2]), 4).tolist()
    [1, 0, 2, 0]
    """
    counts = np.zeros(size, np.int64)
    # A block for each of the counts at least, or adding these up would take longer.
    block = max(_BLOCK, size)
    for start in range(0, len(values), block):
        part = values[start : start + block]
        counts += np.bincount(part[part >= 0], minlength=size)
    return counts


def evenly_spaced(rows: np.ndarray, count: int) -> np.ndarray:
    """Returns at most `count` of the rows, evenly spaced from the first to the last.

    >>> evenly_spaced(np.arange(10), 4).tolist()
    [0, 3, 6, 9]
    """
    # Spread rather than drawn: the same sample each time, from every part of an ordered list.
    chosen = np.linspace(0, len(rows) - 1, min(count, len(rows)))
    return rows[chosen.astype(int)]


def index_type(count: int) -> type[np.signedinteger]:
    """Returns the smaller of int32 and int64 that numbers so many rows."""
    return np.int32 if count < 2**31 else np.int64


def stable_argsort(keys: np.ndarray) -> np.ndarray:
    """Returns the positions of integers in ascending order, int64 [N]; equal ones keep their order.

    Args:
        keys: int [N].

    >>> stable_argsort(np.array([3, 1, 3, 1])).tolist()
    [1, 3, 0, 2]
    """
    count = len(keys)
    if count < 2 or bool((keys[:-1] <= keys[1:]).all()):
        return np.arange(count)
    low = int(keys.min())
    bits = (count - 1).bit_length()
    if (int(keys.max()) - low).bit_length() + bits > 63:
        return np.argsort(keys, kind="stable")
    # Key and position in one number, which NumPy sorts by vector instructions: a seventh of the
    # time of a stable sort of positions.
    packed = keys.astype(np.int64)
    packed -= low
    packed <<= bits
    packed |= np.arange(count, dtype=index_type(count))
    packed.sort()
    packed &= (1 << bits) - 1
    return packed


# Hashes are the same bits in every process, on every machine and device. They work on NumPy and on
# JAX arrays alike; constants are NumPy scalars, so that the types of unsigned integers are kept.


def mix64(x: Any) -> Any:
    """Returns a bijection of uint64 whose every output bit depends on every input bit.

    The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
    """
    # The increment of SplitMix64 (2^64 / golden ratio): without it 0 would stay 0.
    x = x + np.uint64(0x9E3779B97F4A7C15)
    # Each shift carries high bits down, each odd factor low bits up; products wrap at 2^64.
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def mix64_int(x: int) -> int:
    """Returns what `mix64` does of a single integer below 2^64.

    >>> numbers = [1, 2**64 - 1]
    >>> list(map(mix64_int, numbers)) == mix64(np.array(numbers, np.uint64)).tolist()
    True
    """
    mask = 0xFFFFFFFFFFFFFFFF
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def mix32(x: Any) -> Any:
    """Returns a bijection of uint32 whose every output bit depends on every input bit.

    The function lowbias32 that Wellons' hash prospector found.
    """
    # 32 bits, because JAX has no uint64 unless x64 is switched on.
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def multiply_shift(x: Any, multiplier: Any, bits: int) -> Any:
    """Returns the top bits of a product modulo 2^32.

    Multiply-shift hashing (Dietzfelbinger et al., Journal of Algorithms 1997): over the choice of
    the multiplier, two numbers share a hash with probability at most 2 / 2^bits.

    Args:
        x: uint32 numbers.
        multiplier: Odd uint32 number, or several that broadcast against `x`.
        bits: Number of bits of the hash, from 1 to 32.

    Returns:
        uint32 numbers in [0, 2^bits).
    """
    # The low bits of a product depend on few bits of `x`; the top ones on all.
    return (x * multiplier) >> np.uint32(32 - bits)

"""The two segments that hold the items of a live catalogue.

They are those of a log-structured merge tree: a large immutable run, and a small memtable of the
items that came since.

ScaNN's own updates are unsafe while others search, and end the process on bad input. So the index
and its vectors stay as they are (`BaseSegment`); new and changed items go to the end of a second,
small set that is searched exactly (`MemTable`). Nothing is overwritten: an item that is replaced or
deleted leaves a tombstone, the number of the change that removed it, so that readers of an earlier
moment still see it. Rebalancing merges both segments into a new base.

An item keeps its number from its first appearance on, whatever happens to it. Its position changes
with each update: a row of the base or, counted on from the last row, a slot of the memtable.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from twotower.index.base import Index
from twotower.index.exact import ExactIndex
from twotower.index.vectors import Vectors, popularity_coordinate

NOT_REMOVED = np.iinfo(np.int64).max  # the tombstone of items that exist: later than any change
MIN_CAPACITY = 1_024  # slots of a new memtable
EPSILON = 1e-30  # least length that a vector is divided by: zeros stay zeros


@dataclasses.dataclass(frozen=True, eq=False)
class BaseSegment:
    """The items that were indexed. Only tombstones change.

    Attributes:
        index: Index over `vectors`.
        vectors: float32 [N, D], or int8 that is read as such.
        items: item_id and display columns, N rows.
        counts: Training rows of each item, int64 [N].
        numbers: Number of each row's item, int64 [N].
        row_by_number: Row of each number, int64; -1 without one.
        removed_by: Change that removed each row, int64 [N].
    """

    index: Index
    vectors: Vectors
    items: pa.Table
    counts: np.ndarray
    numbers: np.ndarray
    row_by_number: np.ndarray
    removed_by: np.ndarray

    @classmethod
    def build(
        cls,
        index: Index,
        vectors: Vectors,
        items: pa.Table,
        counts: np.ndarray,
        numbers: np.ndarray,
        num_numbers: int,
    ) -> BaseSegment:
        """Returns the segment of N items, all of them there.

        Args:
            index: Index over `vectors`.
            vectors: Item vectors [N, D].
            items: item_id and display columns, N rows.
            counts: Training rows of each item, int64 [N].
            numbers: Number of each item, int64 [N].
            num_numbers: Number of the items that ever existed, whose numbers lie below it.
        """
        row_by_number = np.full(num_numbers, -1, np.int64)
        row_by_number[numbers] = np.arange(len(numbers))
        removed_by = np.full(len(numbers), NOT_REMOVED)
        return cls(
            index, vectors, items.combine_chunks(), counts, numbers, row_by_number, removed_by
        )

    def __len__(self) -> int:
        return len(self.numbers)

    def rows_of(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the row of each number, -1 without one; removed rows are rows too."""
        # The usual case of a server, without a look-up: `Snapshot.search` knows the same array.
        if self._is_in_order and (not len(numbers) or numbers.max() < len(self)):
            return numbers
        if not len(self.row_by_number):
            return np.full(len(numbers), -1)
        # Items that came after this base have later numbers.
        known = numbers < len(self.row_by_number)
        return np.where(known, self.row_by_number[np.where(known, numbers, 0)], -1)

    def row_of(self, number: int) -> int:
        """Returns the row of a number; -1 without one."""
        if number >= len(self.row_by_number):
            return -1
        return int(self.row_by_number[number])

    def read_row(self, row: int) -> dict[str, Any]:
        """Returns item_id and display columns of a row."""
        return {name: read(row) for name, read in self.column_readers}

    @functools.cached_property
    def column_readers(self) -> list[tuple[str, Callable[[int], Any]]]:
        """The name of each display column, with the function from a row to its value."""
        return [(name, value_reader(self.items[name])) for name in self.items.column_names]

    @functools.cached_property
    def popularity_coordinate(self) -> tuple[np.ndarray, float]:
        """The items' coordinate of popularity, float32 [N], and that of a query with weight 1; see
        `twotower.index.vectors`."""
        return popularity_coordinate(self.counts, self.vectors.shape[1])

    @functools.cached_property
    def unit_vectors(self) -> tuple[Index, Vectors]:
        """The vectors at length 1, with an index over them; a zero one stays."""
        if self.index.normalized:
            return self.index, self.vectors
        # Exact, and a copy of the corpus, made when similar items are first requested: the index
        # ranks by the dot product, which favours long vectors.
        units = np.asarray(self.vectors)
        units = units / np.maximum(np.linalg.norm(units, axis=1, keepdims=True), EPSILON)
        return ExactIndex(units), units

    @functools.cached_property
    def _is_in_order(self) -> bool:
        """Whether each row's number is the row, as in a bundle that was just loaded."""
        return bool((self.numbers == np.arange(len(self))).all())


@dataclasses.dataclass(frozen=True, eq=False)
class MemTable:
    """The items that came since the base was indexed, in slots that are filled one after another.

    Slots behind those that a snapshot sees may be written while it is read.

    Attributes:
        vectors: float32 [capacity, D].
        numbers: Number of the item in each slot, int64 [capacity].
        log_counts: Log training rows of each item, float32 [capacity].
        added_by: Change that added each slot, int64 [capacity].
        removed_by: Change that removed each slot, int64 [capacity].
        rows: item_id and display columns of each slot, to be read one by one; grows.
        tables: First slot of each update, and the same columns of its slots, to be filtered; grows.
    """

    vectors: np.ndarray
    numbers: np.ndarray
    log_counts: np.ndarray
    added_by: np.ndarray
    removed_by: np.ndarray
    rows: list[dict[str, Any]]
    tables: list[tuple[int, pa.Table]]

    @classmethod
    def empty(cls, dim: int, capacity: int = MIN_CAPACITY) -> MemTable:
        """Returns a memtable without items."""
        return cls(
            vectors=np.zeros((capacity, dim), np.float32),
            numbers=np.full(capacity, -1, np.int64),
            log_counts=np.zeros(capacity, np.float32),
            added_by=np.full(capacity, NOT_REMOVED, np.int64),
            removed_by=np.full(capacity, NOT_REMOVED, np.int64),
            rows=[],
            tables=[],
        )

    def with_capacity(self, needed: int) -> MemTable:
        """Returns itself, or a copy with room for `needed` slots; readers keep the old arrays."""
        # At least twice as many, so that adding N items one by one copies O(N) slots in all.
        size = len(self.numbers)
        if needed <= size:
            return self
        larger = MemTable.empty(self.vectors.shape[1], max(needed, 2 * size))
        larger.vectors[:size] = self.vectors
        larger.numbers[:size] = self.numbers
        larger.log_counts[:size] = self.log_counts
        larger.added_by[:size] = self.added_by
        larger.removed_by[:size] = self.removed_by
        # Lists are shared: they only grow, and a reader looks at no slot beyond its own.
        return dataclasses.replace(larger, rows=self.rows, tables=self.tables)


def value_reader(column: pa.ChunkedArray) -> Callable[[int], Any]:
    """Returns a function from a row to its value, as `column[row].as_py()` would return it.

    Values are read from Arrow's buffers: several times as fast as through its scalars.

    >>> read = value_reader(pa.chunked_array([["a", None, "été"]]))
    >>> [read(row) for row in range(3)]
    ['a', None, 'été']
    """
    if column.num_chunks == 1:
        array = column.chunk(0)
    else:
        array = pa.concat_arrays(column.chunks or [pa.array([], column.type)])
    kind = array.type
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    if is_number and not array.null_count:
        return array.to_numpy().item
    if not pa.types.is_string(kind) and not pa.types.is_large_string(kind):
        return lambda row: array[row].as_py()
    read = _text_reader(array)
    if not array.null_count:
        return read
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    return lambda row: read(row) if valid[row] else None


def _text_reader(array: pa.Array) -> Callable[[int], str]:
    """Returns a function from a row to its text, read from the array's buffers."""
    # Buffers: which values are null, the offset of each text, and all texts one after another.
    _, offsets, text = array.buffers()
    # Offsets of a large_string have 64 bits.
    width = "i" if pa.types.is_string(array.type) else "q"
    # The buffers of a slice begin before it.
    bounds = memoryview(offsets).cast("B").cast(width)[array.offset :]
    # An array of empty texts has no buffer of them.
    data = memoryview(b"" if text is None else text)
    return lambda row: str(data[bounds[row] : bounds[row + 1]], "utf-8")

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

from twotower.core.arrow import int_array
from twotower.index.base import Index
from twotower.index.exact import ExactIndex
from twotower.index.vectors import Vectors, popularity_coordinate

NOT_REMOVED = np.iinfo(np.int64).max  # the tombstone of items that exist: later than any change
MIN_CAPACITY = 1_024  # slots of a new memtable
EPSILON = 1e-30  # least length that a vector is divided by: zeros stay zeros

# Rows of a column, int64 [M] -> their values, None for null.
ReadValues = Callable[[np.ndarray], list[Any]]


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

    def read_rows(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """Returns item_id and display columns of some rows."""
        columns = [read(rows) for read in self.column_readers]
        names = self.items.column_names
        return [dict(zip(names, values)) for values in zip(*columns)]

    @functools.cached_property
    def column_readers(self) -> list[ReadValues]:
        """The function from rows to values of each display column."""
        return [values_reader(self.items[name]) for name in self.items.column_names]

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


def values_reader(column: pa.ChunkedArray) -> ReadValues:
    """Returns a function from rows to their values, as `take(rows).to_pylist()` gives them.

    Values are read from Arrow's buffers: a list of ten takes a fraction of the time that Arrow's
    own two calls take.

    >>> read = values_reader(pa.chunked_array([["a", None, "été"]]))
    >>> read(np.array([2, 1]))
    ['été', None]
    """
    if column.num_chunks == 1:
        array = column.chunk(0)
    else:
        array = pa.concat_arrays(column.chunks or [pa.array([], column.type)])
    kind = array.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        read = _text_reader(array)
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
        read = _number_reader(array)
    else:
        return lambda rows: array.take(int_array(rows)).to_pylist()
    validity = array.buffers()[0]
    if not array.null_count or validity is None:
        return read
    bits = np.frombuffer(validity, np.uint8)

    def read_with_nulls(rows: np.ndarray) -> list[Any]:
        # Of a slice, whose buffers begin before it.
        places = rows + array.offset
        is_valid = (bits[places >> 3] >> (places & 7)) & 1
        pairs = zip(read(rows), is_valid.tolist())
        return [value if valid else None for value, valid in pairs]

    return read_with_nulls


def _number_reader(array: pa.Array) -> ReadValues:
    """Returns a function from rows to their numbers, whatever stands in the place of nulls."""
    _, numbers = array.buffers()
    kind = array.type.to_pandas_dtype()
    values = np.frombuffer(numbers or b"", kind)[array.offset :]
    return lambda rows: values[rows].tolist()


def _text_reader(array: pa.Array) -> ReadValues:
    """Returns a function from rows to their texts, read from the array's buffers."""
    # Buffers: which values are null, the offset of each text, and all texts one after another.
    _, offsets, text = array.buffers()
    # Offsets of a large_string have 64 bits.
    width = np.int32 if pa.types.is_string(array.type) else np.int64
    # The buffers of a slice begin before it.
    bounds = np.frombuffer(offsets or b"", width)[array.offset :]
    # An array of empty texts has no buffer of them.
    data = memoryview(text or b"")

    def read(rows: np.ndarray) -> list[str]:
        spans = zip(bounds[rows].tolist(), bounds[rows + 1].tolist())
        return [str(data[start:stop], "utf-8") for start, stop in spans]

    return read

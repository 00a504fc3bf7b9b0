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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from twotower.core.arrow import int_array, texts_reader
from twotower.index.base import Index, RemoteSearch
from twotower.index.exact import ExactIndex
from twotower.index.vectors import Vectors, popularity_coordinate

NOT_REMOVED = np.iinfo(np.int64).max  # the tombstone of items that exist: later than any change
MIN_CAPACITY = 1_024  # slots of a new memtable
MAX_SINGLE_ROWS = 20  # rows whose values are read one by one, not by Arrow
# Values that are kept for the next lists with their rows: at most so many, and of so many bytes in
# Arrow, of which objects of Python take two to four times as much.
MAX_VALUES_READ = 2**20
MAX_BYTES_READ = 2**26
EPSILON = 1e-30  # least length that a vector is divided by: zeros stay zeros

# Rows of a column -> their values, None for null.
ReadValues = Callable[[Sequence[int]], list[Any]]


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
        ids: Id of each row, the same objects as elsewhere in memory; None to read them from
            `items`.
    """

    index: Index
    vectors: Vectors
    items: pa.Table
    counts: np.ndarray
    numbers: np.ndarray
    row_by_number: np.ndarray
    removed_by: np.ndarray
    ids: Sequence[str] | None = None

    @classmethod
    def build(
        cls,
        index: Index,
        vectors: Vectors,
        items: pa.Table,
        counts: np.ndarray,
        numbers: np.ndarray,
        num_numbers: int,
        ids: Sequence[str] | None = None,
    ) -> BaseSegment:
        """Returns the segment of N items, all of them there.

        Args:
            index: Index over `vectors`.
            vectors: Item vectors [N, D].
            items: item_id and display columns, N rows.
            counts: Training rows of each item, int64 [N].
            numbers: Number of each item, int64 [N].
            num_numbers: Number of the items that ever existed, whose numbers lie below it.
            ids: Ids of the items, where they are in memory as texts of Python.
        """
        row_by_number = np.full(num_numbers, -1, np.int64)
        row_by_number[numbers] = np.arange(len(numbers))
        removed_by = np.full(len(numbers), NOT_REMOVED)
        return cls(
            index, vectors, items.combine_chunks(), counts, numbers, row_by_number, removed_by, ids
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
        names, readers = self._readers
        kept = self._rows_read
        listed = rows.tolist()
        # Reading an item's columns takes longer than all else that is done for it.
        found = list(map(kept.get, listed))
        if None not in found:
            return [dict(zip(names, values)) for values in found if values is not None]
        unread = [row for row, values in zip(listed, found) if values is None]
        # Arrow's own way takes longer for a list of ten, and less for a hundred.
        if len(unread) > MAX_SINGLE_ROWS:
            return self.items.take(int_array(rows)).to_pylist()
        read = dict(zip(unread, zip(*[read(unread) for read in readers])))
        self._keep_read(read)
        return [dict(zip(names, values or read[row])) for row, values in zip(listed, found)]

    def prepare_rows(self) -> None:
        """Reads the columns of all rows that may be kept, as the first lists would."""
        if self._has_nested:
            return
        columns: list[Sequence[Any]] = []
        for name in self.items.column_names:
            column = self.items[name].slice(0, self._max_rows_read)
            if name == "item_id" and self.ids is not None:
                columns.append(self.ids[: len(column)])
            elif pa.types.is_string(column.type):
                # Categories repeat: one object for each of them.
                same: dict[str | None, str | None] = {}
                columns.append([same.setdefault(text, text) for text in column.to_pylist()])
            else:
                columns.append(column.to_pylist())
        self._rows_read.update(enumerate(zip(*columns)))

    def read_ids(self, rows: Sequence[int]) -> list[str]:
        """Returns the id of the item in some rows."""
        # Two bounds and the bytes between them lie apart in memory, and a text is made of them.
        if self.ids is not None:
            ids = self.ids
            return [ids[row] for row in rows]
        names, readers = self._readers
        return readers[names.index("item_id")](rows)

    def _keep_read(self, read: Mapping[int, tuple[Any, ...]]) -> None:
        """Keeps the values of rows, of a bounded number of them."""
        if self._has_nested:
            return
        # Other threads may read on from what they found: nothing there is changed.
        if len(self._rows_read) + len(read) > self._max_rows_read:
            self._rows_read.clear()
        self._rows_read.update(read)

    @functools.cached_property
    def _max_rows_read(self) -> int:
        """Number of rows whose values are kept."""
        row_bytes = self.items.nbytes / max(len(self), 1)
        by_bytes = int(MAX_BYTES_READ / max(row_bytes, 1.0))
        return min(by_bytes, MAX_VALUES_READ // max(self.items.num_columns, 1))

    @functools.cached_property
    def _has_nested(self) -> bool:
        """Whether a column holds lists, which could be changed by who is given them."""
        return any(map(pa.types.is_nested, self.items.schema.types))

    @functools.cached_property
    def _rows_read(self) -> dict[int, tuple[Any, ...]]:
        """Values of the display columns of rows that were listed before, by row."""
        return {}

    @functools.cached_property
    def _readers(self) -> tuple[list[str], list[ReadValues]]:
        """The display columns, and the function from rows to the values of each."""
        names = self.items.column_names
        return names, [values_reader(self.items[name]) for name in names]

    @functools.cached_property
    def is_remote(self) -> bool:
        """Whether other processes hold the items and search them."""
        # Asked of each request, and an abstract class takes its time to say it.
        return isinstance(self.index, RemoteSearch)

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

    Texts and numbers are read from Arrow's buffers, a few in a third of the time that its own two
    calls take.

    >>> read = values_reader(pa.chunked_array([["a", None, "été"]]))
    >>> read([2, 1])
    ['été', None]
    """
    if column.num_chunks == 1:
        array = column.chunk(0)
    else:
        array = pa.concat_arrays(column.chunks or [pa.array([], column.type)])
    kind = array.type
    read_few: ReadValues | None = None
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        read_few = texts_reader(array)
    elif (pa.types.is_integer(kind) or pa.types.is_floating(kind)) and kind != pa.float16():
        read_few = _numbers_reader(array)
    bits = None
    # A column of nulls alone may have no buffer that says so; it is not read by buffers.
    if array.null_count and read_few is not None:
        bits = memoryview(array.buffers()[0]).cast("B")

    def read(rows: Sequence[int]) -> list[Any]:
        if read_few is None:
            return array.take(int_array(np.asarray(rows))).to_pylist()
        values = read_few(rows)
        if bits is None:
            return values
        # The buffers of a slice begin before it.
        positions = [row + array.offset for row in rows]
        is_valid = [bits[position >> 3] >> (position & 7) & 1 for position in positions]
        return [value if valid else None for value, valid in zip(values, is_valid)]

    return read


def _numbers_reader(array: pa.Array) -> ReadValues:
    """Returns a function from rows to their numbers, whatever stands in the place of nulls."""
    letter = "f" if pa.types.is_floating(array.type) else "i"
    if pa.types.is_unsigned_integer(array.type):
        letter = "u"
    # Not by `to_pandas_dtype`, which fails where pandas is not installed.
    kind: Any = np.dtype(f"{letter}{array.type.bit_width // 8}").char
    values = memoryview(array.buffers()[1] or b"").cast("B").cast(kind)[array.offset :]
    return lambda rows: [values[row] for row in rows]

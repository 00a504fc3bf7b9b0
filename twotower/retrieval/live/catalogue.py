"""The items of a bundle as they change, in memory.

Every reader sees the items of one moment, and every change whole or not at all. The module
`twotower.retrieval.live.live_bundle` makes changes durable.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa

from twotower.core.errors import ConfigError, QueryError, UnknownItemError, echo, most_alike
from twotower.index.base import Index, check_vectors
from twotower.index.vectors import Vectors, log_counts, store_like
from twotower.retrieval.live.segments import NOT_REMOVED, BaseSegment, MemTable
from twotower.retrieval.live.snapshot import Snapshot

MAX_ORDERED_IDS = 200_000  # ids among which the nearest of an unknown one are sought

# (item vectors [N, D], items with their ids, training rows of each [N]) -> an index over them
BuildIndex = Callable[[Vectors, pa.Table, np.ndarray], Index]


class LiveCatalogue:
    """The items that can be recommended, and the methods that change them.

    Readers take `snapshot` once for each answer and need no lock. Writers hold `lock`.

    Attributes:
        snapshot: Snapshot of the items as they are now.
        numbers: Number of each item by its id; only grows.
        lock: Lock that is held while a change is made.
    """

    def __init__(
        self,
        base: BaseSegment,
        numbers: dict[str, int],
        counts: np.ndarray,
        *,
        lock: threading.RLock,
        version: int = 0,
    ):
        """Starts without changes; see `build` for the items of a bundle.

        Args:
            base: Segment of the indexed items.
            numbers: Number of each item by its id, including items that were deleted.
            counts: Training rows of the items by their numbers; later numbers have none.
            lock: Lock that is held while a change is made.
            version: Number of the last change that is in the base.
        """
        memtable = MemTable.empty(base.vectors.shape[1])
        self.snapshot = Snapshot(base, memtable, 0, version, 0, {})
        self.numbers = numbers
        self.lock = lock
        self._counts = counts
        # Slot of each number whose item is in the memtable. For the writer alone: readers find
        # slots by the arrays of their snapshot.
        self._slots: dict[int, int] = {}
        self._ordered: list[str] = []

    @classmethod
    def build(
        cls,
        index: Index,
        vectors: Vectors,
        items: pa.Table,
        counts: np.ndarray | None = None,
        lock: threading.RLock | None = None,
    ) -> LiveCatalogue:
        """Returns the catalogue of N items that were just indexed.

        Args:
            index: Index over `vectors`.
            vectors: Item vectors, float32 [N, D], or int8 that is read as such.
            items: item_id and display columns, N rows.
            counts: Training rows of each item, int64 [N]; 0 by default.
            lock: Lock that is held while a change is made; a new one by default.
        """
        size = len(items)
        ids = items["item_id"].to_pylist()
        if counts is None:
            counts = np.zeros(size, np.int64)
        counts = np.asarray(counts)
        # Just indexed: the number of an item is its row.
        base = BaseSegment.build(
            index,
            vectors,
            items,
            counts,
            np.arange(size, dtype=np.int64),
            num_numbers=size,
            ids=tuple(ids),
        )
        numbers = {item: number for number, item in enumerate(ids)}
        return cls(base, numbers, counts, lock=lock or threading.RLock())

    @property
    def schema(self) -> pa.Schema:
        """Schema of item_id and the display columns."""
        return self.snapshot.base.items.schema

    def numbers_of(self, ids: Iterable[str]) -> np.ndarray:
        """Returns the numbers of ids, int64; ids that never were in the catalogue are left out."""
        found = map(self.numbers.get, dict.fromkeys(ids))
        return np.array([number for number in found if number is not None], np.int64)

    def counts_of(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the training rows of items, int64; 0 of items that came after training."""
        known = numbers < len(self._counts)
        # The 0 behind the counts is read by later numbers, also where there are no counts at all.
        with_none = np.append(self._counts, 0)
        return with_none[np.where(known, numbers, -1)]

    def position(self, snapshot: Snapshot, item: str) -> int:
        """Returns the position of an item.

        Raises:
            UnknownItemError: It does not exist; the message names the nearest ids.
        """
        number = self.numbers.get(item)
        position = -1
        # An item that was deleted keeps its number, and has no position.
        if number is not None:
            position = snapshot.position_of(number)
        if position < 0:
            similar = most_alike(item, self._ordered_ids(), 3)
            # Items that were deleted keep their numbers.
            similar = [each for each in similar if snapshot.position_of(self.numbers[each]) >= 0]
            hint = ""
            if similar:
                hint = f" The nearest ids are: {', '.join(similar)}."
            raise UnknownItemError(
                f"item {echo(item)} is not among the {len(snapshot)} items of the corpus.{hint}"
            )
        return position

    def _ordered_ids(self) -> list[str]:
        """Returns ids in their order, from a bounded number of items; the latest may lack."""
        size = min(len(self.numbers), MAX_ORDERED_IDS)
        # Not with each new item: ordering takes a hundred times what a look takes.
        if size > 1.1 * len(self._ordered):
            # A copy at once: another thread may add an id meanwhile.
            self._ordered = sorted(tuple(self.numbers)[:size])
        return self._ordered

    def positions(self, snapshot: Snapshot, items: Iterable[str]) -> np.ndarray:
        """Returns the positions of items in a snapshot, int64; -1 of those that are not there."""
        positions = []
        for item in items:
            number = self.numbers.get(item)
            positions.append(-1 if number is None else snapshot.position_of(number))
        return np.array(positions, np.int64)

    def check(self, items: pa.Table, vectors: np.ndarray) -> tuple[pa.Table, np.ndarray]:
        """Returns items in the schema of the catalogue, and their vectors, ready for `upsert`.

        Beside int8 vectors they are rounded to int8 too, so that their scores do not change when
        items are indexed anew or written.

        Raises:
            QueryError: A vector is not finite, of the wrong width, or zero where vectors are
                normalised.
            ConfigError: An id is missing or comes twice, or a column cannot be read as the
                catalogue's.
        """
        base = self.snapshot.base
        if "item_id" not in items.column_names:
            raise ConfigError(
                "upsert needs a column 'item_id'; the rows have: "
                f"{', '.join(items.column_names) or 'none'}."
            )
        shape = (len(items), base.vectors.shape[1])
        if not len(items):
            return self.schema.empty_table(), np.zeros(shape, np.float32)
        vectors = check_vectors(vectors, what="item")
        if vectors.shape != shape:
            raise QueryError(
                f"item vectors are of shape {list(vectors.shape)}; of these items they must be of "
                f"{list(shape)}."
            )
        # As of queries: with normalised vectors, zeros say that something before went wrong.
        is_zero = ~vectors.any(axis=1)
        if base.index.normalized and is_zero.any():
            raise QueryError(
                f"item vector {int(is_zero.argmax())} is zero although vectors are normalised."
            )
        columns = {field.name: _column(items, field) for field in self.schema}
        _check_ids(columns["item_id"].to_pylist())
        stored = store_like(vectors, base.vectors)
        return pa.table(columns, schema=self.schema), np.asarray(stored)

    def upsert(self, items: pa.Table, vectors: np.ndarray) -> None:
        """Adds checked items, or replaces those with the same ids. The caller holds the lock."""
        if not len(items):
            return
        # Readers of the old snapshot are not disturbed: they read no slot behind `old.num_slots`,
        # and tombstones bear a version that they do not see.
        old = self.snapshot
        version = old.version + 1
        num_slots = old.num_slots + len(items)
        memtable = old.memtable.with_capacity(num_slots)
        ids = items["item_id"].to_pylist()
        # A new id gets the next number, an id that was deleted the one that it had.
        numbers = [self.numbers.setdefault(item, len(self.numbers)) for item in ids]
        slots = slice(old.num_slots, num_slots)
        memtable.vectors[slots] = vectors
        memtable.numbers[slots] = numbers
        memtable.log_counts[slots] = log_counts(self.counts_of(np.array(numbers)))
        memtable.added_by[slots] = version
        memtable.rows.extend(items.to_pylist())
        memtable.tables.append((old.num_slots, items))
        # Before the new slots are noted, or these would be removed at once.
        num_removed = self._remove(numbers, version, memtable)["row"]
        self._slots.update(zip(numbers, range(old.num_slots, num_slots)))
        # Publishes the change: everything that it holds was written above.
        self.snapshot = dataclasses.replace(
            old,
            memtable=memtable,
            num_slots=num_slots,
            version=version,
            num_removed=old.num_removed + num_removed,
        )

    def delete(self, ids: Sequence[str]) -> int:
        """Deletes items, and returns the number that existed. The caller holds the lock."""
        old = self.snapshot
        version = old.version + 1
        numbers = [self.numbers[item] for item in dict.fromkeys(ids) if item in self.numbers]
        removed = self._remove(numbers, version, old.memtable)
        self.snapshot = dataclasses.replace(
            old, version=version, num_removed=old.num_removed + removed["row"]
        )
        return removed["row"] + removed["slot"]

    def rebalance(self, build: BuildIndex) -> None:
        """Merges both segments into a new base, indexed anew.

        Answers and changes go on meanwhile; those changes are then made to the new base too.

        Args:
            build: Function that builds the index.
        """
        with self.lock:
            then = self.snapshot
        numbers, vectors, items = then.all_items()
        counts = self.counts_of(numbers)
        # The long part, without the lock.
        index = build(vectors, items, counts)
        with self.lock:
            now = self.snapshot
            # In the order of their numbers, which only grow.
            known = list(self.numbers)
            base = BaseSegment.build(
                index,
                vectors,
                items,
                counts,
                numbers,
                num_numbers=len(self.numbers),
                ids=tuple(known[number] for number in numbers.tolist()),
            )
            rebuilt = LiveCatalogue(
                base, self.numbers, self._counts, lock=self.lock, version=now.version
            )
            rebuilt._repeat_changes(then, now)
            # All at once: no reader may see the new index without the changes made while it was
            # built.
            self._slots = rebuilt._slots
            self.snapshot = rebuilt.snapshot

    def _repeat_changes(self, then: Snapshot, now: Snapshot) -> None:
        """Makes the changes between two snapshots once more, on the items indexed at the first."""
        memtable = now.memtable
        added_by = memtable.added_by[: now.num_slots]
        removed_by = memtable.removed_by[: now.num_slots]
        slots = np.flatnonzero((added_by > then.version) | _is_between(removed_by, then, now))
        rows = np.flatnonzero(_is_between(now.base.removed_by, then, now))
        changed = np.unique(np.concatenate([memtable.numbers[slots], now.base.numbers[rows]]))
        if not changed.size:
            return
        # Whatever the changes were, they end in items that exist now and items that do not: delete
        # all, then add those that exist.
        ids = {number: item for item, number in self.numbers.items()}
        self.delete([ids[number] for number in changed.tolist()])
        positions = np.array([now.position_of(number) for number in changed.tolist()])
        positions = positions[positions >= 0]
        if positions.size:
            items = pa.Table.from_pylist(now.rows(positions), schema=self.schema)
            self.upsert(items, np.stack([now.vector(position) for position in positions]))

    def _remove(
        self, numbers: Iterable[int], version: int, memtable: MemTable
    ) -> dict[Literal["row", "slot"], int]:
        """Sets the tombstones of items that exist, and counts the rows and slots that got one."""
        base = self.snapshot.base
        removed: dict[Literal["row", "slot"], int] = {"row": 0, "slot": 0}
        # An item exists in one position at most: where it is in a slot, the tombstone of its row is
        # set already.
        for number in numbers:
            slot = self._slots.pop(number, None)
            row = base.row_of(number)
            if slot is not None:
                memtable.removed_by[slot] = version
                removed["slot"] += 1
            elif row >= 0 and base.removed_by[row] == NOT_REMOVED:
                base.removed_by[row] = version
                removed["row"] += 1
        return removed


def _is_between(changes: np.ndarray, then: Snapshot, now: Snapshot) -> np.ndarray:
    """Marks the changes that came after the snapshot `then` and are seen by `now`."""
    return (changes > then.version) & (changes <= now.version)


def _check_ids(ids: list[str | None]) -> None:
    """Refuses missing and repeated ids: of two rows of one item either could be meant."""
    if None in ids:
        raise ConfigError("item_id None in the rows of upsert is missing.")
    seen = set()
    for item in ids:
        if item in seen:
            raise ConfigError(f"item_id {item!r} in the rows of upsert is there twice.")
        seen.add(item)


def _column(items: pa.Table, field: pa.Field) -> pa.ChunkedArray:
    """Returns a column of the items in the type of the catalogue's; nulls where it is missing."""
    if field.name not in items.column_names:
        return pa.chunked_array([pa.nulls(len(items), field.type)])
    try:
        return items[field.name].cast(field.type)
    except pa.ArrowException as error:
        raise ConfigError(
            f"upsert: column {field.name!r} must hold {field.type}: {error}."
        ) from error

"""Changes to the items of a loaded bundle: each is durable before it can be seen, and seen whole or
not at all."""

from __future__ import annotations

import dataclasses
import difflib
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from twotower.core.errors import QueryError, UnknownItemError
from twotower.index.base import check_vectors
from twotower.index.int8 import Vectors, store_like
from twotower.index.popularity import log_counts
from twotower.retrieval.live.snapshot import NEVER, Delta, Main, Snapshot

NEAREST_AMONG = 20_000  # ids compared with a misspelt one

# (vectors [N, D], training rows of each [N]) -> an index over them
BuildIndex = Callable[[Vectors, np.ndarray], Any]


class LiveCatalogue:
    """The items of one bundle, and the one who changes them.

    Attributes:
        snapshot: the items as they are now; take it once an answer.
        numbers: item id -> number; only grows.
        lock: held while a change is made.
    """

    def __init__(
        self,
        index: Any,
        vectors: Vectors,
        items: pa.Table,
        counts: np.ndarray | None = None,
        lock: threading.RLock | None = None,
    ):
        count = len(items)
        self.numbers: dict[str, int] = {
            item: n for n, item in enumerate(items["item_id"].to_pylist())
        }
        self._counts = np.zeros(count, np.int64) if counts is None else np.asarray(counts)
        main = Main.make(
            index, vectors, items, self._counts, np.arange(count, dtype=np.int64), count
        )
        self.snapshot = Snapshot(main, Delta.empty(vectors.shape[1]), 0, 0, 0, {})
        self.lock = threading.RLock() if lock is None else lock
        self._slots: dict[int, int] = {}  # number -> its slot, of those that have one

    @property
    def schema(self) -> pa.Schema:
        """Of the display columns."""
        return self.snapshot.main.items.schema

    def numbers_of(self, ids: Iterable[Any]) -> np.ndarray:
        """int64, the numbers of the ids that ever were in the corpus."""
        numbers = map(self.numbers.get, dict.fromkeys(map(str, ids)))
        return np.array([number for number in numbers if number is not None], np.int64)

    def counts_of(self, numbers: np.ndarray) -> np.ndarray:
        """int64, the training rows of the items; 0 of what came after training."""
        known = numbers < len(self._counts)
        return np.where(known, np.append(self._counts, 0)[np.where(known, numbers, -1)], 0)

    def place(self, snapshot: Snapshot, item: Any) -> int:
        """Where an item is; raises `UnknownItemError` with the nearest ids."""
        number = self.numbers.get(str(item), -1)
        place = snapshot.place_of(number) if number >= 0 else -1
        if place < 0:
            near = nearest(str(item), self.numbers)
            hint = f" The nearest ids are: {', '.join(near)}." if near else ""
            raise UnknownItemError(
                f"item {str(item)!r} is not among the {len(snapshot)} items of the corpus.{hint}"
            )
        return place

    def check(self, items: pa.Table, vectors: np.ndarray) -> tuple[pa.Table, np.ndarray]:
        """The items in the schema of the bundle, and their vectors, or an error before anything is
        changed. Beside int8 vectors they are rounded as those are, so that scores stay what they
        are when items are indexed anew or written.

        Raises:
            QueryError: a vector is not finite, of the wrong width, or zero where vectors are
                normalised.
            ValueError: an id is missing or comes twice, or a column cannot be read as the bundle's.
        """
        main = self.snapshot.main
        if "item_id" not in items.column_names:
            raise ValueError(
                f"upsert needs a column 'item_id'; the rows have: {', '.join(items.column_names) or 'none'}."
            )
        vectors = (
            check_vectors(vectors, what="item")
            if len(items)
            else np.zeros((0, main.vectors.shape[1]), np.float32)
        )
        if vectors.shape != (len(items), main.vectors.shape[1]):
            wanted = [len(items), main.vectors.shape[1]]
            raise QueryError(
                f"item vectors are of shape {list(vectors.shape)}; of these items they must be of {wanted}."
            )
        zero = ~vectors.any(axis=1)
        if main.index.normalized and zero.any():
            raise QueryError(
                f"item vector {int(zero.argmax())} is zero although vectors are normalised."
            )
        columns = {
            name: _column(items, name, kind)
            for name, kind in zip(self.schema.names, self.schema.types)
        }
        ids = columns["item_id"].to_pylist()
        if None in ids or len(set(ids)) < len(ids):
            twice = next((i for n, i in enumerate(ids) if i is None or i in ids[:n]), None)
            raise ValueError(
                f"item_id {twice!r} in the rows of upsert is {'missing' if twice is None else 'there twice'}."
            )
        return pa.table(columns, schema=self.schema), np.asarray(store_like(vectors, main.vectors))

    def upsert(self, items: pa.Table, vectors: np.ndarray) -> None:
        """Adds checked items, or puts them in the place of those with the same ids. The lock is
        held by the caller."""
        if not len(items):
            return
        old, version = self.snapshot, self.snapshot.version + 1
        count = old.count + len(items)
        delta = old.delta.grown(count)
        numbers = [
            self.numbers.setdefault(item, len(self.numbers))
            for item in items["item_id"].to_pylist()
        ]
        slots = slice(old.count, count)
        delta.vectors[slots], delta.numbers[slots], delta.born[slots] = vectors, numbers, version
        delta.logs[slots] = log_counts(self.counts_of(np.array(numbers)))
        delta.rows.extend(items.to_pylist())
        delta.tables.append((old.count, items))
        dead = old.dead + sum(self._kill(delta, number, version) == "row" for number in numbers)
        self._slots.update(zip(numbers, range(old.count, count)))
        self.snapshot = dataclasses.replace(
            old, delta=delta, count=count, version=version, dead=dead
        )

    def delete(self, ids: Sequence[str]) -> int:
        """Takes items away, and says how many of them there were. The lock is held by the
        caller."""
        old, version = self.snapshot, self.snapshot.version + 1
        known = [self.numbers[item] for item in dict.fromkeys(ids) if item in self.numbers]
        killed = [self._kill(old.delta, number, version) for number in known]
        self.snapshot = dataclasses.replace(
            old, version=version, dead=old.dead + killed.count("row")
        )
        return sum(kind is not None for kind in killed)

    def rebalance(self, build: BuildIndex) -> None:
        """Indexes the items alive anew. Answers go on meanwhile, and so do changes, which the new
        index then has too."""
        with self.lock:
            then = self.snapshot
        numbers, vectors, items = then.alive()
        counts = self.counts_of(numbers)
        index = build(vectors, counts)
        with self.lock:
            now, total = self.snapshot, len(self.numbers)
            fresh = LiveCatalogue.__new__(LiveCatalogue)
            fresh.numbers, fresh._slots, fresh._counts = self.numbers, {}, self._counts
            main = Main.make(index, vectors, items, counts, numbers, total)
            fresh.snapshot = Snapshot(main, Delta.empty(vectors.shape[1]), 0, now.version, 0, {})
            fresh._follow(then, now)
            # At once: no reader may see the new index without the changes made while it was built.
            self._slots, self.snapshot = fresh._slots, fresh.snapshot

    def _follow(self, then: Snapshot, now: Snapshot) -> None:
        """Makes the changes between two snapshots once more, on what was indexed at the first."""
        born, died = now.delta.born[: now.count], now.delta.died[: now.count]
        slots = np.flatnonzero(
            (born > then.version) | ((died > then.version) & (died <= now.version))
        )
        rows = np.flatnonzero((now.main.died > then.version) & (now.main.died <= now.version))
        changed = np.unique(np.concatenate([now.delta.numbers[slots], now.main.numbers[rows]]))
        names = {number: item for item, number in self.numbers.items()} if changed.size else {}
        self.delete([names[number] for number in changed.tolist()])
        back = [place for number in changed.tolist() if (place := now.place_of(number)) >= 0]
        if back:
            items = pa.Table.from_pylist(now.rows(np.array(back)), schema=self.schema)
            self.upsert(items, np.stack([now.vector(place) for place in back]))

    def _kill(self, delta: Delta, number: int, version: int) -> str | None:
        """Marks the item's place, if it is alive, as taken away by change `version`; which kind of
        place it was."""
        main, slot = self.snapshot.main, self._slots.pop(number, None)
        if slot is not None:
            delta.died[slot] = version
            return "slot"
        row = int(main.places[number]) if number < len(main.places) else -1
        if row < 0 or main.died[row] != NEVER:
            return None
        main.died[row] = version
        return "row"


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Ids that look like `name`; of many ids only those are compared that begin alike."""
    known = tuple(known)
    candidates = (
        known
        if len(known) <= NEAREST_AMONG
        else [i for i in known if i[:2] == name[:2]][:NEAREST_AMONG]
    )
    return difflib.get_close_matches(name, candidates, n=count, cutoff=0.0)


def _column(items: pa.Table, name: str, kind: pa.DataType) -> pa.ChunkedArray:
    if name not in items.column_names:
        return pa.chunked_array([pa.nulls(len(items), kind)])
    try:
        return items[name].cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"upsert: column {name!r} must hold {kind}: {error}.") from error

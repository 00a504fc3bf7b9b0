"""The items that can be recommended at a moment: an index that never changes, what came since, and
what is gone.

ScaNN's own updates are unsafe while others search, and end the process on bad input. So the index
and its vectors stay as they are; new and changed items go to the end of a second, small set that is
searched exactly, and what they replace is marked as gone. Every change has a number. A reader takes
one `Snapshot`, which names the last change that it sees; arrays only grow behind what a snapshot
sees, and marks hold the number of their change, so that readers need no lock and one answer never
mixes two moments. One writer at a time publishes the next snapshot by assigning it.

An item keeps its number from its first appearance on, whatever happens to it; its place (a row of
the index, or behind those a slot of the second set) changes with each update.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from twotower.core.ragged import Ragged
from twotower.index.base import Index, check_queries, check_scores
from twotower.index.exact import ExactIndex
from twotower.index.int8 import Vectors, store_like
from twotower.index.popularity import append_coordinate, popularity_coordinate
from twotower.index.search import AllowedRows, search_filtered
from twotower.kernels.top_k import RunningTopK
from twotower.retrieval.live.conditions import Where, matching
from twotower.retrieval.live.display import reader

NEVER = np.iinfo(np.int64).max
FIRST_CAPACITY = 1_024
FEW = 256  # rows that are looked up one by one
REMEMBERED = 64  # conditions whose matching rows are kept


@dataclasses.dataclass(frozen=True, eq=False)
class Main:
    """What was indexed.

    Attributes:
        index: over `vectors`.
        vectors: float32 [N, D], or int8 that is read as such.
        items: item_id and display columns, N rows.
        counts: int64 [N], training rows of each item.
        numbers: int64 [N], the number of each row's item.
        places: int64, the row of each number; -1 without one.
        died: int64 [N], the change that took each row away.
    """

    index: Index
    vectors: Vectors
    items: pa.Table
    counts: np.ndarray
    numbers: np.ndarray
    places: np.ndarray
    died: np.ndarray

    @classmethod
    def make(
        cls,
        index: Index,
        vectors: Vectors,
        items: pa.Table,
        counts: np.ndarray,
        numbers: np.ndarray,
        total: int,
    ) -> Main:
        """Args:
        total: numbers given so far.
        """
        places = np.full(total, -1, np.int64)
        places[numbers] = np.arange(len(numbers))
        return cls(
            index,
            vectors,
            items.combine_chunks(),
            counts,
            numbers,
            places,
            np.full(len(numbers), NEVER),
        )

    @functools.cached_property
    def columns(self) -> list[tuple[str, Callable[[int], Any]]]:
        """The name of each column of `items`, and what gives its value of a row."""
        return [(name, reader(self.items[name])) for name in self.items.column_names]

    @functools.cached_property
    def popularity(self) -> tuple[np.ndarray, float] | None:
        """What `popularity.popularity_coordinate` gives, where the index has that coordinate."""
        dim = self.vectors.shape[1]
        return popularity_coordinate(self.counts, dim) if self.index.dim == dim + 1 else None

    @functools.cached_property
    def in_order(self) -> bool:
        """Whether each row's number is the row."""
        return bool((self.numbers == np.arange(len(self.numbers))).all())

    def row_of(self, numbers: np.ndarray) -> np.ndarray:
        """The row of each number; -1 without one."""
        if self.in_order and (not len(numbers) or numbers.max() < len(self.numbers)):
            return numbers
        known = numbers < len(self.places)
        return (
            np.where(known, self.places[np.where(known, numbers, 0)], -1)
            if len(self.places)
            else np.full(len(numbers), -1)
        )

    @functools.cached_property
    def units(self) -> tuple[ExactIndex, np.ndarray]:
        """The vectors at length 1 (a zero one stays) and an index over them, where they have other
        lengths."""
        units = np.asarray(self.vectors)
        units = units / np.maximum(np.linalg.norm(units, axis=1, keepdims=True), 1e-30)
        return ExactIndex(units), units


@dataclasses.dataclass(frozen=True, eq=False)
class Delta:
    """Slots of what came since; those behind a snapshot's `count` may be written while it is read.

    Attributes:
        vectors: float32 [capacity, D].
        numbers: int64 [capacity], of the item in each slot.
        logs: float32 [capacity], the log count of each.
        born, died: int64 [capacity], the changes that brought it and took it away.
        rows: item_id and display columns of each slot; grows.
        tables: (first slot, the same columns of it and the next) of each update; grows.
    """

    vectors: np.ndarray
    numbers: np.ndarray
    logs: np.ndarray
    born: np.ndarray
    died: np.ndarray
    rows: list[dict]
    tables: list[tuple[int, pa.Table]]

    @classmethod
    def empty(cls, dim: int, capacity: int = FIRST_CAPACITY) -> Delta:
        fill = lambda value: np.full(capacity, value, np.int64)  # noqa: E731
        logs = np.zeros(capacity, np.float32)
        return cls(
            np.zeros((capacity, dim), np.float32), fill(-1), logs, fill(NEVER), fill(NEVER), [], []
        )

    def grown(self, needed: int) -> Delta:
        """Itself, or a copy with room for `needed` slots; readers keep the old arrays."""
        size = len(self.numbers)
        if needed <= size:
            return self
        larger = Delta.empty(self.vectors.shape[1], max(needed, 2 * size))
        for name in ("vectors", "numbers", "logs", "born", "died"):
            getattr(larger, name)[:size] = getattr(self, name)
        return dataclasses.replace(larger, rows=self.rows, tables=self.tables)


@dataclasses.dataclass(frozen=True, eq=False)
class Snapshot:
    """The items alive after change `version`.

    Attributes:
        count: slots of `delta` that exist.
        dead: rows of `main` that are gone.
        remembered: conditions -> matching rows; shared by all snapshots of one `main` and `delta`.
    """

    main: Main
    delta: Delta
    count: int
    version: int
    dead: int
    remembered: dict

    @functools.cached_property
    def slots_alive(self) -> np.ndarray:
        """bool [count]"""
        return (self.delta.born[: self.count] <= self.version) & (
            self.delta.died[: self.count] > self.version
        )

    def __len__(self) -> int:
        return len(self.main.numbers) - self.dead + int(self.slots_alive.sum())

    def search(
        self,
        queries: np.ndarray,
        k: int,
        *,
        exclude: Ragged | None = None,
        where: Where = (),
        only: np.ndarray | None = None,
        popularity_weight: float = 0.0,
        cosine: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best `k` items alive.

        Args:
            queries: float [Q, D].
            exclude: for each query, numbers of items that must not come back.
            where: conditions (column, operator, value) that items must satisfy, as of
                `config.data.where`.
            only: numbers of the items that may come back; all by default.
            popularity_weight: times the log count of an item is added to its score.
            cosine: rank by cosine instead of the dot product.

        Returns:
            (scores float32 [Q, k], places int64 [Q, k]); score -inf and place -1 where fewer than k
            items remain.
        """
        main, delta, count = self.main, self.delta, self.count
        index, vectors = (
            main.units if cosine and not main.index.normalized else (main.index, main.vectors)
        )
        queries = check_queries(queries, vectors.shape[1], normalized=index.normalized)
        known, last = queries, None
        if index.dim > vectors.shape[1]:
            last, factor = main.popularity
            known = append_coordinate(queries, popularity_weight * factor)
        elif popularity_weight:
            raise ValueError(
                f"popularity_weight={popularity_weight} needs an index with that coordinate: export with "
                "config.retrieval.popularity=True."
            )
        exclude = Ragged.empty(len(queries)) if exclude is None else exclude
        banned, allowed = (
            _renumbered(exclude, main.row_of(exclude.values)),
            self._allowed(where, only),
        )
        scores, rows = search_filtered(
            index, vectors, known, k, banned, allowed=allowed, extra_coordinate=last
        )
        if not count:
            return scores, rows.astype(np.int64)
        alive = self.slots_alive & self._slotsmatching(where)
        alive &= True if only is None else np.isin(delta.numbers[:count], only)
        found = queries @ delta.vectors[:count].T + popularity_weight * delta.logs[None, :count]
        if cosine:
            found /= np.maximum(np.linalg.norm(delta.vectors[:count], axis=1), 1e-30)[None, :]
        found[:, ~alive] = -np.inf
        found[
            exclude.contains(np.arange(len(queries))[:, None], delta.numbers[None, :count])
        ] = -np.inf
        check_scores(found)
        best = RunningTopK(len(queries), k)
        best.add_lists(scores, rows)
        best.add(found, len(main.numbers))
        scores, rows = best.best()
        return scores, rows.astype(np.int64)

    def place_of(self, number: int) -> int:
        """Where the item is now; -1 where it is not alive."""
        slots = np.flatnonzero((self.delta.numbers[: self.count] == number) & self.slots_alive)
        if slots.size:
            return len(self.main.numbers) + int(slots[-1])
        row = int(self.main.places[number]) if number < len(self.main.places) else -1
        return row if row >= 0 and self.main.died[row] > self.version else -1

    def vector(self, place: int) -> np.ndarray:
        """float32 [D]"""
        rows = len(self.main.numbers)
        return np.asarray(
            self.main.vectors[place] if place < rows else self.delta.vectors[place - rows]
        )

    def rows(self, places: np.ndarray) -> list[dict]:
        """item_id and display columns of the item in each place."""
        first = len(self.main.numbers)
        if 0 < len(places) <= FEW and (places < first).all():
            return [
                {name: read(place) for name, read in self.main.columns} for place in places.tolist()
            ]
        inside = places < first
        main = iter(self.main.items.take(pa.array(places[inside])).to_pylist())
        return [
            next(main) if place < first else dict(self.delta.rows[place - first])
            for place in places
        ]

    def item_ids(self, places: np.ndarray) -> pa.Array:
        """The ids of the items in `places`."""
        first, ids = len(self.main.numbers), self.main.items["item_id"]
        late = np.flatnonzero(places >= first)
        if not late.size:
            return ids.take(pa.array(places)).combine_chunks()
        found = np.empty(len(places), object)
        found[places < first] = ids.take(pa.array(places[places < first])).to_pylist()
        found[late] = [self.delta.rows[place - first]["item_id"] for place in places[late]]
        return pa.array(found.tolist(), pa.string())

    def alive(self) -> tuple[np.ndarray, Vectors, pa.Table]:
        """Numbers, vectors (stored as `main`'s) and display columns of all items alive: rows of the
        index first, then slots."""
        rows, slots = (
            np.flatnonzero(self.main.died > self.version),
            np.flatnonzero(self.slots_alive),
        )
        tables = [self.main.items.take(pa.array(rows))]
        if slots.size:
            chunks = [table for first, table in tuple(self.delta.tables) if first < self.count]
            tables.append(pa.concat_tables(chunks).take(pa.array(slots)))
        numbers = np.concatenate([self.main.numbers[rows], self.delta.numbers[slots]])
        vectors = np.concatenate([self.main.vectors[rows], self.delta.vectors[slots]])
        return numbers, store_like(vectors, self.main.vectors), pa.concat_tables(tables)

    def _allowed(self, where: Where, only: np.ndarray | None) -> AllowedRows | None:
        main, version = self.main, self.version
        if not where and only is None:
            if not self.dead:
                return None
            return AllowedRows(
                len(main.numbers) - self.dead,
                lambda rows: main.died[rows] > version,
                lambda: np.flatnonzero(main.died > version),
            )
        if only is None and not self.dead:
            return self._remembered(
                ("allowed", where), lambda: AllowedRows.from_mask(matching(main.items, where))
            )
        if only is None:
            return AllowedRows.from_mask(
                (main.died > version)
                & self._remembered(("main", where), lambda: matching(main.items, where))
            )
        rows = np.unique(main.row_of(only))
        rows = rows[rows >= 0]
        rows = rows[main.died[rows] > version]
        if where:
            rows = rows[
                self._remembered(("main", where), lambda: matching(main.items, where))[rows]
            ]
        return AllowedRows.from_rows(rows)

    def _slotsmatching(self, where: Where) -> np.ndarray:
        """bool [count]; only slots that came since the question was last asked are looked at."""
        if not where:
            return np.ones(self.count, bool)
        known = self.remembered.get(("delta", where), np.zeros(0, bool))
        if len(known) < self.count:
            new = [
                table
                for first, table in tuple(self.delta.tables)
                if len(known) <= first < self.count
            ]
            known = np.concatenate([known, matching(pa.concat_tables(new), where)])
            self._remember(("delta", where), known)
        return known[: self.count]

    def _remembered(self, key: tuple, compute: Callable[[], Any]) -> Any:
        found = self.remembered.get(key)
        if found is None:
            found = compute()
            self._remember(key, found)
        return found

    def _remember(self, key: tuple, value: Any) -> None:
        if len(self.remembered) >= REMEMBERED:
            self.remembered.clear()
        self.remembered[key] = value


def _renumbered(exclude: Ragged, rows: np.ndarray) -> Ragged:
    """`exclude` with other values; those of -1 are left out."""
    if not len(rows) or rows is exclude.values:
        return exclude
    return (
        Ragged(exclude.offsets, rows.astype(np.int32))
        if rows.min() >= 0
        else Ragged.from_pairs(exclude.rows[rows >= 0], rows[rows >= 0], num_rows=len(exclude))
    )

"""The items that can be recommended at one moment.

Every change to the catalogue has a number, and a snapshot names the last one that it sees. Arrays
of the segments only grow behind what a snapshot sees, and tombstones hold the number of their
change, so that readers need no lock and one answer never mixes two moments (multi-version
concurrency). One writer at a time publishes the next snapshot by assigning it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from twotower.core.arrays import Ragged
from twotower.core.arrow import BadValue, plain_text
from twotower.core.errors import ConfigError
from twotower.core.fields import check_fields
from twotower.index.base import RemoteSearch, check_queries, check_scores, list_length
from twotower.index.search import AllowedRows, search_filtered
from twotower.index.vectors import Vectors, append_coordinate, store_like
from twotower.kernels.top_k import RunningTopK
from twotower.retrieval.live.conditions import (
    LATEST,
    Conditions,
    latest_condition,
    matching_items,
    read_times,
)
from twotower.retrieval.live.segments import EPSILON, BaseSegment, MemTable

# Answers to conditions that are kept, at N bytes each; then all are dropped, as no server has so
# many usual ones.
MAX_CACHED_CONDITIONS = 64
MIN_LOOK = 4_096  # rows of an order that are looked at together


@dataclasses.dataclass(frozen=True, eq=False)
class Snapshot:
    """The items that are there after change `version`.

    A position is a row of the base, or, from `len(base)` on, a slot of the memtable.

    Attributes:
        base: Segment of the items that were indexed.
        memtable: Segment of the items that came since.
        num_slots: Number of the memtable's slots that this snapshot sees.
        version: Number of the last change that this snapshot sees.
        num_removed: Number of the base's rows that are removed.
        cache: Matching rows or slots by their conditions; shared by all snapshots of one base.
    """

    base: BaseSegment
    memtable: MemTable
    num_slots: int
    version: int
    num_removed: int
    cache: dict[tuple, Any]

    def __len__(self) -> int:
        return len(self.base) - self.num_removed + int(self._is_slot_alive.sum())

    def search(
        self,
        queries: np.ndarray,
        k: int,
        *,
        exclude: Ragged | None = None,
        where: Conditions = (),
        only: np.ndarray | None = None,
        popularity_weight: float = 0.0,
        cosine: bool = False,
        each_as_alone: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the best `k` items: those of the index, merged with those of the memtable.

        Args:
            queries: Query vectors, float [B, D].
            k: Length of the lists.
            exclude: Numbers of the items that must not come back, for each query.
            where: Conditions that items must satisfy.
            only: Numbers of the items that may come back; all by default.
            popularity_weight: Factor of an item's log count in its score.
            cosine: Whether cosines rank in the place of dot products.
            each_as_alone: See `search_filtered`.

        Returns:
            (scores float32 [B, L], positions int64 [B, L]), where L is at most `k` and the number
            of items; score -inf and position -1 where fewer than L items remain.
        """
        k = list_length(k, len(self.base) + self.num_slots)
        if where:
            where = self._resolve_latest(where)
        base = self.base
        index = base.index
        # Shards in other processes know their items' columns, and drop what may not come back.
        if base.is_remote and isinstance(index, RemoteSearch):
            return index.search_items(
                queries,
                k,
                exclude=exclude,
                where=where,
                only=only,
                popularity_weight=popularity_weight,
                cosine=cosine,
            )
        if exclude is None:
            exclude = Ragged.empty(len(queries))
        vectors = base.vectors
        if cosine:
            # The same index where vectors have length 1.
            index, vectors = base.unit_vectors
        has_coordinate = index.dim > vectors.shape[1]  # one more, of popularity
        # Checked here, before a coordinate is appended that would hide a query of zeros; otherwise
        # where the index is searched.
        if has_coordinate or self.num_slots:
            queries = check_queries(queries, vectors.shape[1], normalized=index.normalized)
        index_queries = queries
        coordinate = None
        if has_coordinate:
            coordinate, factor = base.popularity_coordinate
            index_queries = append_coordinate(queries, popularity_weight * factor)
        # Silence would rank as if it had been weighed.
        elif popularity_weight:
            raise ConfigError(
                f"popularity_weight={popularity_weight} needs an index with that coordinate: "
                "export with config.retrieval.popularity=True."
            )
        scores, rows = search_filtered(
            index,
            vectors,
            index_queries,
            # An index refuses 0, which a catalogue without items asks for.
            max(1, k),
            _replace_values(exclude, base.rows_of(exclude.values)),
            allowed=self._allowed_rows(where, only),
            extra_coordinate=coordinate,
            each_as_alone=each_as_alone,
        )
        # As after loading or rebalancing: nothing to merge.
        if not self.num_slots:
            return scores, rows.astype(np.int64)
        # All slots by one product: they are few beside the base.
        slot_scores = self._score_slots(queries, popularity_weight, cosine=cosine)
        slot_scores[:, ~self._allowed_slots(where, only)] = -np.inf
        slot_numbers = self.memtable.numbers[None, : self.num_slots]
        is_excluded = exclude.contains(np.arange(len(queries))[:, None], slot_numbers)
        slot_scores[is_excluded] = -np.inf
        check_scores(slot_scores)
        best = RunningTopK(len(queries), k)
        # The base first: of equal scores the lower position is kept.
        best.add_lists(scores, rows)
        best.add(slot_scores, len(base))
        scores, positions = best.best()
        return scores, positions.astype(np.int64)

    def first_by(
        self,
        column: str,
        k: int,
        *,
        slot_counts: np.ndarray,
        exclude: np.ndarray,
        where: Conditions = (),
        only: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the `k` items of the greatest values, whoever asks.

        Args:
            column: Display column of numbers or times; "" for the training rows.
            k: Length of the list.
            slot_counts: Training rows of the item in each slot, int64 [num_slots].
            exclude: Numbers of the items that must not come back.
            where: Conditions that items must satisfy.
            only: Numbers of the items that may come back; all by default.

        Returns:
            (values float64 [L], positions int64 [L]), where L is at most `k`; items without a value
            are left out.
        """
        where = self._resolve_latest(where)
        values = self._values_of(column, slot_counts)
        key = ("order", column)
        order = self._compute_once(key, lambda: _descending(values[: len(self.base)]))
        allowed = self._allowed_rows(where, only)
        excluded_rows = self.base.rows_of(exclude)
        found = [np.zeros(0, np.int64)]
        count = 0
        start = 0
        # Most lists end within the first rows, so that not all N are looked at.
        step = max(MIN_LOOK, 4 * k)
        while start < len(order) and count < k:
            rows = order[start : start + step]
            start += step
            # Growing: conditions that few rows satisfy would else be asked again and again.
            step *= 4
            if allowed is not None:
                rows = rows[allowed.contains(rows)]
            rows = rows[~np.isin(rows, excluded_rows)]
            found.append(rows)
            count += len(rows)
        slots = np.flatnonzero(self._allowed_slots(where, only))
        slots = slots[~np.isin(self.memtable.numbers[slots], exclude)] + len(self.base)
        slots = slots[~np.isnan(values[slots])]
        # The base first: of equal values the lower position is kept.
        positions = np.concatenate([*found, slots])
        best = _descending(values[positions])[:k]
        return values[positions[best]], positions[best]

    def _values_of(self, column: str, slot_counts: np.ndarray) -> np.ndarray:
        """Returns the value by which `first_by` orders each position, float64; NaN without one."""
        base = self.base
        if column:
            check_fields({column: ""}, base.items.column_names, "column: the bundle")
        of_base = self._compute_once(
            ("values", column),
            lambda: _numbers(base.items[column], column) if column else base.counts.astype(float),
        )
        if not self.num_slots:
            return of_base
        of_slots = slot_counts
        if column:
            of_slots = _numbers(pa.concat_tables(self._tables_from(0))[column], column)
        return np.concatenate([of_base, of_slots])

    def count_matching(self, where: Conditions) -> int:
        """Returns the number of items that satisfy conditions."""
        where = self._resolve_latest(where)
        # Matching rows are kept for all snapshots; which of them are left is of this one.
        rows = self._matching_rows(where) & (self.base.removed_by > self.version)
        count = int(rows.sum())
        if self.num_slots:
            count += int((self._matching_slots(where) & self._is_slot_alive).sum())
        return count

    def matching(self, positions: np.ndarray, where: Conditions) -> np.ndarray:
        """Whether the item in each position satisfies conditions, bool [M]; False at -1."""
        where = self._resolve_latest(where)
        is_matching = positions >= 0
        in_base = is_matching & (positions < len(self.base))
        is_matching[in_base] = self._matching_rows(where)[positions[in_base]]
        in_slots = positions >= len(self.base)
        if in_slots.any():
            slots = positions[in_slots] - len(self.base)
            is_matching[in_slots] = self._matching_slots(where)[slots]
        return is_matching

    def position_of(self, number: int) -> int:
        """Returns the position of an item by its number; -1 if it does not exist."""
        # The memtable first: a slot holds the newer version of an item.
        if self.num_slots:
            in_slots = self.memtable.numbers[: self.num_slots] == number
            slots = np.flatnonzero(in_slots & self._is_slot_alive)
            if slots.size:
                return len(self.base) + int(slots[-1])
        row = self.base.row_of(number)
        if row < 0 or self.base.removed_by[row] <= self.version:
            return -1
        return row

    def vector(self, position: int) -> np.ndarray:
        """Returns the vector of an item, float32 [D]."""
        if position < len(self.base):
            return np.asarray(self.base.vectors[position])
        return self.memtable.vectors[position - len(self.base)]

    def vectors(self, positions: np.ndarray) -> np.ndarray:
        """Returns the vector of the item in each position, float32 [M, D]."""
        in_base = positions < len(self.base)
        base_vectors = np.asarray(self.base.vectors[positions[in_base]])
        if in_base.all():
            return base_vectors
        vectors = np.empty((len(positions), base_vectors.shape[1]), np.float32)
        vectors[in_base] = base_vectors
        vectors[~in_base] = self.memtable.vectors[positions[~in_base] - len(self.base)]
        return vectors

    def rows(self, positions: np.ndarray) -> list[dict[str, Any]]:
        """Returns item_id and display columns of the item in each position."""
        base_size = len(self.base)
        # The usual list.
        if not self.num_slots:
            return self.base.read_rows(positions)
        # One read for all rows of the base: single rows are slow to take out of columns.
        base_rows = iter(self.base.read_rows(positions[positions < base_size]))
        rows = []
        for position in positions.tolist():
            if position < base_size:
                rows.append(next(base_rows))
            else:
                # A copy: callers take entries out of what they get.
                rows.append(dict(self.memtable.rows[position - base_size]))
        return rows

    def id_texts(self, positions: np.ndarray) -> list[str]:
        """Returns the id of the item in each position."""
        base_size = len(self.base)
        listed = positions.tolist()
        if not self.num_slots:
            return self.base.read_ids(listed)
        ids = self.base.read_ids([position for position in listed if position < base_size])
        of_base = iter(ids)
        rows = self.memtable.rows
        return [
            next(of_base) if position < base_size else rows[position - base_size]["item_id"]
            for position in listed
        ]

    def item_ids(self, positions: np.ndarray) -> pa.Array:
        """Returns the id of the item in each position."""
        in_base = positions < len(self.base)
        base_ids = self.base.items["item_id"].take(pa.array(positions[in_base]))
        if in_base.all():
            return base_ids.combine_chunks()
        slots = positions[~in_base] - len(self.base)
        ids = np.empty(len(positions), object)
        ids[in_base] = base_ids.to_pylist()
        ids[~in_base] = [self.memtable.rows[slot]["item_id"] for slot in slots]
        return pa.array(ids.tolist(), pa.string())

    def all_items(self) -> tuple[np.ndarray, Vectors, pa.Table]:
        """Returns numbers, vectors and display columns of all items, those of the base first.

        Vectors are stored as those of the base, as float32 or int8.
        """
        base = self.base
        memtable = self.memtable
        rows = np.flatnonzero(base.removed_by > self.version)
        slots = np.flatnonzero(self._is_slot_alive)
        tables = [base.items.take(pa.array(rows))]
        # Without any there may be no table, which `concat_tables` refuses.
        if slots.size:
            tables.append(pa.concat_tables(self._tables_from(0)).take(pa.array(slots)))
        numbers = np.concatenate([base.numbers[rows], memtable.numbers[slots]])
        vectors = np.concatenate([base.vectors[rows], memtable.vectors[slots]])
        return numbers, store_like(vectors, base.vectors), pa.concat_tables(tables)

    def _resolve_latest(self, where: Conditions) -> Conditions:
        """Returns conditions in which the latest items are those from a value on."""
        if all(operator != LATEST for _, operator, _ in where):
            return where
        resolved = []
        for name, operator, value in where:
            condition = (name, operator, value)
            if operator == LATEST:
                # Of this version alone: the next change may bring a later item.
                key = (LATEST, name, value, self.version)
                condition = self._compute_once(
                    key, functools.partial(self._from_latest, name, value)
                )
            resolved.append(condition)
        return tuple(resolved)

    def _from_latest(self, name: str, count: int) -> tuple[str, str, Any]:
        """Returns the condition of the `count` greatest values of a column."""
        check_fields(
            {name: count}, self.base.items.column_names, f"where latest {count}: the bundle"
        )
        alive = pa.array(self.base.removed_by > self.version)
        chunks = self.base.items[name].filter(alive).chunks
        if self.num_slots:
            slots = pa.concat_tables(self._tables_from(0))[name]
            chunks += slots.filter(pa.array(self._is_slot_alive)).chunks
        column = pa.chunked_array(chunks, self.base.items[name].type)
        return latest_condition(column, name, count)

    @functools.cached_property
    def _is_slot_alive(self) -> np.ndarray:
        """Whether each slot was added and not removed, bool [num_slots]."""
        # Cached, as a snapshot never changes: tombstones set later bear a later version.
        added = self.memtable.added_by[: self.num_slots] <= self.version
        return added & (self.memtable.removed_by[: self.num_slots] > self.version)

    def _score_slots(
        self, queries: np.ndarray, popularity_weight: float, *, cosine: bool
    ) -> np.ndarray:
        """Returns the scores of all slots, alive or not, float32 [B, num_slots]."""
        vectors = self.memtable.vectors[: self.num_slots]
        scores = queries @ vectors.T
        scores += popularity_weight * self.memtable.log_counts[None, : self.num_slots]
        if cosine:
            scores /= np.maximum(np.linalg.norm(vectors, axis=1), EPSILON)[None, :]
        return scores

    def _allowed_rows(self, where: Conditions, only: np.ndarray | None) -> AllowedRows | None:
        """Returns the rows of the base that may come back; None where all may."""
        removed_by = self.base.removed_by
        version = self.version
        # Named ids are few: a list of their rows costs less than a mask of N.
        if only is not None:
            rows = np.unique(self.base.rows_of(only))
            rows = rows[rows >= 0]
            rows = rows[removed_by[rows] > version]
            if where:
                rows = rows[self._matching_rows(where)[rows]]
            return AllowedRows.from_rows(rows)
        # Not cached: the next deletion changes it.
        if where and self.num_removed:
            return AllowedRows.from_mask((removed_by > version) & self._matching_rows(where))
        if where:
            # The whole answer is kept, its count too: the usual case of a server.
            matching = self._matching_rows
            return self._compute_once(
                ("rows", where), lambda: AllowedRows.from_mask(matching(where))
            )
        # Only the rows that a search finds are looked at, not all N.
        if self.num_removed:
            return AllowedRows(
                len(self.base) - self.num_removed,
                lambda rows: removed_by[rows] > version,
                lambda: np.flatnonzero(removed_by > version),
            )
        return None

    def _allowed_slots(self, where: Conditions, only: np.ndarray | None) -> np.ndarray:
        """Marks the slots that may come back: bool [num_slots]."""
        allowed = self._is_slot_alive
        if where:
            allowed = allowed & self._matching_slots(where)
        if only is not None:
            allowed = allowed & np.isin(self.memtable.numbers[: self.num_slots], only)
        return allowed

    def _matching_rows(self, where: Conditions) -> np.ndarray:
        """Marks the rows of the base that satisfy the conditions: bool [N]."""
        # Removed rows too, so that the answer holds for as long as the base does.
        return self._compute_once(("base", where), lambda: matching_items(self.base.items, where))

    def _matching_slots(self, where: Conditions) -> np.ndarray:
        """Marks the slots that satisfy the conditions: bool [num_slots].

        Only slots that came since the last query with these conditions are looked at.
        """
        key = ("memtable", where)
        # Slots only grow: what was looked at once stays right.
        known = self.cache.get(key, np.zeros(0, bool))
        if len(known) < self.num_slots:
            new = matching_items(pa.concat_tables(self._tables_from(len(known))), where)
            known = np.concatenate([known, new])
            self._store(key, known)
        # A newer snapshot, which shares the cache, may have looked at more.
        return known[: self.num_slots]

    def _tables_from(self, slot: int) -> list[pa.Table]:
        """Returns the display columns of the slots from `slot` on, where an update begins."""
        tables = tuple(self.memtable.tables)  # a writer may add one meanwhile
        return [table for first, table in tables if slot <= first < self.num_slots]

    def _compute_once(self, key: tuple, compute: Callable[[], Any]) -> Any:
        """Returns the value of a key, computed where it is missing.

        Two threads may compute it at once; either value is right, so no lock is needed.
        """
        value = self.cache.get(key)
        if value is None:
            value = compute()
            self._store(key, value)
        return value

    def _store(self, key: tuple, value: Any) -> None:
        if len(self.cache) >= MAX_CACHED_CONDITIONS:
            self.cache.clear()
        self.cache[key] = value


def _descending(values: np.ndarray) -> np.ndarray:
    """Returns the order of values from the greatest on, the first of equal ones first; no NaN."""
    order = np.argsort(-values, kind="stable")
    return order[: len(values) - int(np.isnan(values).sum())]


def _numbers(column: pa.ChunkedArray, name: str) -> np.ndarray:
    """Returns the values of a column of numbers or times, float64 [N]; NaN for null."""
    values = plain_text(column)
    kind = values.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        try:
            values = read_times(values)
        except BadValue as error:
            raise ConfigError(f"column={name!r} holds neither times nor numbers: {error}") from None
    # A null is NaN for NumPy.
    return values.cast(pa.float64()).to_numpy()


def _replace_values(lists: Ragged, values: np.ndarray) -> Ragged:
    """Returns the lists with other values, without those that are -1."""
    # The same array, where numbers are rows: most answers of a server end here.
    if not len(values) or values is lists.values:
        return lists
    if values.min() >= 0:
        return Ragged(lists.offsets, values.astype(np.int32))
    kept = values >= 0
    return Ragged.from_pairs(lists.rows[kept], values[kept], num_rows=len(lists))

"""Recommendations from a bundle, and changes to its items while it answers."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from twotower.core.errors import ChangesError, UnknownItemError
from twotower.core.progress import progress
from twotower.core.ragged import Ragged
from twotower.index.base import check_k
from twotower.retrieval.bundle import Bundle, load_bundle
from twotower.retrieval.live.catalogue import nearest
from twotower.retrieval.live.conditions import Conditions, ConditionsLike, as_conditions
from twotower.retrieval.live.live_bundle import LiveBundle
from twotower.retrieval.live.snapshot import Snapshot
from twotower.retrieval.tower_programs import BATCH
from twotower.retrieval.users import UserRows, as_table

__all__ = [
    "Recommendation",
    "Recommendations",
    "Retriever",
    "UnknownItemError",
    "as_table",
    "nearest",
]
USERS_AT_ONCE = BATCH  # users whose candidates are in memory together

Rows = pa.Table | Sequence[Mapping]


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """One item of a list.

    Attributes:
        item_id: Id of the item.
        score: Dot product of the vectors, or cosine of similar items; NaN of an item that was
            looked up.
        display: The item's display columns.
    """

    item_id: str
    score: float
    display: Mapping[str, Any]


class Recommendations(list[Recommendation]):
    """A list, best first.

    Attributes:
        known: Whether the user was known when the bundle was made.
    """

    def __init__(self, items: Sequence[Recommendation] = (), *, known: bool = True):
        super().__init__(items)
        self.known = known


class _Filters(NamedTuple):
    """Which items may come back, whoever asks.

    Attributes:
        where: Conditions on display columns.
        allow: Ids of the only items that may; None allows all.
        deny: Ids of items that may not.
    """

    where: Conditions
    allow: list[Any] | None
    deny: list[Any]


class Retriever:
    """Answers from one bundle. Threads may share it, also while items change: each answer is of one
    moment.

    All lists take the same filters: `exclude_seen` leaves out the user's items, as far as the user
    is known; `deny` leaves out items by id; `allow` names the only items that may come back;
    `where` asks for items whose display columns satisfy conditions: {"category": "shoes", "brand":
    ["a", "b"]}, or [("price", "<=", 20), ...] with the operators of `config.data.where`. A list has
    K items whenever K exist. `popularity_weight` times the log of an item's training rows is added
    to its score, where the bundle was exported with `config.retrieval.popularity`.
    """

    def __init__(self, bundle: Bundle):
        self._lock = threading.RLock()
        self._maintenance = threading.Lock()
        self._live = LiveBundle(bundle, self._lock)
        self.user_rows = UserRows(bundle.encoder, bundle.users)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Retriever:
        """Returns the retriever of a bundle, with the changes that were made to it.

        Args:
            folder: Folder of the bundle. `twotower.api.load_retriever` also takes a run, or one of
                its checkpoints.

        Raises:
            BundleError: The bundle is not whole.
            ChangesError: The log of its changes is damaged.
        """
        return cls(load_bundle(folder))

    @property
    def bundle(self) -> Bundle:
        """The bundle that was loaded, without the changes since."""
        return self._live.bundle

    @property
    def changes(self) -> int:
        """Number of changes since the bundle was written."""
        return self._live.catalogue.snapshot.version

    def __len__(self) -> int:
        """Returns the number of items now."""
        return len(self._live.catalogue.snapshot)

    def knows(self, user: Any) -> bool:
        """Whether the user was there when the bundle was made."""
        return str(user) in self.user_rows.row_by_id

    def recommend(
        self,
        user: Any = None,
        *,
        rows: Rows | None = None,
        k: int = 10,
        exclude_seen: bool = True,
        where: ConditionsLike = None,
        allow: Iterable[Any] | None = None,
        deny: Iterable[Any] = (),
        popularity_weight: float = 0.0,
    ) -> Recommendations:
        """Returns the best `k` items of one user; fewer only where fewer exist.

        Args:
            user: Id of the user. One that is not known is encoded by its out-of-vocabulary rows;
                `known` in the answer is False.
            rows: One row of raw user features instead, or beside an id whose stored features it
                replaces.
            k: Length of the list.
            exclude_seen: Whether to leave out the items of the user, as far as the user is known,
                and those of a history in `rows`.
            where: Conditions; see the class.
            allow: Ids of the only items that may come back.
            deny: Ids of items to leave out.
            popularity_weight: Factor of an item's log training rows in its score.
        """
        check_k(k)
        filters = _Filters(as_conditions(where), _listed(allow), list(deny))
        if rows is not None:
            row = _one_user(rows, user)
            vectors = self.encode_users(row)
            ids = row["user_id"].to_pylist() if "user_id" in row.column_names else [None]
            user_rows = self._rows_of_users(ids)
            if exclude_seen:
                filters.deny.extend(self.user_rows.history_items(row))
        elif user is not None:
            vectors, user_rows = self._vectors_and_rows([str(user)])
        else:
            raise ValueError("recommend needs user=ID or rows=[{...}].")
        snapshot, scores, positions = self._search(
            vectors, user_rows, k, filters, exclude_seen, popularity_weight
        )
        items = _recommendations(snapshot, scores[0], positions[0])
        return Recommendations(items, known=bool(user_rows[0] >= 0))

    def recommend_many(
        self,
        user_ids: Sequence[Any],
        k: int = 10,
        *,
        exclude_seen: bool = True,
        where: ConditionsLike = None,
        allow: Iterable[Any] | None = None,
        deny: Iterable[Any] = (),
        popularity_weight: float = 0.0,
    ) -> pa.Table:
        """Returns the lists of many users in one table.

        Args:
            user_ids: Ids of the users.
            k: Length of the lists.
            exclude_seen: Whether to leave out the items of each user.
            where: Conditions; see the class.
            allow: Ids of the only items that may come back.
            deny: Ids of items to leave out.
            popularity_weight: Factor of an item's log training rows in its score.

        Returns:
            Columns user_id, rank (from 1), item_id and score; up to k rows a user, in the order of
            the users.
        """
        check_k(k)
        filters = _Filters(as_conditions(where), _listed(allow), list(deny))
        ids = [str(user) for user in user_ids]
        starts = range(0, max(len(ids), 1), USERS_AT_ONCE)
        parts = []
        for start in progress(starts, total=len(starts), what="Recommending"):
            block = ids[start : start + USERS_AT_ONCE]
            vectors, user_rows = self._vectors_and_rows(block)
            snapshot, scores, positions = self._search(
                vectors, user_rows, k, filters, exclude_seen, popularity_weight
            )
            query, rank = np.nonzero(positions >= 0)
            columns = {
                "user_id": pa.array(block, pa.string()).take(pa.array(query)),
                "rank": pa.array(rank + 1, pa.int32()),
                "item_id": snapshot.item_ids(positions[query, rank]),
                "score": pa.array(scores[query, rank], pa.float32()),
            }
            parts.append(pa.table(columns))
        return pa.concat_tables(parts)

    def similar_items(
        self,
        item: Any,
        k: int = 10,
        *,
        where: ConditionsLike = None,
        allow: Iterable[Any] | None = None,
        deny: Iterable[Any] = (),
    ) -> Recommendations:
        """Returns the `k` items of greatest cosine to an item, without itself.

        Args:
            item: Id of the item.
            k: Length of the list.
            where: Conditions; see the class.
            allow: Ids of the only items that may come back.
            deny: Ids of items to leave out.

        Raises:
            UnknownItemError: The item is not there.
        """
        check_k(k)
        catalogue = self._live.catalogue
        snapshot = catalogue.snapshot
        vector = snapshot.vector(catalogue.position(snapshot, item))
        query = vector / max(float(np.linalg.norm(vector)), 1e-30)
        scores, positions = snapshot.search(
            query[None, :],
            k,
            exclude=_same_list(catalogue.numbers_of([item, *deny]), 1),
            where=as_conditions(where),
            only=None if allow is None else catalogue.numbers_of(allow),
            cosine=True,
        )
        return Recommendations(_recommendations(snapshot, scores[0], positions[0]))

    def latest_items(self, user: Any, k: int = 10) -> list[Recommendation]:
        """Returns the last `k` items of a user, the latest first; none of an unknown user."""
        live = self._live  # one of them, whatever takes its place meanwhile
        snapshot = live.catalogue.snapshot
        row = self.user_rows.row_by_id.get(str(user))
        if row is None:
            return []
        positions = [snapshot.position_of(int(number)) for number in live.bundle.seen[row][::-1]]
        there = [position for position in positions if position >= 0][:k]
        return _recommendations(snapshot, np.full(len(there), np.nan), np.array(there, np.int64))

    def item(self, item: Any) -> Recommendation:
        """Returns an item with its display columns, and no score.

        Raises:
            UnknownItemError: The item is not there.
        """
        catalogue = self._live.catalogue
        snapshot = catalogue.snapshot
        position = np.array([catalogue.position(snapshot, item)])
        return _recommendations(snapshot, np.array([np.nan]), position)[0]

    def encode_users(self, rows: Rows) -> np.ndarray:
        """Returns the vectors of raw user features, float32 [B, D].

        Args:
            rows: An Arrow table, or a list of mappings. What a row lacks is missing; a timestamp
                is the newest of the log; a user_id that was never seen gets its out-of-vocabulary
                row.
        """
        table = as_table(rows)
        towers = self.bundle.towers
        if not len(table):
            return np.zeros((0, towers.dim), np.float32)
        return towers.embed("user", self.user_rows.encode(table))

    def embed_users(self, user_ids: Iterable[Any]) -> np.ndarray:
        """Returns the vectors that recommendations for these users are made with, float32 [B, D],
        whether they are known or not."""
        vectors, _ = self._vectors_and_rows([str(user) for user in user_ids])
        return vectors

    def encode_items(self, rows: Rows) -> np.ndarray:
        """Returns the vectors of raw item features, float32 [N, D]: of new items, from what they
        are described by.

        Args:
            rows: An Arrow table, or a list of mappings. What a row lacks is missing.
        """
        table = as_table(rows)
        towers = self.bundle.towers
        if not len(table):
            return np.zeros((0, towers.dim), np.float32)
        return towers.embed("item", self.bundle.encoder.encode("item", table))

    def item_vectors(self, item_ids: Iterable[Any]) -> np.ndarray:
        """Returns the vectors of items that are there, float32 [N, D].

        Raises:
            UnknownItemError: An item is not there.
        """
        catalogue = self._live.catalogue
        snapshot = catalogue.snapshot
        vectors = [snapshot.vector(catalogue.position(snapshot, item)) for item in item_ids]
        return np.stack(vectors) if vectors else np.zeros((0, self.bundle.towers.dim), np.float32)

    def upsert(self, rows: Rows, *, vectors: np.ndarray | None = None) -> int:
        """Adds items, or replaces those with the same ids: durable when this returns, and found by
        every later search.

        Args:
            rows: item_id, the columns of item features and display columns; what is left out is
                missing.
            vectors: Vectors in the place of those of the item tower, float [N, D].

        Returns:
            The number of items now.

        Raises:
            ChangesError: The bundle is in memory alone, or was replaced by another version.
            OSError: The disk refuses; nothing was changed.
            QueryError, ValueError: The rows or vectors are not usable; nothing was changed.
        """
        table = as_table(rows)
        vectors = self.encode_items(table) if vectors is None else np.asarray(vectors)
        with self._lock:
            self._live.upsert(table, vectors)
            return len(self)

    def delete(self, item_ids: Iterable[Any]) -> int:
        """Takes items away, durable when this returns, and returns how many of them there were.

        Raises:
            ChangesError, OSError: As `upsert`.
        """
        ids = [str(item) for item in item_ids]
        with self._lock:
            return self._live.delete(ids)

    def rebalance(self) -> None:
        """Indexes the items as they are now, in memory: changes no longer slow the search down.

        Answers and changes go on.

        Raises:
            ChangesError: Another rebalance or compaction is under way.
        """
        with self._exclusive_maintenance():
            self._live.rebalance()

    def compact(self) -> None:
        """Writes a new version of the bundle with all changes in it, makes it the current one, and
        goes on with that.

        Raises:
            ChangesError, OSError: As `upsert`, or another rebalance or compaction is under way.
        """
        with self._exclusive_maintenance():
            compacted = self._live.compacted()
            with self._lock:
                self._live = self._live.switched_to(compacted)

    @contextlib.contextmanager
    def _exclusive_maintenance(self) -> Iterator[None]:
        """Long work on the index, of which there is one at a time."""
        if not self._maintenance.acquire(blocking=False):
            raise ChangesError("Another rebalance or compaction is under way.")
        try:
            yield
        finally:
            self._maintenance.release()

    def _search(
        self,
        vectors: np.ndarray,
        user_rows: np.ndarray,
        k: int,
        filters: _Filters,
        exclude_seen: bool,
        popularity_weight: float,
    ) -> tuple[Snapshot, np.ndarray, np.ndarray]:
        """Returns the snapshot that was searched, the scores [B, k] and the positions [B, k].

        Args:
            vectors: User vectors, float32 [B, D].
            user_rows: Row of each user in the users table, int64 [B]; -1 of unknown ones.
            k: Length of the lists.
            filters: Which items may come back.
            exclude_seen: Whether to leave out the items of each user.
            popularity_weight: See `recommend`.
        """
        live = self._live  # one of them, whatever takes its place meanwhile
        catalogue = live.catalogue
        exclude = Ragged.empty(len(vectors))
        if exclude_seen:
            exclude = live.bundle.seen.take(user_rows)
        denied = catalogue.numbers_of(filters.deny)
        if len(denied):
            exclude = exclude.join(_same_list(denied, len(vectors)))
        only = None if filters.allow is None else catalogue.numbers_of(filters.allow)
        snapshot = catalogue.snapshot
        scores, positions = snapshot.search(
            vectors,
            k,
            exclude=exclude,
            where=filters.where,
            only=only,
            popularity_weight=popularity_weight,
        )
        return snapshot, scores, positions

    def _vectors_and_rows(self, ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the vectors of users, stored ones where they are known, and their rows in the
        users table."""
        rows = self._rows_of_users(ids)
        stored = self.bundle.user_vectors
        unknown = np.flatnonzero(rows < 0)
        if len(stored):
            vectors = np.asarray(stored[rows])
        else:
            vectors = np.zeros((len(ids), self.bundle.towers.dim), np.float32)
        if unknown.size:
            vectors = np.array(vectors)
            unknown_ids = [ids[position] for position in unknown.tolist()]
            vectors[unknown] = self.encode_users(self.user_rows.take(unknown_ids))
        return vectors, rows

    def _rows_of_users(self, ids: Sequence[Any]) -> np.ndarray:
        """Returns the row of each user in the users table, int64 [B]; -1 of unknown ones."""
        row_by_id = self.user_rows.row_by_id
        rows = [-1 if user is None else row_by_id.get(str(user), -1) for user in ids]
        return np.array(rows, np.int64)


def _one_user(rows: Rows, user: Any) -> pa.Table:
    """Returns the one row of raw user features that `recommend` takes, under the id where one is
    given."""
    if user is not None:
        rows = [{**row, "user_id": str(user)} for row in as_table(rows).to_pylist()]
    table = as_table(rows)
    if len(table) != 1:
        raise ValueError(
            f"recommend answers one user; rows holds {len(table)}. See recommend_many."
        )
    return table


def _listed(ids: Iterable[Any] | None) -> list[Any] | None:
    return None if ids is None else list(ids)


def _same_list(numbers: np.ndarray, count: int) -> Ragged:
    """Returns the same list for each of `count` queries."""
    offsets = np.arange(count + 1, dtype=np.int64) * len(numbers)
    return Ragged(offsets, np.tile(numbers, count).astype(np.int32))


def _recommendations(
    snapshot: Snapshot, scores: np.ndarray, positions: np.ndarray
) -> list[Recommendation]:
    """Returns the items of one list, without the entries that no item fills."""
    filled = positions >= 0
    rows = snapshot.rows(positions[filled])
    return [
        Recommendation(row.pop("item_id"), float(score), row)
        for row, score in zip(rows, scores[filled])
    ]

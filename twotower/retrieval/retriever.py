"""Recommendations from a bundle, and changes to its items while it answers."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from twotower.core.errors import ChangesError, UnknownItemError
from twotower.core.progress import progress
from twotower.core.ragged import Ragged
from twotower.index.base import check_k
from twotower.retrieval.bundle import Bundle, load_bundle
from twotower.retrieval.live.catalogue import nearest
from twotower.retrieval.live.conditions import Where, conditions
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
USERS_AT_ONCE = BATCH  # whose candidates are in memory together

Rows = pa.Table | Sequence[Mapping]
Conditions = Mapping[str, Any] | Sequence[Sequence[Any]] | None


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """One item of a list.

    Attributes:
        score: dot product of the vectors.
        display: the item's display columns.
    """

    item_id: str
    score: float
    display: Mapping[str, Any]


class Recommendations(list[Recommendation]):
    """A list, best first, and whether the user was known when the bundle was made."""

    def __init__(self, items: Sequence[Recommendation] = (), *, known: bool = True):
        super().__init__(items)
        self.known = known


class Retriever:
    """Answers from one bundle. Threads may share it, also while items change: each answer is of one
    moment.

    What may be asked of any list: `exclude_seen` leaves out the user's items, as far as the user is
    known; `deny` leaves out items by id; `allow` names the only items that may come back; `where`
    asks for items whose display columns satisfy
    conditions: {"category": "shoes", "brand": ["a", "b"]}, or [("price", "<=", 20), ...] with the
    operators of `config.data.where`. A list has K items whenever K exist. `popularity_weight` times
    the log of an item's training rows is added to its score, where the bundle was exported with
    `config.retrieval.popularity`.
    """

    def __init__(self, bundle: Bundle):
        self._lock, self._maintenance = threading.RLock(), threading.Lock()
        self._live = LiveBundle(bundle, self._lock)
        self.user_rows = UserRows(bundle.encoder, bundle.users)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Retriever:
        """Returns the retriever of a bundle, with the changes that were made to it.

        Args:
            folder: folder of the bundle. `twotower.retrieval.export.load_retriever` also takes a
                run, or one of its checkpoints.

        Raises:
            BundleError: The bundle is not whole.
            ChangesError: The log of its changes is damaged.
        """
        return cls(load_bundle(folder))

    @property
    def bundle(self) -> Bundle:
        """What was loaded: without the changes since."""
        return self._live.bundle

    def __len__(self) -> int:
        """How many items there are now."""
        return len(self._live.catalogue.snapshot)

    @property
    def changes(self) -> int:
        """How many changes there were since the bundle was written."""
        return self._live.catalogue.snapshot.version

    def recommend(
        self,
        user: Any = None,
        *,
        rows: Rows | None = None,
        k: int = 10,
        exclude_seen: bool = True,
        where: Conditions = None,
        allow: Iterable[Any] | None = None,
        deny: Iterable[Any] = (),
        popularity_weight: float = 0.0,
    ) -> Recommendations:
        """The best `k` items of one user; fewer only where fewer exist.

        Args:
            user: an id. One that is not known is encoded by its out-of-vocabulary rows; `known` in
                the answer is False.
            rows: one row of raw user features instead, or beside an id whose stored features it
                replaces.
            k: length of the list.
            exclude_seen: leave out the items of the user, as far as the user is known, and those of
                a history in `rows`.
            where, allow, deny, popularity_weight: see the class.
        """
        check_k(k)
        if user is None and rows is None:
            raise ValueError("recommend needs user=ID or rows=[{...}].")
        if rows is None:
            vectors, row = self._vectors_of([str(user)])
        else:
            given = [dict(row) for row in as_table(rows).to_pylist()]
            table = as_table(
                given if user is None else [{**row, "user_id": str(user)} for row in given]
            )
            if len(table) != 1:
                raise ValueError(
                    f"recommend answers one user; rows holds {len(table)}. See recommend_many."
                )
            name = table["user_id"][0].as_py() if "user_id" in table.column_names else None
            vectors, row = (
                self.encode_users(table),
                self._places(() if name is None else (str(name),), 1),
            )
            deny = [*deny, *self.user_rows.history_items(table)] if exclude_seen else deny
        users = row if exclude_seen else None
        snapshot, scores, places = self._search(
            vectors, users, k, conditions(where), allow, deny, popularity_weight
        )
        return Recommendations(_listed(snapshot, scores[0], places[0]), known=bool(row[0] >= 0))

    def recommend_many(
        self,
        user_ids: Sequence[Any],
        k: int = 10,
        *,
        exclude_seen: bool = True,
        where: Conditions = None,
        allow: Iterable[Any] | None = None,
        deny: Iterable[Any] = (),
        popularity_weight: float = 0.0,
    ) -> pa.Table:
        """Lists of many users: user_id, rank (from 1), item_id, score; k rows a user, in the order
        given."""
        check_k(k)
        ids = [str(user) for user in user_ids]
        starts = range(0, max(len(ids), 1), USERS_AT_ONCE)
        parts = progress(starts, total=len(starts), what="Recommending")
        options = (
            k,
            conditions(where),
            None if allow is None else list(allow),
            list(deny),
            popularity_weight,
        )
        return pa.concat_tables(
            [
                self._lists(ids[start : start + USERS_AT_ONCE], exclude_seen, *options)
                for start in parts
            ]
        )

    def similar_items(
        self,
        item: Any,
        k: int = 10,
        *,
        where: Conditions = None,
        allow: Iterable[Any] | None = None,
        deny: Iterable[Any] = (),
    ) -> Recommendations:
        """The `k` items of greatest cosine to `item`, without itself.

        Raises:
            UnknownItemError: the item is not in the catalogue.
        """
        check_k(k)
        catalogue = self._live.catalogue
        snapshot, only = catalogue.snapshot, None if allow is None else catalogue.numbers_of(allow)
        query = snapshot.vector(catalogue.place(snapshot, item))[None, :]
        query = query / max(float(np.linalg.norm(query)), 1e-30)
        exclude = _lists_of(catalogue.numbers_of([item, *deny]), 1)
        scores, places = snapshot.search(
            query, k, exclude=exclude, where=conditions(where), only=only, cosine=True
        )
        return Recommendations(_listed(snapshot, scores[0], places[0]))

    def encode_users(self, rows: Rows) -> np.ndarray:
        """float32 [Q, D], the vectors of raw user features: an Arrow table, or a list of mappings.
        What a row lacks is missing, a timestamp is the newest of the log, a user_id that was never
        seen gets its out-of-vocabulary row."""
        table, towers = as_table(rows), self.bundle.towers
        return (
            towers.embed("user", self.user_rows.encode(table))
            if len(table)
            else np.zeros((0, towers.dim), np.float32)
        )

    def embed_users(self, user_ids: Iterable[Any]) -> np.ndarray:
        """float32 [Q, D], the vectors that recommendations for these users are made with, whether
        they are known or not."""
        return self._vectors_of([str(user) for user in user_ids])[0]

    def encode_items(self, rows: Rows) -> np.ndarray:
        """float32 [N, D], the vectors of raw item features, likewise: of new items, from what they
        are described by."""
        table, towers = as_table(rows), self.bundle.towers
        encoded = self.bundle.encoder.encode("item", table) if len(table) else {}
        return (
            towers.embed("item", encoded) if len(table) else np.zeros((0, towers.dim), np.float32)
        )

    def item_vectors(self, item_ids: Iterable[Any]) -> np.ndarray:
        """float32 [N, D], of items of the corpus; raises `UnknownItemError`."""
        catalogue = self._live.catalogue
        snapshot = catalogue.snapshot
        vectors = [snapshot.vector(catalogue.place(snapshot, item)) for item in item_ids]
        return np.stack(vectors) if vectors else np.zeros((0, self.bundle.towers.dim), np.float32)

    def upsert(self, rows: Rows, *, vectors: np.ndarray | None = None) -> int:
        """Adds items, or replaces those with the same ids: durable when this returns, and found by
        every later search.

        Args:
            rows: item_id, the columns of item features and display columns; what is left out is
                missing.
            vectors: float [N, D] in the place of those of the item tower.

        Returns:
            How many items there are now.

        Raises:
            ChangesError: the bundle is in memory alone, or another process changes it.
            QueryError, ValueError: the rows or vectors are not usable; nothing was changed.
        """
        table = as_table(rows)
        vectors = self.encode_items(table) if vectors is None else np.asarray(vectors)
        with self._lock:
            self._live.upsert(table, vectors)
            return len(self)

    def delete(self, item_ids: Iterable[Any]) -> int:
        """Takes items away: durable when this returns, and in no later answer. Says how many of
        them there were."""
        with self._lock:
            return self._live.delete([str(item) for item in item_ids])

    def rebalance(self) -> None:
        """Indexes the items as they are now, in memory: changes no longer slow the search down.
        Answers and changes go on."""
        with self._alone():
            self._live.rebalance()

    def compact(self) -> None:
        """Writes a new version of the bundle with all changes in it in the place of the old one,
        and goes on with that."""
        with self._alone():
            compacted = self._live.compacted()
            with self._lock:
                self._live = self._live.switched_to(compacted)

    def latest_items(self, user: Any, k: int = 10) -> list[Recommendation]:
        """The last `k` items of a user, the latest first; without scores. Nothing of an unknown
        user."""
        live, row = self._live, self.user_rows.row_by_id.get(str(user), -1)
        snapshot = live.catalogue.snapshot
        numbers = live.bundle.seen[row][::-1] if row >= 0 else np.zeros(0, np.int32)
        places = [place for number in numbers if (place := snapshot.place_of(int(number))) >= 0][:k]
        return _listed(snapshot, np.full(len(places), np.nan), np.array(places, np.int64))

    def item(self, item: Any) -> Recommendation:
        """An item of the corpus with its display columns, and no score."""
        catalogue = self._live.catalogue
        snapshot = catalogue.snapshot
        return _listed(snapshot, np.array([np.nan]), np.array([catalogue.place(snapshot, item)]))[0]

    def knows(self, user: Any) -> bool:
        return str(user) in self.user_rows.row_by_id

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Long work on the index, of which there is one at a time."""
        if not self._maintenance.acquire(blocking=False):
            raise ChangesError("Another rebalance or compaction is under way.")
        try:
            yield
        finally:
            self._maintenance.release()

    def _lists(self, ids: list[str], exclude_seen: bool, *asked: Any) -> pa.Table:
        """`recommend_many` of users that are searched for at once."""
        vectors, rows = self._vectors_of(ids)
        snapshot, scores, places = self._search(vectors, rows if exclude_seen else None, *asked)
        query, rank = np.nonzero(places >= 0)
        return pa.table(
            {
                "user_id": pa.array(ids, pa.string()).take(pa.array(query)),
                "rank": pa.array(rank + 1, pa.int32()),
                "item_id": snapshot.item_ids(places[query, rank]),
                "score": pa.array(scores[query, rank], pa.float32()),
            }
        )

    def _search(
        self,
        vectors: np.ndarray,
        users: np.ndarray | None,
        k: int,
        where: Where,
        allow: Any,
        deny: Any,
        weight: float,
    ) -> tuple[Snapshot, np.ndarray, np.ndarray]:
        live = self._live  # one of them, whatever takes its place meanwhile
        exclude = Ragged.empty(len(vectors)) if users is None else live.bundle.seen.take(users)
        if len(denied := live.catalogue.numbers_of(deny)):
            exclude = exclude.join(_lists_of(denied, len(vectors)))
        only = None if allow is None else live.catalogue.numbers_of(allow)
        snapshot = live.catalogue.snapshot
        return snapshot, *snapshot.search(
            vectors, k, exclude=exclude, where=where, only=only, popularity_weight=weight
        )

    def _vectors_of(self, ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Vectors, and rows of the users table (-1 of unknown users): of known users those
        stored."""
        rows = self._places(ids, len(ids))
        stored, new = self.bundle.user_vectors, np.flatnonzero(rows < 0)
        vectors = (
            np.asarray(stored[rows])
            if len(stored)
            else np.zeros((len(ids), self.bundle.towers.dim), np.float32)
        )
        if new.size:
            vectors = np.array(vectors)
            vectors[new] = self.encode_users(self.user_rows.take([ids[n] for n in new]))
        return vectors, rows

    def _places(self, ids: Sequence[str], count: int) -> np.ndarray:
        return np.array(
            [self.user_rows.row_by_id.get(user, -1) for user in ids] or [-1] * count, np.int64
        )


def _lists_of(numbers: np.ndarray, count: int) -> Ragged:
    """The same list for each of `count` queries."""
    return Ragged(
        np.arange(count + 1, dtype=np.int64) * len(numbers),
        np.tile(numbers, count).astype(np.int32),
    )


def _listed(snapshot: Snapshot, scores: np.ndarray, places: np.ndarray) -> list[Recommendation]:
    found = places >= 0
    rows = snapshot.rows(places[found])
    return [
        Recommendation(row.pop("item_id"), float(score), row)
        for row, score in zip(rows, scores[found])
    ]

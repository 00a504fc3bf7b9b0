"""Recommendations from a bundle."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twotower.data.numeric import as_seconds
from twotower.retrieval.bundle import Bundle, load_bundle
from twotower.retrieval.csr import Csr
from twotower.retrieval.embed import BATCH, embed_rows
from twotower.retrieval.exact import ExactIndex, check_k
from twotower.training.progress import progress

# Candidates fetched beyond k to replace seen items; users that have seen more of the best are answered by exact search.
OVERFETCH = 256
USERS_AT_ONCE = BATCH  # whose candidates are in memory together
NEAREST_AMONG = 20_000  # ids compared with a misspelt one


class UnknownItemError(ValueError):
    """An item id that is not in the corpus; the message names the nearest ones."""


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
    """Answers from one bundle; nothing in it changes, so that threads may share it."""

    def __init__(self, bundle: Bundle):
        self.bundle = bundle
        self._user_rows = {user: row for row, user in enumerate(bundle.users["user_id"].to_pylist())}
        self._item_rows = {item: row for row, item in enumerate(bundle.items["item_id"].to_pylist())}
        self._item_ids = bundle.items["item_id"].combine_chunks()

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Retriever:
        """The retriever of the bundle in `folder`; raises `BundleError` where that is not whole."""
        return cls(load_bundle(folder))

    def recommend(
        self,
        user: Any = None,
        *,
        rows: pa.Table | Sequence[Mapping] | None = None,
        k: int = 10,
        exclude_seen: bool = True,
    ) -> Recommendations:
        """The best `k` items of one user; fewer only where fewer exist.

        Args:
            user: an id. One that is not known is encoded by its out-of-vocabulary rows; `known` in the answer is False.
            rows: one row of raw user features instead, or beside an id whose stored features it replaces.
            k: length of the list.
            exclude_seen: leave out the items of the user, as far as the user is known, and those of a history in `rows`.
        """
        check_k(k)
        if user is None and rows is None:
            raise ValueError("recommend needs user=ID or rows=[{...}].")
        if rows is None:
            table = self._rows_of([str(user)])
        else:
            given = [dict(row) for row in as_table(rows).to_pylist()]
            table = as_table(given if user is None else [{**row, "user_id": str(user)} for row in given])
        if len(table) != 1:
            raise ValueError(f"recommend answers one user; rows holds {len(table)}. See recommend_many.")
        name = table["user_id"][0].as_py() if "user_id" in table.column_names else None
        row = -1 if name is None else self._user_rows.get(str(name), -1)
        seen = Csr.from_pairs(*np.broadcast_arrays(0, self._seen_by(table, row)), num_rows=1) if exclude_seen else None
        scores, found = self._search(self.encode_users(table), k, seen)
        return Recommendations(self._display(scores[0], found[0]), known=row >= 0)

    def recommend_many(self, user_ids: Sequence[Any], k: int = 10, *, exclude_seen: bool = True) -> pa.Table:
        """Lists of many users: user_id, rank (from 1), item_id, score; k rows a user, in the order given."""
        check_k(k)
        ids = [str(user) for user in user_ids]
        starts = range(0, max(len(ids), 1), USERS_AT_ONCE)
        parts = progress(starts, total=len(starts), what="Recommending") if len(starts) > 1 else starts
        return pa.concat_tables(
            [self._lists(ids[start : start + USERS_AT_ONCE], k, exclude_seen=exclude_seen) for start in parts]
        )

    def similar_items(self, item: Any, k: int = 10) -> Recommendations:
        """The `k` items of greatest cosine to `item`, without itself.

        Raises:
            UnknownItemError: the item is not in the corpus.
        """
        check_k(k)
        row = self.item_row(item)
        query, index = self._unit_vectors
        itself = Csr.from_pairs(np.zeros(1), np.array([row]), num_rows=1)
        scores, rows = search_without(index, query[row : row + 1], k, itself, exact=lambda: self._exact_units)
        return Recommendations(self._display(scores[0], rows[0]))

    def encode_users(self, rows: pa.Table | Sequence[Mapping]) -> np.ndarray:
        """float32 [Q, D], the vectors of raw user features: an Arrow table, or a list of mappings. What a row lacks is
        missing, a timestamp is the newest of the log, a user_id that was never seen gets its out-of-vocabulary row."""
        bundle, table = self.bundle, self._timed(as_table(rows))
        if not len(table):
            return np.zeros((0, bundle.model.dim), np.float32)
        return embed_rows(bundle.model, bundle.weights, "user", bundle.encoder.encode("user", table))

    def embed_users(self, user_ids: Sequence[Any]) -> np.ndarray:
        """float32 [Q, D], the vectors that recommendations for these users are made with, whether they are known or not."""
        return self.encode_users(self._rows_of([str(user) for user in user_ids]))

    def item_row(self, item: Any) -> int:
        """The row of an item in the corpus; raises `UnknownItemError` with the nearest ids."""
        if str(item) not in self._item_rows:
            near = nearest(str(item), self._item_rows)
            hint = f" The nearest ids are: {', '.join(near)}." if near else ""
            raise UnknownItemError(
                f"item {str(item)!r} is not among the {len(self._item_rows)} items of the corpus.{hint}"
            )
        return self._item_rows[str(item)]

    def latest_items(self, user: Any, k: int = 10) -> list[Recommendation]:
        """The last `k` items of a user, the latest first; without scores. Nothing of an unknown user."""
        row = self._user_rows.get(str(user), -1)
        items = self.bundle.seen[row][::-1][:k] if row >= 0 else np.zeros(0, np.int32)
        return self._display(np.full(len(items), np.nan), items)

    def item(self, item: Any) -> Recommendation:
        """An item of the corpus with its display columns, and no score."""
        return self._display(np.array([np.nan]), np.array([self.item_row(item)]))[0]

    def knows(self, user: Any) -> bool:
        return str(user) in self._user_rows

    def _seen_by(self, table: pa.Table, row: int) -> np.ndarray:
        """int32, the items of a user (-1: not known) and of the history in its one row of raw features."""
        seen, history = self.bundle.seen.take(np.array([row])).values, self.bundle.encoder.spec.history
        events = table[history.column][0].as_py() if history and history.column in table.column_names else None
        ids = [event["item_id"] if isinstance(event, dict) else event for event in events or ()]
        brought = [self._item_rows[str(item)] for item in ids if str(item) in self._item_rows]
        return np.concatenate([seen, np.array(brought, np.int32)])

    def _rows_of(self, ids: Sequence[str]) -> pa.Table:
        """Stored raw features of known users, and of unknown ones the id."""
        users = self.bundle.users
        rows = pa.array([self._user_rows.get(user) for user in ids], pa.int64())
        columns = {name: users[name].take(rows) for name in users.column_names}
        columns["user_id"] = pa.array(ids, pa.string())
        if self._newest is not None:
            del columns["timestamp"]  # the user is asked about now, not when it was last seen
        return pa.table(columns)

    def _timed(self, table: pa.Table) -> pa.Table:
        """With the newest time of the log where a row lacks its time: nothing trained would answer without one."""
        if self._newest is None or not len(table):
            return table
        if "timestamp" not in table.column_names:
            return table.append_column("timestamp", pa.repeat(self._newest, len(table)))
        seconds, missing = as_seconds(table["timestamp"], "rows, column 'timestamp'")
        times = pa.array(np.where(missing, self._newest, seconds))
        return table.set_column(table.column_names.index("timestamp"), "timestamp", times)

    @functools.cached_property
    def _newest(self) -> int | None:
        """The newest time of the log in seconds, where a context feature reads the time of the query."""
        encoder = self.bundle.encoder
        if all(encoder.spec.user[name].column != "timestamp" for name in encoder.context):
            return None
        return pc.max(self.bundle.users["timestamp"]).as_py()

    def _lists(self, ids: list[str], k: int, *, exclude_seen: bool) -> pa.Table:
        """`recommend_many` of users that are searched for at once."""
        rows = np.array([self._user_rows.get(user, -1) for user in ids], np.int64)
        seen = self.bundle.seen.take(rows) if exclude_seen else None
        scores, found = self._search(self.encode_users(self._rows_of(ids)), k, seen)
        query, place = np.nonzero(found >= 0)
        return pa.table(
            {
                "user_id": pa.array(ids, pa.string()).take(pa.array(query)),
                "rank": pa.array(place + 1, pa.int32()),
                "item_id": self._item_ids.take(pa.array(found[query, place])),
                "score": pa.array(scores[query, place], pa.float32()),
            }
        )

    def _search(self, vectors: np.ndarray, k: int, exclude: Csr | None) -> tuple[np.ndarray, np.ndarray]:
        exclude = Csr.empty(len(vectors)) if exclude is None else exclude
        return search_without(self.bundle.index, vectors, k, exclude, exact=lambda: self._exact)

    def _display(self, scores: np.ndarray, rows: np.ndarray) -> list[Recommendation]:
        kept = rows >= 0
        table = self.bundle.items.take(pa.array(rows[kept])).to_pylist()
        return [Recommendation(row.pop("item_id"), float(score), row) for row, score in zip(table, scores[kept])]

    @functools.cached_property
    def _exact(self) -> ExactIndex:
        index = self.bundle.index
        return index if isinstance(index, ExactIndex) else ExactIndex(self.bundle.vectors)

    @functools.cached_property
    def _unit_vectors(self) -> tuple[np.ndarray, Any]:
        """Item vectors of length 1 (a zero one stays), and an index over them."""
        vectors = self.bundle.vectors
        if self.bundle.model.normalize:
            return vectors, self.bundle.index
        units = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
        return units, ExactIndex(units)

    @property
    def _exact_units(self) -> ExactIndex:
        return self._exact if self.bundle.model.normalize else self._unit_vectors[1]


def search_without(
    index: Any, queries: np.ndarray, k: int, exclude: Csr, *, exact: Any
) -> tuple[np.ndarray, np.ndarray]:
    """The best `k` items that are not excluded, as `ExactIndex.search` gives them.

    An approximate index is asked for more than k; where what is left is short although more items exist, exact search
    answers.

    Args:
        index: an `ExactIndex` or a `ScannIndex`.
        exclude: for each query, rows that must not come back.
        exact: () -> an `ExactIndex` over the same vectors.
    """
    if isinstance(index, ExactIndex):
        return index.search(queries, k, exclude=exclude)
    most = int(exclude.lengths.max(initial=0))
    scores, rows = index.search(queries, min(index.num_items, k + min(most, OVERFETCH)))
    keep = (rows >= 0) & ~exclude.contains(np.arange(len(rows))[:, None], rows)
    order = np.argsort(~keep, axis=1, kind="stable")[:, :k]
    kept = np.take_along_axis(keep, order, axis=1)
    scores = _padded(np.where(kept, np.take_along_axis(scores, order, axis=1), -np.inf), k, -np.inf)
    rows = _padded(np.where(kept, np.take_along_axis(rows, order, axis=1), -1), k, -1)
    exist = np.minimum(k, index.num_items - exclude.distinct().lengths)
    short = np.flatnonzero((rows >= 0).sum(1) < exist)
    if short.size:
        scores[short], rows[short] = exact().search(queries[short], k, exclude=exclude.take(short))
    return scores, rows


def as_table(rows: pa.Table | Sequence[Mapping]) -> pa.Table:
    """Raw rows as an Arrow table."""
    if isinstance(rows, pa.Table):
        return rows
    return pa.Table.from_pylist([dict(row) for row in rows], schema=_schema(rows))


def nearest(name: str, known: Mapping[str, int], count: int = 3) -> list[str]:
    """Ids that look like `name`; of many ids only those are compared that begin alike."""
    candidates = known if len(known) <= NEAREST_AMONG else [i for i in known if i[:2] == name[:2]][:NEAREST_AMONG]
    return difflib.get_close_matches(name, candidates, n=count, cutoff=0.0)


def _schema(rows: Sequence[Mapping]) -> pa.Schema | None:
    """All columns that any row has (Arrow looks at the first row alone)."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    if not names:
        return None
    return pa.schema([(name, pa.array([row.get(name) for row in rows]).type) for name in names])


def _padded(array: np.ndarray, k: int, value: float) -> np.ndarray:
    return np.pad(array, ((0, 0), (0, k - array.shape[1])), constant_values=value)

"""Recommendations from a bundle, and changes to its items while it answers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from absl import logging
from numpy.typing import ArrayLike

from twotower.config import RerankConfig
from twotower.core.arrays import Ragged
from twotower.core.arrow import int_array, members_of, pc
from twotower.core.errors import ChangesError, ConfigError, UnknownItemError, echo
from twotower.core.fields import check_fields
from twotower.core.fork import check_fork
from twotower.core.ids import read_id, read_ids
from twotower.core.progress import progress
from twotower.core.times import TimeForm
from twotower.data.operators import unit_of
from twotower.index.base import check_k, check_vectors
from twotower.index.exact import padded_exclusions
from twotower.index.search import takes_exclusions
from twotower.retrieval.bundle import Bundle, load_bundle
from twotower.retrieval.live.catalogue import LiveCatalogue
from twotower.retrieval.live.conditions import (
    Conditions,
    ConditionsLike,
    as_conditions,
    describe,
)
from twotower.retrieval.live.live_bundle import LiveBundle
from twotower.retrieval.live.snapshot import Snapshot
from twotower.retrieval.match import to_probability
from twotower.retrieval.requests import (
    OUR_NAMES,
    IdColumn,
    Naming,
    ReadColumn,
    RequestRows,
    as_display,
    as_table,
    feature_readers,
    find_forms,
    read_rows,
)
from twotower.retrieval.rerank import Candidates, Reranking, RerankLike, resolve_rerank
from twotower.retrieval.tower_programs import BATCH
from twotower.retrieval.users import UserRows

__all__ = [
    "Recommendation",
    "Recommendations",
    "Retriever",
    "UnknownItemError",
    "as_table",
]
# Users whose candidates are in memory together: one call of the tower programs.
USERS_AT_ONCE = BATCH
MAX_WEIGHT = 1e30  # of popularity, in either direction
MAX_WARMED = 1_024  # excluded items of a user up to which search is compiled beforehand
MIN_SEARCHED = 8  # users whom an approximate index is searched for at once
MAX_LISTED = 2**24  # entries of the lists that are in memory together


@dataclasses.dataclass(frozen=True, init=False)
class Recommendation:
    """One item of a list.

    >>> best = tt.load_retriever("runs/mine").recommend("user-1", k=1)[0]
    >>> best.item_id.startswith("item-"), isinstance(best.score, float), dict(best.display)
    (True, True, {})

    Attributes:
        item_id: Id of the item.
        score: Dot product of the vectors, or cosine of similar items; NaN of an item that was
            looked up.
        display: Display columns of the item.
    """

    item_id: str
    score: float
    display: Mapping[str, Any]

    def __init__(self, item_id: str, score: float, display: Mapping[str, Any]):
        # The initialiser of a frozen dataclass takes three times as long, as long as a tenth of a
        # request for ten items.
        fields = self.__dict__
        fields["item_id"] = item_id
        fields["score"] = score
        fields["display"] = display


class Recommendations(list[Recommendation]):
    """Items, best first; a list like any other, so that callers may slice and serialise it.

    Attributes:
        known: Whether the user was known when the bundle was made.
        note: Sentence on what in the request found nothing: conditions that no item satisfies, or
            a history of unknown items; "" where there is nothing to say.
    """

    def __init__(self, items: Sequence[Recommendation] = (), *, known: bool = True, note: str = ""):
        super().__init__(items)
        self.known = known
        self.note = note


class _Filters(NamedTuple):
    """Limits on the items that may come back, the same for all users of a call.

    Attributes:
        where: Conditions on display columns.
        allow: Ids of the only items that may come back; None allows all.
        deny: Ids of items to leave out.
        written: Conditions as the caller wrote them, for messages: a time is a number in `where`.
    """

    where: Conditions
    allow: list[str] | None
    deny: list[str]
    written: ConditionsLike


class EncodedUser(NamedTuple):
    """A user as `Retriever.encode_request` returns it, to be searched for any number of times.

    Attributes:
        vectors: Vector of the user, float32 [1, D].
        rows: Row in the table of users, int64 [1]; -1 of an unknown one.
        history: Ids of the items that the user has seen, as far as they were given.
    """

    vectors: np.ndarray
    rows: np.ndarray
    history: list[str]


# A user of a request: encoded features, [1, ...] each, or the vector [1, D] that is stored.
ReadUser = Mapping[str, np.ndarray] | np.ndarray


class Retriever:
    """Recommendations from one bundle, whose items may change meanwhile.

    >>> retriever = tt.Retriever.load("runs/mine/bundle")
    >>> len(retriever.recommend("user-1", k=3, deny=["item-3"]))
    3

    Threads may share it. Each answer reads one snapshot of the items, however many change while it
    is computed.

    All lists take the same filters: `exclude_seen` leaves out the user's items, as far as the user
    is known; `deny` leaves out items by id; `allow` names the only items that may come back;
    `where` asks for items whose display columns satisfy conditions: {"category": "shoes", "brand":
    ["a", "b"]}, or [("price", "<=", 20), ("genres", "contains", "Drama"), ...] with the operators
    of `config.data.where`; ("released", "latest", 100) are the newest 100 items. Columns of times
    compare with times of any form. A list has K items whenever K exist. `popularity_weight` times
    the log of an item's training rows is added to its score, where the bundle was exported with
    `config.retrieval.popularity`.

    Ids and times are read in the form of the log, whatever type they have: 3, 3.0 and "3" are one
    user where ids are numbers. Rows are mappings, frames or Arrow tables; a column that nothing
    reads is refused. `names` maps other names of columns, and of fields of events, to ours,
    {"buyer_id": "user_id"}, and `strict=False` leaves columns out that nothing reads.

    Recommendations may be re-ranked, by `config.retrieval.rerank` or by the argument `rerank`:
    "mmr:diversity=0.5", "caps:column=category,max_items=2", the same as a mapping of the fields of
    that section, or "" to leave the lists as they are. A kind that caps items may return fewer than
    K.

    Lists have all display columns of their items, or those that `columns` names: reading them takes
    as long as all else of a short list, and `columns=()` leaves ids and scores.
    """

    def __init__(self, bundle: Bundle):
        """Makes the changes in the bundle's log once more, and is ready to answer.

        Args:
            bundle: Bundle that was loaded, or that is in memory alone.

        Raises:
            ChangesError: The log of its changes is damaged.
        """
        # Held while items change, for as long as a sync of the disk takes; never while answering.
        self._lock = threading.RLock()
        # Held for seconds by work on the index, during which answers and changes go on.
        self._maintenance = threading.Lock()
        self._live = LiveBundle(bundle, self._lock)
        self.forms = find_forms(bundle)
        # Users do not change with the items, and outlive a compaction.
        self.user_rows = UserRows(bundle.encoder, bundle.users, self.forms)

    @classmethod
    def load(cls, folder: str | os.PathLike, *, load_towers: bool = True) -> Retriever:
        """Returns the retriever of a bundle, with the changes that were made to it.

        Args:
            folder: Folder of the bundle. `twotower.api.load_retriever` also takes a run, or one of
                its checkpoints.
            load_towers: Whether to load the towers now, and JAX with them, which takes longer than
                all else; known users need neither, and somebody new waits for them.

        Raises:
            BundleError: The bundle is not whole.
            ChangesError: The log of its changes is damaged.
        """
        return cls(load_bundle(folder, load_towers=load_towers))

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker loads the bundle itself: it then sees the changes that are in its log by then.
        if self.bundle.folder is None:
            raise ChangesError(
                "A retriever in memory alone cannot be pickled: export it, and load the bundle."
            )
        return Retriever.load, (str(self.bundle.folder),)

    def __repr__(self) -> str:
        users = len(self.user_rows.row_by_id)
        return f"Retriever({len(self):,} items, {users:,} known users)"

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
        """Whether the user was known when the bundle was made."""
        return self._user_id(user) in self.user_rows.row_by_id

    def recommend(
        self,
        user: Any = None,
        *,
        rows: RequestRows | None = None,
        events: Sequence[Any] | None = None,
        encoded: EncodedUser | None = None,
        k: int = 10,
        exclude_seen: bool = True,
        where: ConditionsLike = None,
        allow: Iterable[Any] | None = None,
        deny: Iterable[Any] | None = (),
        popularity_weight: float = 0.0,
        rerank: RerankLike = None,
        columns: Iterable[str] | None = None,
        names: Mapping[str, str] | None = None,
        strict: bool = True,
    ) -> Recommendations:
        """Returns the best `k` items of one user; fewer only where fewer exist.

        Args:
            user: Id of the user. An unknown one is encoded by its out-of-vocabulary rows; `known`
                in the answer is then False.
            rows: One row of raw user features, in the place of an id, or beside one whose stored
                features it replaces.
            events: Events since the bundle was made, as a history has them, the latest last. They
                follow the user's history, and count as seen. With events, be they none, what is
                stored of a known user stands beside what `rows` say.
            encoded: What `encode_request` returned for all of these, in their place.
            k: Length of the list.
            exclude_seen: Whether to leave out the items of the user, as far as the user is known,
                and those of a history in `rows`.
            where: Conditions; see the class.
            allow: Ids of the only items that may come back.
            deny: Ids of items to leave out.
            popularity_weight: Factor of an item's log training rows in its score.
            rerank: Re-ranker in the place of that of `config.retrieval.rerank`; see the class.
            columns: Display columns to return; all by default.
            names: Name in `rows` -> our name; see the class.
            strict: Whether a column that nothing reads is refused.

        Raises:
            ConfigError: An argument cannot be read; the message names it, its value and the cure.
        """
        k = check_k(k)
        filters = self._filters(where, allow, deny)
        shown = self._columns(columns)
        _check_options(exclude_seen, popularity_weight)
        note = ""
        # Events without rows too, be they none: a known user is then read by the stored row.
        if encoded is None and (rows is not None or events is not None):
            encoded = EncodedUser(
                *self._encode_request(rows, user, events, Naming.read(names, strict))
            )
        if encoded is not None:
            vectors, user_rows, history = encoded
            note = self._note_of_unknown(history)
            # The history of a request is newer than the bundle; a repeated item is no news.
            if exclude_seen:
                filters.deny.extend(history)
        elif user is not None:
            vectors, user_rows = self._vector_and_row(self._user_id(user))
        else:
            raise ConfigError("recommend needs user=ID or rows=[{...}], or events=[...].")
        snapshot, scores, positions = self._recommend(
            vectors, user_rows, k, filters, exclude_seen, popularity_weight, rerank
        )
        known = bool(user_rows[0] >= 0)
        return _as_list(snapshot, scores[0], positions[0], filters, shown, known=known, note=note)

    def recommend_each(
        self,
        asked: Sequence[Mapping[str, Any]],
        *,
        k: int = 10,
        exclude_seen: bool = True,
        where: ConditionsLike = None,
        allow: Iterable[Any] | None = None,
        deny: Iterable[Any] | None = (),
        popularity_weight: float = 0.0,
        rerank: RerankLike = None,
        columns: Iterable[str] | None = None,
    ) -> list[Recommendations]:
        """Returns the lists of several users who ask alike, as `recommend` returns each of them.

        Those whom the tower encodes are one batch of it. Where all items are compared, the search
        is one too; scores are then those of a product of matrices, which differ in the last bits.
        An approximate index is searched with the effort that is due to each list.

        Args:
            asked: For each user the arguments `user`, `rows`, `events` and `encoded` of
                `recommend`, those that there are.
            k, exclude_seen, where, allow, deny, popularity_weight, rerank, columns: As in
                `recommend`, for all of them.
        """
        k = check_k(k)
        filters = self._filters(where, allow, deny)
        shown = self._columns(columns)
        _check_options(exclude_seen, popularity_weight)
        users = self._encode_each(asked)
        lists = []
        # What a search of several does once for all takes as long as some searches of an
        # approximate index.
        is_exact = takes_exclusions(self._live.catalogue.snapshot.base.index)
        size = max(1, len(users)) if is_exact or len(users) >= MIN_SEARCHED else 1
        for first in range(0, len(users), size):
            chosen = users[first : first + size]
            snapshot, scores, positions = self._recommend(
                np.concatenate([user.vectors for user in chosen]),
                np.concatenate([user.rows for user in chosen]),
                k,
                filters,
                exclude_seen,
                popularity_weight,
                rerank,
                histories=[user.history if exclude_seen else [] for user in chosen],
                # Where all items are compared, the effort is the same for all.
                each_as_alone=not is_exact,
            )
            for place, user in enumerate(chosen):
                note = self._note_of_unknown(user.history)
                found = scores[place], positions[place]
                known = bool(user.rows[0] >= 0)
                made = _as_list(snapshot, *found, filters, shown, known=known, note=note)
                lists.append(made)
        return lists

    def recommend_many(
        self,
        user_ids: Iterable[Any],
        k: int = 10,
        *,
        exclude_seen: bool = True,
        where: ConditionsLike = None,
        allow: Iterable[Any] | None = None,
        deny: Iterable[Any] | None = (),
        popularity_weight: float = 0.0,
        rerank: RerankLike = None,
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
            rerank: As in `recommend`.

        Returns:
            Columns user_id, rank (from 1), item_id and score; up to k rows a user, in the order of
            the users.
        """
        k = check_k(k)
        filters = self._filters(where, allow, deny)
        _check_options(exclude_seen, popularity_weight)
        ids = self._user_ids(user_ids)
        # Fewer where lists are long, so that memory is bounded by the corpus alone.
        longest = min(k, max(len(self), 1))
        step = max(1, min(USERS_AT_ONCE, MAX_LISTED // longest))
        # One block at least: without users the table is empty, but has its columns.
        starts = range(0, max(len(ids), 1), step)
        parts = []
        for start in progress(starts, total=len(starts), what="Recommending"):
            block = ids[start : start + step]
            vectors, user_rows = self._vectors_and_rows(block)
            snapshot, scores, positions = self._recommend(
                vectors, user_rows, k, filters, exclude_seen, popularity_weight, rerank
            )
            # Row by row, so that users stay in order, and each user's items by rank.
            query, rank = np.nonzero(positions >= 0)
            columns = {
                "user_id": pa.array(block, pa.string()).take(pa.array(query)),
                "rank": pa.array(rank + 1, pa.int32()),
                "item_id": snapshot.item_ids(positions[query, rank]),
                "score": pa.array(scores[query, rank], pa.float32()),
            }
            parts.append(pa.table(columns))
        table = pa.concat_tables(parts)
        # The table has no place for a note, which is logged.
        if not len(table) and ids and filters.where:
            _note_of_none(self._live.catalogue.snapshot, filters)
        return table

    def score(
        self, users: Iterable[Any], items: Iterable[Any], *, probability: bool = False
    ) -> np.ndarray:
        """Returns the score of each pair of a user and an item, float32 [B].

        >>> retriever = tt.Retriever.load("runs/mine/bundle")
        >>> best = retriever.recommend("user-1", k=1)[0]
        >>> abs(float(retriever.score(["user-1"], [best.item_id])[0]) - best.score) < 1e-4
        True

        Args:
            users: B user ids; an unknown one is scored by what holds for users that are new.
            items: B item ids.
            probability: Whether to return the probability that the label of the pair is 1, which a
                model has that was trained on labels, by the loss binary_cross_entropy.

        Raises:
            ConfigError: The lists differ in length, or the model gives no probabilities.
            UnknownItemError: An item is not in the catalogue.
        """
        user_vectors = self.embed_users(users)
        item_vectors = self.item_vectors(items)
        if len(user_vectors) != len(item_vectors):
            raise ConfigError(
                f"score takes pairs: {len(user_vectors)} user ids do not go with "
                f"{len(item_vectors)} item ids."
            )
        # Pair by pair: a product of matrices would score every user with every item.
        scores = np.einsum("bd,bd->b", user_vectors, item_vectors).astype(np.float32)
        if probability:
            return to_probability(scores, self.bundle.probability)
        return scores

    def similar_items(
        self,
        item: Any,
        k: int = 10,
        *,
        where: ConditionsLike = None,
        allow: Iterable[Any] | None = None,
        deny: Iterable[Any] | None = (),
        columns: Iterable[str] | None = None,
    ) -> Recommendations:
        """Returns the `k` items of greatest cosine to an item, which is left out.

        Args:
            item: Id of the item.
            k: Length of the list.
            where: Conditions; see the class.
            allow: Ids of the only items that may come back.
            deny: Ids of items to leave out.
            columns: Display columns to return; all by default.

        Raises:
            UnknownItemError: The item is not there.
        """
        return self.items_like([item], k, where=where, allow=allow, deny=deny, columns=columns)

    def items_like(
        self,
        items: Iterable[Any],
        k: int = 10,
        *,
        unlike: Iterable[Any] = (),
        where: ConditionsLike = None,
        allow: Iterable[Any] | None = None,
        deny: Iterable[Any] | None = (),
        columns: Iterable[str] | None = None,
    ) -> Recommendations:
        """Returns the `k` items of greatest cosine to the mean direction of several items.

        >>> retriever = tt.Retriever.load("runs/mine/bundle")
        >>> len(retriever.items_like(["item-1", "item-2"], k=3, unlike=["item-3"]))
        3

        Args:
            items: Ids of items, which are left out.
            k: Length of the list.
            unlike: Ids of items whose mean direction is subtracted; they are left out too.
            where: Conditions; see the class.
            allow: Ids of the only items that may come back.
            deny: Ids of items to leave out.
            columns: Display columns to return; all by default.

        Raises:
            ConfigError: No item is given, or the directions cancel each other.
            UnknownItemError: An item is not there.
        """
        k = check_k(k)
        filters = self._filters(where, allow, deny)
        shown = self._columns(columns)
        liked = self._item_ids(items, "items")
        disliked = self._item_ids(unlike, "unlike")
        # The mean of no directions is none.
        if not liked:
            raise ConfigError("items=[] must name at least one item.")
        # One snapshot for the vectors and the search: an item may change in between.
        catalogue = self._live.catalogue
        snapshot = catalogue.snapshot
        # At length 1 on both sides the dot product is the cosine.
        direction = _mean_direction(catalogue, snapshot, liked)
        if disliked:
            direction = direction - _mean_direction(catalogue, snapshot, disliked)
        length = float(np.linalg.norm(direction))
        # Rounding alone would say which way is left.
        if disliked and length < 1e-6:
            raise ConfigError(f"unlike={echo(disliked)} cancels items={echo(liked)}: leave it out.")
        query = direction / max(length, 1e-30)
        only = None
        if filters.allow is not None:
            only = catalogue.numbers_of(filters.allow)
        scores, positions = snapshot.search(
            query[None, :],
            k,
            exclude=_same_list(catalogue.numbers_of([*liked, *disliked, *filters.deny]), 1),
            where=filters.where,
            only=only,
            cosine=True,
        )
        return _as_list(snapshot, scores[0], positions[0], filters, shown)

    def popular_items(
        self,
        k: int = 10,
        *,
        where: ConditionsLike = None,
        allow: Iterable[Any] | None = None,
        deny: Iterable[Any] | None = (),
        columns: Iterable[str] | None = None,
    ) -> Recommendations:
        """Returns the `k` items with the most training rows, whose number is their score.

        Args:
            k: Length of the list.
            where: Conditions; see the class.
            allow: Ids of the only items that may come back.
            deny: Ids of items to leave out.
            columns: Display columns to return; all by default.
        """
        return self._ordered("", k, self._filters(where, allow, deny), self._columns(columns))

    def newest_items(
        self,
        k: int = 10,
        *,
        column: str | None = None,
        where: ConditionsLike = None,
        allow: Iterable[Any] | None = None,
        deny: Iterable[Any] | None = (),
        columns: Iterable[str] | None = None,
    ) -> Recommendations:
        """Returns the `k` items of the latest time, or greatest number, which is their score.

        Args:
            k: Length of the list.
            column: Display column of times or numbers; by default the one of times.
            where: Conditions; see the class.
            allow: Ids of the only items that may come back.
            deny: Ids of items to leave out.
            columns: Display columns to return; all by default.

        Raises:
            ConfigError: The items have no such column, or not exactly one of times.
        """
        # Found now and not at loading: few bundles are asked for it.
        if column is None:
            column = self._time_column()
        filters = self._filters(where, allow, deny)
        return self._ordered(column, k, filters, self._columns(columns))

    def _ordered(
        self, column: str, k: int, filters: _Filters, shown: list[str] | None
    ) -> Recommendations:
        """Returns the first items by a display column, or by training rows where it is ""."""
        catalogue = self._live.catalogue
        only = None
        if filters.allow is not None:
            only = catalogue.numbers_of(filters.allow)
        denied = catalogue.numbers_of(filters.deny)
        snapshot = catalogue.snapshot
        # Counts are by number, which an item keeps when it is replaced.
        numbers = snapshot.memtable.numbers[: snapshot.num_slots]
        scores, positions = snapshot.first_by(
            column,
            check_k(k),
            slot_counts=catalogue.counts_of(numbers),
            exclude=denied,
            where=filters.where,
            only=only,
        )
        return _as_list(snapshot, scores, positions, filters, shown)

    def _time_column(self) -> str:
        """Returns the name of the display column of times.

        Raises:
            ConfigError: There is none, or more than one.
        """
        base = self._live.catalogue.snapshot.base.items
        columns = []
        for name, column in zip(base.column_names, base.columns):
            form = self.forms.contract.columns.get(f"item.{name}")
            # A feature reads it as a time; in older bundles its unit says so.
            is_time = isinstance(form, TimeForm) or name in self.forms.units
            if is_time or _holds_times(column):
                columns.append(name)
        if len(columns) == 1:
            return columns[0]
        problem = f"has several of times: {', '.join(columns)}"
        if not columns:
            problem = f"has none of times, but {', '.join(base.column_names)}"
        raise ConfigError(f"column=None: the bundle {problem}. Name the one to order by.")

    def encode_user(
        self,
        user: Any = None,
        *,
        rows: RequestRows | None = None,
        events: Sequence[Any] | None = None,
        names: Mapping[str, str] | None = None,
        strict: bool = True,
    ) -> np.ndarray:
        """Returns the vector by which `recommend` ranks items for a user, float32 [D].

        Args:
            user: As in `recommend`.
            rows: As in `recommend`.
            events: As in `recommend`.
            names: Name in `rows` -> our name; see the class.
            strict: Whether a column that nothing reads is refused.
        """
        if rows is None and events is None:
            if user is None:
                raise ConfigError("encode_user needs user=ID, rows=[{...}] or events=[...].")
            vectors, _ = self._vector_and_row(self._user_id(user))
        else:
            vectors, _, _ = self._encode_request(rows, user, events, Naming.read(names, strict))
        # A copy, as a view would keep the mapped file of all users.
        return np.array(vectors[0])

    def read_user(
        self,
        user: Any = None,
        *,
        rows: RequestRows | None = None,
        events: Sequence[Any] | None = None,
    ) -> pa.Table:
        """Returns the raw row by which `recommend` would encode a user, its history included.

        Args:
            user: As in `recommend`.
            rows: As in `recommend`.
            events: As in `recommend`.
        """
        if events is not None:
            return self._row_with_events(rows, user, events, Naming.read(None, True))[0]
        if rows is not None:
            return self._one_user(rows, user, Naming.read(None, True))
        return self.user_rows.take([self._user_id(user)])

    def vectors_now(self, items: Iterable[Any]) -> np.ndarray:
        """Returns the vectors of items, float32 [M, D]; zeros of those that are not there."""
        ids = self._item_ids(items, "items")
        catalogue = self._live.catalogue
        snapshot = catalogue.snapshot
        positions = catalogue.positions(snapshot, ids)
        vectors = np.zeros((len(ids), self.bundle.towers.dim), np.float32)
        present = positions >= 0
        vectors[present] = snapshot.vectors(positions[present])
        return vectors

    def meets(self, items: Iterable[Any], where: ConditionsLike) -> np.ndarray:
        """Whether each item is there and satisfies conditions, bool [M].

        Args:
            items: Ids of M items.
            where: Conditions; see the class.
        """
        return self.meets_each(items, [where])[0]

    def meets_each(self, items: Iterable[Any], wheres: Sequence[ConditionsLike]) -> np.ndarray:
        """Whether each item is there and satisfies each of W conditions, bool [W, M].

        Args:
            items: Ids of M items, which are looked up once.
            wheres: W conditions; see the class.
        """
        # Before the items are looked up, so that a mistake costs nothing.
        each = [as_conditions(where, self.forms) for where in wheres]
        ids = self._item_ids(items, "items")
        catalogue = self._live.catalogue
        snapshot = catalogue.snapshot
        positions = catalogue.positions(snapshot, ids)
        return np.stack([snapshot.matching(positions, conditions) for conditions in each])

    def candidates(self, items: Sequence[Recommendation], *, user: str | None = None) -> Candidates:
        """Returns the items of a list as re-rankers read them.

        Args:
            items: Items of a list; the vectors of those that were deleted meanwhile are zeros.
            user: Id of the user.
        """
        return Candidates(
            np.array([item.score for item in items], np.float32),
            self.vectors_now([item.item_id for item in items]),
            lambda: [{"item_id": item.item_id, **item.display} for item in items],
            user,
        )

    def encode_request(
        self,
        user: Any = None,
        *,
        rows: RequestRows | None = None,
        events: Sequence[Any] | None = None,
    ) -> EncodedUser:
        """Returns a user as `recommend` takes it, so that several lists share the work.

        Args:
            user: As in `recommend`.
            rows: As in `recommend`.
            events: As in `recommend`.
        """
        return EncodedUser(*self._encode_request(rows, user, events, Naming.read(None, True)))

    def follow(self) -> int:
        """Makes the changes that other processes have made to the bundle, and counts them.

        Every change of this process does so too; a server that only answers calls it now and then.

        Raises:
            ChangesError: The log of changes is damaged.
        """
        check_fork()
        with self._lock:
            return self._live.follow()

    def warm(self, up_to: int = 1) -> str:
        """Does what the first request of each kind would wait for, and says what it did.

        The towers are compiled for one user and for each power of two of users up to a number,
        which `recommend_many` and `encode_users` pad to, and for one item, as an upsert has it, and
        lists are searched once, and display columns are read. A server calls it before it says that
        it is ready.

        >>> tt.Retriever.load("runs/mine/bundle").warm(4)
        'Compiled the user tower for 1, 2 and 4 rows and the item tower for 1.'

        Args:
            up_to: Greatest number of unknown users that a request has.
        """
        towers = self.bundle.towers
        # Of nobody: shapes are what is compiled, whatever the values.
        rows = self.user_rows.encode_one({})
        sizes = towers.warm("user", rows, up_to=check_k(up_to, "up_to"))
        no_item = pa.table({"item_id": pa.nulls(1, pa.string())})
        towers.warm("item", self.bundle.encoder.encode("item", no_item), up_to=1)
        snapshot = self._live.catalogue.snapshot
        snapshot.base.prepare_rows()
        # Exact search is compiled for each number that excluded items are padded to.
        vector = np.eye(1, towers.dim, dtype=np.float32)
        longest = min(2 * self.bundle.seen.longest, MAX_WARMED, len(snapshot.base))
        # Others look at one query after another.
        is_exact: bool = takes_exclusions(snapshot.base.index)
        for size in sizes if is_exact else [1]:
            excluded = 0
            while True:
                # The programs differ by the number of all of them alone.
                places = np.arange(excluded)
                lists = Ragged.from_pairs(places % size, places // size, num_rows=size)
                snapshot.search(np.repeat(vector, size, axis=0), 10, exclude=lists)
                covered = padded_exclusions(excluded, size)
                if covered >= size * longest:
                    break
                excluded = padded_exclusions(covered + 1, size)
        listed = ", ".join(map(str, sizes[:-1]))
        listed = f"{listed} and {sizes[-1]} rows" if listed else "1 row"
        return f"Compiled the user tower for {listed} and the item tower for 1."

    def latest_items(self, user: Any, k: int = 10) -> list[Recommendation]:
        """Returns the last `k` items of a user, the latest first; none of an unknown user."""
        snapshot, positions, _ = self._latest(user, k)
        # Items that a user had have no score, and 0 would be one.
        return _recommendations(snapshot, np.full(len(positions), np.nan), positions)

    def latest_events(self, user: Any, k: int = 10) -> list[dict[str, Any]]:
        """Returns when and by what event a user had each of `latest_items`.

        Args:
            user: Id of the user.
            k: Greatest number of items.

        Returns:
            The timestamp (seconds since the epoch) and the event of each item, as far as the log
            had them.
        """
        _, positions, events = self._latest(user, k)
        # A log without times and kinds, or a bundle from before these were kept.
        if events is None:
            return [{} for _ in positions]
        return events.to_pylist()

    def _latest(self, user: Any, k: int) -> tuple[Snapshot, np.ndarray, pa.Table | None]:
        """Returns a snapshot, the positions in it of a user's last items, and their events."""
        k = check_k(k)
        # Read once: a compaction may replace it, and the numbers of items with it.
        live = self._live
        snapshot = live.catalogue.snapshot
        row = self.user_rows.row_by_id.get(self._user_id(user))
        if row is None:
            return snapshot, np.zeros(0, np.int64), None
        seen = live.bundle.seen
        # Lists have the latest last.
        pairs = np.arange(seen.offsets[row], seen.offsets[row + 1])[::-1]
        positions = np.array(
            [snapshot.position_of(int(number)) for number in seen.values[pairs]], np.int64
        )
        # Items that were deleted since are left out.
        present = np.flatnonzero(positions >= 0)[:k]
        events = live.bundle.seen_events
        if events is not None:
            events = events.take(int_array(pairs[present]))
        return snapshot, positions[present], events

    def item(self, item: Any) -> Recommendation:
        """Returns an item with its display columns, and no score.

        Raises:
            UnknownItemError: The item is not there.
        """
        catalogue = self._live.catalogue
        snapshot = catalogue.snapshot
        position = np.array([catalogue.position(snapshot, self._item_id(item))])
        return _recommendations(snapshot, np.array([np.nan]), position)[0]

    def items(self) -> pa.Table:
        """Returns item_id and the display columns of all items that are there now."""
        _, _, items = self._live.catalogue.snapshot.all_items()
        return items

    def encode_users(
        self, rows: RequestRows, *, names: Mapping[str, str] | None = None, strict: bool = True
    ) -> np.ndarray:
        """Returns the vectors of raw user features, float32 [B, D].

        Args:
            rows: A table, a frame, or a list of mappings. A column that a row lacks is a missing
                value; a missing timestamp is the newest of the log; a user_id that was never seen
                gets its out-of-vocabulary row.
            names: Name in `rows` -> our name; see the class.
            strict: Whether a column that nothing reads is refused.

        Raises:
            ConfigError: A column is unknown, or a value is not what its column holds.
        """
        return self._encode_users(self.user_rows.read(rows, Naming.read(names, strict)))

    def _encode_users(self, table: pa.Table) -> np.ndarray:
        """Returns the vectors of user features in the form of the bundle's own, float32 [B, D]."""
        towers = self.bundle.towers
        if not len(table):
            return np.zeros((0, towers.dim), np.float32)
        return towers.embed("user", self.user_rows.encode(table))

    def embed_users(self, user_ids: Iterable[Any]) -> np.ndarray:
        """Returns the vectors that rank items for users, known or not, float32 [B, D]."""
        vectors, _ = self._vectors_and_rows(self._user_ids(user_ids))
        return vectors

    def encode_items(
        self, rows: RequestRows, *, names: Mapping[str, str] | None = None, strict: bool = True
    ) -> np.ndarray:
        """Returns the vectors of raw item features, float32 [N, D], such as those of new items.

        Args:
            rows: A table, a frame, or a list of mappings. A column that a row lacks is a missing
                value.
            names: Name in `rows` -> our name; see the class.
            strict: Whether a column that nothing reads is refused.

        Raises:
            ConfigError: A column is unknown, or a value is not what its column holds.
        """
        return self._encode_items(self._read_items(rows, Naming.read(names, strict)))

    def _encode_items(self, table: pa.Table) -> np.ndarray:
        towers = self.bundle.towers
        if not len(table):
            return np.zeros((0, towers.dim), np.float32)
        return towers.embed("item", self.bundle.encoder.encode("item", table))

    def item_vectors(self, item_ids: Iterable[Any]) -> np.ndarray:
        """Returns the vectors of items in the catalogue, float32 [N, D].

        Raises:
            UnknownItemError: An item is not in the catalogue.
        """
        catalogue = self._live.catalogue
        snapshot = catalogue.snapshot
        ids = self._item_ids(item_ids, "item_ids")
        vectors = [snapshot.vector(catalogue.position(snapshot, item)) for item in ids]
        if not vectors:
            return np.zeros((0, self.bundle.towers.dim), np.float32)
        return np.stack(vectors)

    def upsert(
        self,
        rows: RequestRows,
        *,
        vectors: ArrayLike | None = None,
        names: Mapping[str, str] | None = None,
        strict: bool = True,
    ) -> int:
        """Adds items, or replaces those with the same ids.

        When this returns, the change is durable, and every later search sees it.

        Args:
            rows: item_id, the columns of item features and display columns; a column that is left
                out is a missing value.
            vectors: Vectors in the place of those of the item tower, float [N, D].
            names: Name in `rows` -> our name; see the class.
            strict: Whether a column that nothing reads is refused.

        Returns:
            The number of items now.

        Raises:
            ChangesError: The bundle is in memory alone, or was replaced by another version.
            OSError: The disk refuses; nothing was changed.
            QueryError, ConfigError: The rows or vectors are not usable; nothing was changed.
        """
        # A child that was forked has the parent's lock and its connection to the log.
        check_fork()
        table = self._read_items(rows, Naming.read(names, strict))
        if vectors is None:
            vectors = self._encode_items(table)
        # Of a caller or of a tower: one that is not finite would be the best of every list, or of
        # none.
        vectors = check_vectors(vectors, what="item")
        schema = self._live.catalogue.schema
        shown = as_display(table, schema, self.forms)
        # Encoded before the lock is taken: other writers wait for the disk alone.
        with self._lock:
            self._live.upsert(shown, vectors)
            return len(self)

    def delete(self, item_ids: Iterable[Any]) -> int:
        """Deletes items, and returns the number of those that existed.

        When this returns, the change is durable.

        Raises:
            ChangesError, OSError: As `upsert`.
        """
        check_fork()
        # Read before the lock is taken: an iterable of the caller may be slow.
        ids = self._item_ids(item_ids, "item_ids")
        with self._lock:
            return self._live.delete(ids)

    @property
    def is_detached(self) -> bool:
        """Whether changes are kept apart from the bundle."""
        return self._live.is_detached

    def detach(self, path: Path) -> None:
        """Keeps changes apart from the bundle from now on, for as long as somebody serves it.

        It is for a server that keeps the version before the current one, to go back to, and that
        makes each change to the current one too, where it lasts.

        Args:
            path: File of the changes, which the processes of the server share.
        """
        self._live.detach(path)

    def rebalance(self) -> None:
        """Builds the index anew over the present items, in memory, so that searches are fast again.

        Answers and changes go on.

        Raises:
            ChangesError: Another rebalance or compaction is under way.
        """
        with self._exclusive_maintenance():
            self._live.rebalance()

    def compact(self) -> None:
        """Writes a new version of the bundle with all changes in it, and answers from that.

        The new version becomes the current one of the folder.

        Raises:
            BusyError: Another process exports or compacts the bundle.
            ChangesError, OSError: As `upsert`, or another rebalance or compaction is under way.
        """
        with self._exclusive_maintenance(), self._live.make_versions():
            compaction = self._live.compact()
            # Only the switch excludes changes, and those made since are copied to the new version.
            with self._lock:
                self._live = self._live.switch_to(compaction)

    @contextlib.contextmanager
    def _exclusive_maintenance(self) -> Iterator[None]:
        """Excludes other long work on the index."""
        check_fork()
        # Refused, not queued: a second rebalance right after the first would be in vain.
        if not self._maintenance.acquire(blocking=False):
            raise ChangesError("Another rebalance or compaction is under way.")
        try:
            yield
        finally:
            self._maintenance.release()

    def has_item(self, item: Any) -> bool:
        """Whether the item is there now."""
        catalogue = self._live.catalogue
        number = catalogue.numbers.get(self._item_id(item))
        return number is not None and catalogue.snapshot.position_of(number) >= 0

    def _user_id(self, user: Any) -> str:
        # Most ids are those of the bundle, letter for letter.
        if type(user) is str and user in self.user_rows.row_by_id:
            return user
        return read_id(user, self.forms.user_id, "user")

    def _user_ids(self, users: Iterable[Any]) -> list[str]:
        return read_ids(users, self.forms.user_id, "user_ids", self.user_rows.row_by_id)

    def _item_id(self, item: Any) -> str:
        return read_id(item, self.forms.item_id, "item")

    def _item_ids(self, items: Iterable[Any], what: str) -> list[str]:
        return read_ids(items, self.forms.item_id, what, self._live.catalogue.numbers)

    def _note_of_unknown(self, history: Sequence[str]) -> str:
        """Returns and logs the sentence that no item of a history is known; "" where one is."""
        numbers = self._live.catalogue.numbers
        if not history or any(item in numbers for item in history):
            return ""
        note = f"None of the {len(history)} items of the history is known, such as "
        note += f"{echo(history[0])}."
        logging.warning("%s", note)
        return note

    def _filters(
        self, where: ConditionsLike, allow: Iterable[Any] | None, deny: Iterable[Any] | None
    ) -> _Filters:
        """Returns the limits of a call in the form of the bundle."""
        only = None
        if allow is not None:
            only = self._item_ids(allow, "allow")
        denied: list[str] = []
        # Most requests deny nothing.
        is_empty = isinstance(deny, (tuple, list)) and not deny
        if deny is not None and not is_empty:
            denied = self._item_ids(deny, "deny")
        return _Filters(as_conditions(where, self.forms), only, denied, where)

    def _columns(self, names: Iterable[str] | None) -> list[str] | None:
        """Returns the display columns that a call asks for; None for all.

        Raises:
            ConfigError: They are no list of names, or one is none of the bundle's.
        """
        if names is None:
            return None
        # The usual requests of a server, for ids and scores.
        if isinstance(names, (tuple, list)) and not names:
            return []
        listed = list(members_of(names, "columns"))
        known = [name for name in self._live.catalogue.schema.names if name != "item_id"]
        check_fields(dict.fromkeys(map(str, listed)), known, "columns: the bundle")
        return listed

    def _read_items(self, rows: RequestRows, naming: Naming) -> pa.Table:
        """Returns the rows of items in the form of the bundle's own."""
        known = ["item_id"]
        for feature in self.bundle.encoder.spec.item.values():
            known += feature.columns_read
        # Display columns too, which no feature may read.
        known += self._live.catalogue.schema.names
        known = list(dict.fromkeys(known))
        return read_rows(rows, known, naming, self._item_readers, key="item_id")

    def _encode_request(
        self, rows: RequestRows | None, user: Any, events: Sequence[Any] | None, naming: Naming
    ) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Returns the vector [1, D] of the row of a request, that user's row, and the history."""
        read, user_rows, history = self._read_request(rows, user, events, naming)
        if not isinstance(read, np.ndarray):
            read = self.bundle.towers.embed("user", read)
        return read, user_rows, history

    def _encode_each(self, asked: Sequence[Mapping[str, Any]]) -> list[EncodedUser]:
        """Returns several users as `recommend` takes them, by one call of the user tower."""
        users: list[EncodedUser | None] = []
        # Number of each user whom the tower encodes -> the features, the row and the history.
        read: dict[int, tuple[Mapping[str, np.ndarray], np.ndarray, list[str]]] = {}
        for number, arguments in enumerate(asked):
            users.append(arguments.get("encoded"))
            if users[number] is not None:
                continue
            user = arguments.get("user")
            rows = arguments.get("rows")
            events = arguments.get("events")
            if rows is not None or events is not None:
                features, user_rows, history = self._read_request(rows, user, events, OUR_NAMES)
            elif user is not None:
                features, user_rows = self._read_user(self._user_id(user))
                history = []
            else:
                raise ConfigError(f"asked[{number}] needs user, rows, events or encoded.")
            if isinstance(features, np.ndarray):
                users[number] = EncodedUser(features, user_rows, history)
            else:
                read[number] = (features, user_rows, history)
        if read:
            first, *_ = read.values()
            batch = {
                name: np.concatenate([features[name] for features, _, _ in read.values()])
                for name in first[0]
            }
            vectors = self.bundle.towers.embed("user", batch)
            for row, (number, (_, user_rows, history)) in enumerate(read.items()):
                users[number] = EncodedUser(vectors[row : row + 1], user_rows, history)
        return [user for user in users if user is not None]

    def _read_request(
        self, rows: RequestRows | None, user: Any, events: Sequence[Any] | None, naming: Naming
    ) -> tuple[ReadUser, np.ndarray, list[str]]:
        """Returns the row of a request as the tower takes it, that user's row, and the history."""
        if events is not None:
            return self._read_events(rows, user, events, naming)
        # The usual request, one mapping of plain values, goes past Arrow's tables.
        row = self.user_rows.read_one(rows, naming)
        if row is None:
            table = self._one_user(rows, user, naming)
            # A row without an id is of nobody.
            ids = [None]
            if "user_id" in table.column_names:
                ids = table["user_id"].to_pylist()
            history = self.user_rows.history_items(table)
            return self.user_rows.encode(table), self._rows_of_users(ids), history
        if user is not None:
            row = {**row, "user_id": self._user_id(user)}
        user_row = -1
        user_id = row.get("user_id")
        if isinstance(user_id, str):
            user_row = self.user_rows.row_by_id.get(user_id, -1)
        history = self.user_rows.history_of(row)
        return self.user_rows.encode_one(row), np.array([user_row]), history

    def _read_events(
        self, rows: RequestRows | None, user: Any, events: Sequence[Any], naming: Naming
    ) -> tuple[ReadUser, np.ndarray, list[str]]:
        """Returns what `_read_request` does, of a user with further events."""
        # A known user who brings a history, or features, past Arrow's tables.
        if rows is not None and type(events) in (tuple, list) and not events:
            row = self.user_rows.read_one(rows, naming)
            if row is not None:
                user_id = row.get("user_id") if user is None else self._user_id(user)
                number = None
                if isinstance(user_id, str):
                    number = self.user_rows.row_by_id.get(user_id)
                if isinstance(user_id, str) and number is not None:
                    # `read_one` took a mapping, or a list of one.
                    brought: Any = rows[0] if isinstance(rows, list) else rows
                    row = self.user_rows.beside_stored(user_id, row, brought)
                    seen = list(dict.fromkeys(self.user_rows.history_of(row)))
                    return self.user_rows.encode_one(row), np.array([number]), seen
        table, items, user_id = self._row_with_events(rows, user, events, naming)
        history = [*self.user_rows.history_items(table), *items]
        user_rows = self._rows_of_users([user_id])
        # The stored vector says all, where the model reads neither the events nor anything new.
        read: ReadUser
        if user_rows[0] >= 0 and rows is None and not (items and self.user_rows.reads_history):
            read = self.bundle.user_vectors[user_rows]
        else:
            read = self.user_rows.encode(table)
        # Each once: a further event may repeat an item of the stored history.
        return read, user_rows, list(dict.fromkeys(history))

    def _row_with_events(
        self, rows: RequestRows | None, user: Any, events: Sequence[Any], naming: Naming
    ) -> tuple[pa.Table, list[str], str | None]:
        """Returns the row of a user with further events, the items of these, and the id."""
        user_id = None
        if user is not None:
            user_id = self._user_id(user)
        given = None
        if rows is not None:
            given = self._one_user(rows, user, naming)
            if user_id is None and "user_id" in given.column_names:
                (user_id,) = given["user_id"].to_pylist()
        return *self.user_rows.with_events(user_id, given, events, naming), user_id

    def _one_user(self, rows: RequestRows, user: Any, naming: Naming) -> pa.Table:
        """Returns the one row of user features that `recommend` takes, with the id if there is one.

        Raises:
            ConfigError: There is not one row, or nothing stands in it.
        """
        table = self.user_rows.read(rows, naming)
        if len(table) != 1:
            raise ConfigError(
                f"recommend answers one user; rows holds {len(table)}. See recommend_many."
            )
        if user is not None:
            columns = dict(zip(table.column_names, table.columns))
            columns["user_id"] = pa.chunked_array([[self._user_id(user)]])
            return pa.table(columns)
        # A body whose columns were all left out is not answered with the list for nobody.
        if table.column_names == ["user_id"] and table["user_id"].null_count:
            raise ConfigError(
                f"rows={echo(rows)} says nothing of the user; it may have: "
                f"{', '.join(self.user_rows.columns)}."
            )
        return table

    @functools.cached_property
    def _item_readers(self) -> dict[str, ReadColumn]:
        readers = feature_readers(self.bundle.encoder, "item")
        return readers | {"item_id": IdColumn("item_id", self.forms.item_id)}

    @functools.cached_property
    def configured_rerank(self) -> Reranking | None:
        """The re-ranker of `config.retrieval.rerank`; None without one."""
        # Made once: a request should not wait for the options to be read.
        return resolve_rerank(None, self.bundle.config.retrieval.rerank)

    def _recommend(
        self,
        vectors: np.ndarray,
        user_rows: np.ndarray,
        k: int,
        filters: _Filters,
        exclude_seen: bool,
        popularity_weight: float,
        rerank: RerankLike,
        *,
        histories: Sequence[Sequence[str]] = (),
        each_as_alone: bool = False,
    ) -> tuple[Snapshot, np.ndarray, np.ndarray]:
        """Returns what `_search` returns, re-ranked."""
        if rerank is None:
            reranking = self.configured_rerank
        else:
            # The caller's choice replaces the configured one whole, its options included.
            reranking = resolve_rerank(rerank, RerankConfig())
        fetched = k
        if reranking is not None:
            # More than are shown, or there would be nothing to choose between.
            fetched = k * reranking.config.multiple
        snapshot, scores, positions = self._search(
            vectors,
            user_rows,
            fetched,
            filters,
            exclude_seen,
            popularity_weight,
            histories=histories,
            each_as_alone=each_as_alone,
        )
        if reranking is None:
            return snapshot, scores, positions
        scores, positions = _rerank_lists(reranking, snapshot, scores, positions, k)
        return snapshot, scores, positions

    def _search(
        self,
        vectors: np.ndarray,
        user_rows: np.ndarray,
        k: int,
        filters: _Filters,
        exclude_seen: bool,
        popularity_weight: float,
        *,
        histories: Sequence[Sequence[str]] = (),
        each_as_alone: bool = False,
    ) -> tuple[Snapshot, np.ndarray, np.ndarray]:
        """Returns the snapshot that was searched, the scores [B, k] and the positions [B, k].

        Args:
            vectors: User vectors, float32 [B, D].
            user_rows: Row of each user in the users table, int64 [B]; -1 of unknown ones.
            k: Length of the lists.
            filters: Which items may come back.
            exclude_seen: Whether to leave out the items of each user.
            popularity_weight: See `recommend`.
            histories: Further items to leave out for each user; none for no one.
            each_as_alone: See `search_filtered`.
        """
        # Read once: a compaction may replace it, and the numbers of items with it.
        live = self._live
        catalogue = live.catalogue
        if exclude_seen:
            # Row -1, of an unknown user, has no list.
            exclude = live.bundle.seen.take(user_rows)
        else:
            exclude = Ragged.empty(len(vectors))
        if any(histories):
            # With what is denied, as for one user: an item that is in both counts once.
            lists = [catalogue.numbers_of([*filters.deny, *history]) for history in histories]
            offsets = np.cumsum([0, *map(len, lists)])
            values = np.concatenate(lists).astype(np.int32)
            exclude = exclude.join(Ragged(offsets, values))
        elif filters.deny:
            denied = catalogue.numbers_of(filters.deny)
            exclude = exclude.join(_same_list(denied, len(vectors)))
        only = None
        if filters.allow is not None:
            only = catalogue.numbers_of(filters.allow)
        # Taken after the ids were looked up: numbers never change their item, so this is safe, and
        # the answer is as new as can be.
        snapshot = catalogue.snapshot
        scores, positions = snapshot.search(
            vectors,
            k,
            exclude=exclude,
            where=filters.where,
            only=only,
            popularity_weight=popularity_weight,
            each_as_alone=each_as_alone,
        )
        return snapshot, scores, positions

    def _vectors_and_rows(self, ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the vectors of users, and their rows in the users table.

        Known users have stored vectors; those of unknown ones are computed.
        """
        rows = self._rows_of_users(ids)
        stored = self.bundle.user_vectors
        unknown = np.flatnonzero(rows < 0)
        # Row -1, of an unknown user, reads the last vector, which is replaced below.
        if len(stored):
            vectors = np.asarray(stored[rows])
        else:
            vectors = np.zeros((len(ids), self.bundle.towers.dim), np.float32)
        if unknown.size:
            unknown_ids = [ids[position] for position in unknown.tolist()]
            vectors[unknown] = self._encode_users(self.user_rows.unknown(unknown_ids))
        return vectors, rows

    def _vector_and_row(self, user: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the vector [1, D] of one user, to be read alone, and the row; see above."""
        read, user_rows = self._read_user(user)
        if not isinstance(read, np.ndarray):
            read = self.bundle.towers.embed("user", read)
        return read, user_rows

    def _read_user(self, user: str) -> tuple[ReadUser, np.ndarray]:
        """Returns the vector [1, D] of one user, or what the tower takes, and the row."""
        row = self.user_rows.row_by_id.get(user, -1)
        if row < 0:
            return self.user_rows.encode_one({"user_id": user}), np.array([row])
        # A part of the stored vectors, which is not copied.
        return self.bundle.user_vectors[row : row + 1], np.array([row])

    def _rows_of_users(self, ids: Sequence[str | None]) -> np.ndarray:
        """Returns the row of each user in the users table, int64 [B]; -1 of unknown ones."""
        row_by_id = self.user_rows.row_by_id
        rows = [-1 if user is None else row_by_id.get(user, -1) for user in ids]
        return np.array(rows, np.int64)


def _rerank_lists(
    reranking: Reranking, snapshot: Snapshot, scores: np.ndarray, positions: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the scores [B, L] and positions [B, L] that a re-ranker chooses from [B, M]."""
    k = min(k, scores.shape[1])
    chosen_scores = np.full((len(scores), k), -np.inf, scores.dtype)
    chosen_positions = np.full((len(scores), k), -1, positions.dtype)
    for user in range(len(scores)):
        # Lists end with -1 where items have run out, which is no candidate.
        found = positions[user][positions[user] >= 0]
        candidates = Candidates(
            scores[user, : len(found)],
            snapshot.vectors(found),
            functools.partial(snapshot.rows, found),
        )
        chosen = reranking(candidates, k)
        chosen_scores[user, : len(chosen)] = candidates.scores[chosen]
        chosen_positions[user, : len(chosen)] = found[chosen]
    return chosen_scores, chosen_positions


def _check_options(exclude_seen: bool, popularity_weight: float) -> None:
    """Refuses what is no flag, and no finite number."""
    # What is said where nothing is, by nearly all requests.
    if exclude_seen is True and type(popularity_weight) is float and popularity_weight == 0.0:
        return
    if not isinstance(exclude_seen, (bool, np.bool_)):
        raise ConfigError(f"exclude_seen={echo(exclude_seen)} must be True or False.")
    is_number = isinstance(popularity_weight, (int, float, np.integer, np.floating))
    # Larger ones overflow in the float32 of a query.
    if not is_number or not abs(popularity_weight) < MAX_WEIGHT:
        raise ConfigError(f"popularity_weight={echo(popularity_weight)} must be a finite number.")


def _as_list(
    snapshot: Snapshot,
    scores: np.ndarray,
    positions: np.ndarray,
    filters: _Filters,
    shown: list[str] | None,
    *,
    known: bool = True,
    note: str = "",
) -> Recommendations:
    """Returns one list, with another note where no item satisfies the conditions."""
    # From the snapshot that was searched: an item may be replaced meanwhile.
    items = _recommendations(snapshot, scores, positions, shown)
    # Only for an empty list: counting the matching items goes over all of them.
    if not items and filters.where:
        note = _note_of_none(snapshot, filters)
    return Recommendations(items, known=known, note=note)


def _note_of_none(snapshot: Snapshot, filters: _Filters) -> str:
    """Returns and logs the sentence that no item satisfies the conditions; "" where some do."""
    # Some do, but all of them are denied or were seen: that is no mistake in the conditions.
    if snapshot.count_matching(filters.where):
        return ""
    note = f"No item satisfies {describe(as_conditions(filters.written))}."
    logging.warning("%s", note)
    return note


def _holds_times(column: pa.ChunkedArray) -> bool:
    """Whether the values of a column are times: by their type, or numbers that mean our days."""
    if pa.types.is_temporal(column.type):
        return True
    if not pa.types.is_integer(column.type) or column.null_count == len(column):
        return False
    ends = pc.min_max(column).as_py()
    # The ends decide: numbers between two times of our days are times as well.
    return all(unit_of(value) is not None for value in ends.values())


def _mean_direction(
    catalogue: LiveCatalogue, snapshot: Snapshot, items: Sequence[str]
) -> np.ndarray:
    """Returns the mean of the vectors of items at length 1, float32 [D]."""
    positions = [catalogue.position(snapshot, item) for item in items]
    vectors = snapshot.vectors(np.array(positions))
    # Each item counts alike, however long its vector is.
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(lengths, 1e-30)).mean(axis=0)


def _same_list(numbers: np.ndarray, count: int) -> Ragged:
    """Returns the same list for each of `count` queries."""
    if count == 1:
        return Ragged.one(numbers.astype(np.int32))
    # int32, as rows are in all lists of exclusions.
    offsets = np.arange(count + 1, dtype=np.int64) * len(numbers)
    return Ragged(offsets, np.tile(numbers, count).astype(np.int32))


def _recommendations(
    snapshot: Snapshot,
    scores: np.ndarray,
    positions: np.ndarray,
    columns: list[str] | None = None,
) -> list[Recommendation]:
    """Returns the items of one list, without the entries that no item fills.

    Args:
        snapshot: Snapshot that was searched.
        scores: Scores [L].
        positions: Positions [L]; -1 where no item is.
        columns: Display columns to read; None for all.
    """
    # -1 ends the list of a user for whom fewer items than k remain.
    if len(positions) and positions[-1] < 0:
        filled = positions >= 0
        scores = scores[filled]
        positions = positions[filled]
    if columns is not None and not columns:
        ids = snapshot.id_texts(positions)
        return [Recommendation(item, score, {}) for item, score in zip(ids, scores.tolist())]
    rows = snapshot.rows(positions)
    listed = []
    for row, score in zip(rows, scores.tolist()):
        item = row.pop("item_id")
        if columns is not None:
            row = {name: row[name] for name in columns}
        listed.append(Recommendation(item, score, row))
    return listed

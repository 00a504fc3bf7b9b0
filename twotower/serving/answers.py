"""Answers to the requests of the API from one bundle; nothing of HTTP.

A user is answered by the model. Where the model knows nothing of somebody, items similar to what
they clicked are; and where there are no clicks either, the most popular ones. Each item says which.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from twotower.config import RerankConfig
from twotower.core.errors import ConfigError, QueryError, did_you_mean, echo
from twotower.core.ids import read_id
from twotower.core.times import TimeForm
from twotower.retrieval import golden
from twotower.retrieval.explain import Reason, explain_likeness, explain_user
from twotower.retrieval.live.conditions import Conditions, as_conditions
from twotower.retrieval.match import to_probability
from twotower.retrieval.requests import TimeColumn
from twotower.retrieval.rerank import GREEDY, RERANKERS, Candidates, resolve_rerank
from twotower.retrieval.retriever import EncodedUser, Recommendation, Recommendations, Retriever
from twotower.serving import types
from twotower.serving.errors import RequestError
from twotower.serving.events import LiveHistories, StoredEvent
from twotower.serving.lists.batches import Made
from twotower.serving.lists.cache import VectorCache
from twotower.serving.lists.hook import Hook
from twotower.serving.lists.shape import (
    MAX_CANDIDATES,
    MULTIPLE,
    Boost,
    Promotion,
    Reorder,
    Shape,
    make_list,
)
from twotower.serving.monitoring.served import Served, reference_of
from twotower.serving.types import Answer, Item, Source, Vector

STORED_LETTERS = 16  # of it in stores of vectors; see `twotower.integrations.redis_store`
VERSION_LETTERS = 12  # of the hash that names a bundle


# Source of an item by what gave it its position, where that is not its score.
_SOURCES: dict[str, Source] = {"promotion": "promoted", "exploration": "explored"}
# Note of a page of a re-ranked list.
_BEHIND = "Items behind the window that is re-ranked follow by their scores."
# List of somebody of whom nothing is known.
Fallback = Literal["popular", "latest", "none"]


class _List(NamedTuple):
    """The way in which a list is made.

    Attributes:
        make: Function that makes it.
        whom: Arguments that say for whom, or by what, which also explain its items.
        options: Other arguments: k, where and so on.
        source: Source of its items.
        known: Whether the user was known when the bundle was made.
    """

    make: Callable[..., Recommendations]
    whom: dict[str, Any]
    options: dict[str, Any]
    source: Source
    known: bool


# (version of a bundle, id of a user, width) -> vector float32 [D]; None where there is none.
FindVector = Callable[[str, str, int], np.ndarray | None]


class Answers:
    """A bundle that answers.

    Attributes:
        retriever: Retriever of the bundle.
        version: Version of the bundle in answers: the beginning of the hash of its manifest.
        histories: Events since the bundle was made.
        cache: Users who were encoded lately.
        served: Figures on the lists; None before the version is warm.
        fallback: List of somebody of whom nothing is known.
        hook: Re-ranker of the model's lists; None where they are as the bundle has them.
        max_together: Number of users up to which the tower's programs are compiled; with 1 those
            whom it encodes are not answered together.
    """

    def __init__(
        self,
        retriever: Retriever,
        *,
        fallback: Fallback = "popular",
        hook: Hook | None = None,
        find_vector: FindVector | None = None,
        max_together: int = 1,
    ):
        """Serves a bundle.

        Args:
            retriever: Retriever of a bundle that was loaded from a folder.
            fallback: List of somebody of whom nothing is known.
            hook: Re-ranker of the model's lists, but of those whose request asks for diversity.
            find_vector: Function that finds vectors of users who are not in the bundle.
            max_together: Number of users up to which the tower's programs are compiled.

        Raises:
            ConfigError: The fallback are the latest items, and their times are not known.
        """
        self.retriever = retriever
        self.fallback: Fallback = fallback
        self.hook = hook
        self.max_together = max_together
        # Asked for once now: else the first stranger would find that no column says the time.
        if fallback == "latest":
            try:
                retriever.newest_items(1)
            except ConfigError as error:
                raise ConfigError(f"--fallback=latest: {error}") from None
        manifest = retriever.bundle.manifest
        self.version = self.version_of(manifest)
        # Events up to that time are in the log that the model was made of, and would count twice.
        self.histories = LiveHistories(_end_of_data(manifest.get("data", {})))
        self._find_vector = find_vector
        self.cache = VectorCache()
        self.served: Served | None = None
        # Unique among processes and restarts, at the cost of a counter.
        self._prefix = secrets.token_hex(6)
        self._counter = itertools.count(1)

    @staticmethod
    def version_of(manifest: Mapping[str, Any]) -> str:
        """Returns the version of a bundle by its manifest."""
        return manifest["sha256"][:VERSION_LETTERS]

    def warm(self) -> list[str]:
        """Does what the first requests would wait for, and returns golden requests that differ."""
        self.retriever.warm(self.max_together)
        if len(self.retriever):
            # Each kind of list sorts or compiles something when it is first asked for.
            self.retriever.popular_items(1)
            known = self.retriever.items()["item_id"][:1].to_pylist()
            # A tower that reads no history may have a vector of zeros for somebody unknown: such
            # requests are refused one by one, and the others are answered.
            with contextlib.suppress(QueryError):
                self.retriever.similar_items(known[0], 1)
            with contextlib.suppress(QueryError):
                self.retriever.recommend(events=known, k=1)
                explain_user(self.retriever, known, events=known)
        # Its lists are those of the bundle's own users, which takes seconds: not with the first
        # request.
        self.served = Served(reference_of(self.retriever))
        recorded = self.retriever.bundle.read_golden()
        # Bundles of older exports hold no golden answers: nothing is known against them.
        if recorded is None:
            return []
        return golden.differences(self.retriever.bundle, recorded)

    # Lists.

    def retrieve(self, request: types.Retrieve) -> Answer:
        """Returns the items that suit a user."""
        return self._make(request, self._way_of(request))

    def retrieve_each(self, requests: Mapping[int, types.Retrieve]) -> Mapping[int, Made]:
        """Returns what `retrieve` returns or raises for each request, by its number.

        The plain lists of the model that are asked for alike are made by one call of
        `Retriever.recommend_each`. Of all others the function is returned that makes them.
        """
        found: dict[int, Made] = {}
        ways: dict[int, _List] = {}
        for number, request in requests.items():
            try:
                ways[number] = self._way_of(request)
            except Exception as error:
                found[number] = error
        for group in self._alike(requests, ways):
            lists: list[Recommendations] = []
            # One that fails is told when it is asked for alone, and so are those beside it.
            with contextlib.suppress(Exception):
                lists = self._make_each([ways[number] for number in group])
            for number, items in zip(group, lists):
                found[number] = _tried(self._answer_of, requests[number], ways.pop(number), items)
        for number, way in ways.items():
            found[number] = functools.partial(self._make, requests[number], way)
        return found

    def _way_of(self, request: types.Retrieve) -> _List:
        """Returns how a list is made."""
        return self._like(request) if request.like is not None else self._of_user(request)

    def _make(self, request: types.Retrieve, way: _List) -> Answer:
        """Returns the list that is made in a way."""
        # What needs more than the order of the scores is filled position by position, from a pool
        # of candidates; a plain list is one search, and costs a fraction of that.
        if self._is_shaped(request, way):
            return self._shape(request, way)
        return self._answer_of(request, way, way.make(**way.whom, **way.options))

    def _alike(
        self, requests: Mapping[int, types.Retrieve], ways: Mapping[int, _List]
    ) -> list[list[int]]:
        """Returns groups of plain lists of the model that are asked for alike, by their number."""
        groups: dict[bytes, list[int]] = {}
        for number, way in ways.items():
            # One that fails is told when it is asked for alone.
            with contextlib.suppress(Exception):
                if self._is_plain(requests[number], way):
                    # Who asks may be encoded already; all else must be the same.
                    options = {**way.options, "encoded": None}
                    groups.setdefault(msgspec.json.encode(options), []).append(number)
        # A single one gains nothing.
        return [group for group in groups.values() if len(group) > 1]

    def _is_plain(self, request: types.Retrieve, way: _List) -> bool:
        """Whether a list is one of the model that takes little more than others like it."""
        if way.source != "model" or self._is_shaped(request, way):
            return False
        # These are made for each list, and take a thousand times as long.
        if request.reasons or self._reorder(request, way.source) is not None:
            return False
        # The tower encodes nobody but by programs that are compiled.
        is_encoded = len(way.whom) == 1 or way.options.get("encoded") is not None
        return is_encoded or self.max_together > 1

    def _make_each(self, ways: Sequence[_List]) -> list[Recommendations]:
        """Returns the lists of ways that differ in whom they are for."""
        options = dict(ways[0].options)
        options.pop("encoded", None)
        asked = [{**way.whom, "encoded": way.options.get("encoded")} for way in ways]
        return self.retriever.recommend_each(asked, **options)

    def _answer_of(self, request: types.Retrieve, made: _List, found: Recommendations) -> Answer:
        """Returns the answer of a plain list, with its reasons."""
        answer = self._answer(request, found, made.source, known=made.known)
        if request.reasons:
            self._explain(answer.items, made)
        return answer

    def _is_shaped(self, request: types.Retrieve, made: _List) -> bool:
        """Whether a list needs more than the order of the scores."""
        shaped = (
            request.boosts
            or request.promotions
            or request.max_per
            or request.explore
            # The model's lists are re-ranked by the retriever itself, unless a hook is there.
            or (self.hook is not None and made.source == "model")
            or (request.diversity is not None and made.source != "model")
            # Its pages are of one order, which the retriever makes anew for each length.
            or request.window
            or (request.offset and self._reorder(request, made.source) is not None)
            or (made.source == "model" and self._ranks_whole)
        )
        return bool(shaped)

    def _of_user(self, request: types.Retrieve) -> _List:
        """Returns how the list of a user is made."""
        # Without `like` there is no direction to move away from.
        if request.unlike:
            raise RequestError(
                400,
                "unlike needs like.",
                field="unlike",
                value=echo(request.unlike),
                cure="Name items to find similar ones of by like.",
            )
        retriever = self.retriever
        user = request.user_id
        events: Sequence[Any] | None = request.history
        is_known = False
        last: Any = None
        if user is not None:
            known = retriever.user_rows.row_by_id
            # Most ids are those of the bundle, letter for letter.
            if user not in known:
                user = read_id(user, retriever.forms.user_id, "user_id")
            is_known = user in known
            # A history in the request is the whole one: events that were sent may be in it already.
            if events is None:
                # Before the events are read: one that comes meanwhile, while this runs in a thread,
                # must not pass for one that the kept vector knows.
                last = self.histories.last(user)
                events = self._live_events(user) if last is not None else ()
        is_personal = is_known or request.features
        if not is_personal and self._history and events:
            # From events with unknown items alone the model would make something up.
            is_personal = any(map(self.retriever.has_item, map(_item_of, events)))
        if not is_personal:
            return self._without_model(request, user, events or ())
        options = self._options(request)
        if request.features or request.history is not None:
            whom = self._of_row(request, user, events, is_known, options)
        elif events:
            whom = {"user": user, "events": events}
            options["encoded"] = self._encode_latest(user, events, last)
        else:
            # Neither features nor events: the vector in the bundle, without running the tower.
            whom = {"user": user}
        return _List(retriever.recommend, whom, options, "model", is_known)

    def _stored_vector(self, user: str | None) -> np.ndarray | None:
        """Returns the vector that was published of a user who is not in the bundle."""
        if self._find_vector is None or user is None:
            return None
        manifest = self.retriever.bundle.manifest
        # By the bundle too: vectors of another model mean nothing to this one's items.
        return self._find_vector(manifest["sha256"][:STORED_LETTERS], user, manifest["dim"])

    def _encode_latest(self, user: str | None, events: Sequence[Any], last: Any) -> EncodedUser:
        """Returns somebody who was sent events of, encoded once for each new one.

        Args:
            user: Id of the user.
            events: Events of the user.
            last: The latest of them, as the histories keep it.
        """
        encode = functools.partial(self.retriever.encode_request, user, events=events)
        # Without an id there is nothing to keep the vector by.
        if user is None:
            return encode()
        return self.cache.find(user, last, encode)

    def similar_items(self, request: types.SimilarItems) -> Answer:
        """Returns the items of greatest cosine to one."""
        found = self.retriever.similar_items(request.item_id, **self._filters(request))
        return self._answer(request, found, "similar")

    def popular(self, request: types.Popular) -> Answer:
        """Returns the items with the most training rows."""
        found = self.retriever.popular_items(**self._filters(request))
        return self._answer(request, found, "popular")

    def latest(self, request: types.Latest) -> Answer:
        """Returns the newest items."""
        found = self.retriever.newest_items(column=request.column, **self._filters(request))
        return self._answer(request, found, "new")

    def _like(self, request: types.Retrieve) -> _List:
        """Returns how the list of items is made that are like some and unlike others."""
        # Each of these says for whom, or reorders what the model scored; here nobody is meant.
        # Whatever is not left at its default is refused rather than read past.
        rest = ("user_id", "features", "history", "popularity_weight", "diversity", "window")
        for name in rest:
            if getattr(request, name):
                raise RequestError(
                    400,
                    f"like and {name} do not go together.",
                    field=name,
                    value=echo(getattr(request, name)),
                    cure="Leave one of them out.",
                )
        whom = {"items": request.like, "unlike": request.unlike}
        return _List(self.retriever.items_like, whom, self._filters(request), "similar", True)

    def _without_model(
        self, request: types.Retrieve, user: str | None, events: Sequence[Any]
    ) -> _List:
        """Returns how the list of somebody is made of whom the bundle knows nothing."""
        retriever = self.retriever
        # Clicks are newer than a vector that was published, which does not know them.
        vector = None if events else self._stored_vector(user)
        if vector is not None:
            # Row -1: the bundle knows nothing that this user has seen.
            encoded = EncodedUser(vector[None, :], np.array([-1]), [])
            options = self._options(request) | {"encoded": encoded}
            return _List(retriever.recommend, {"user": user}, options, "model", False)
        items = self._items_of(events)
        # Items may have been deleted since they were clicked, and have no vector then.
        present = [item for item in items if retriever.has_item(item)]
        filters = self._filters(request)
        if request.exclude_seen:
            filters["deny"] = [*filters["deny"], *items]
        if present:
            return _List(retriever.items_like, {"items": present}, filters, "similar", False)
        if self.fallback == "latest":
            return _List(retriever.newest_items, {}, filters, "new", False)
        if self.fallback == "none":
            return _List(_nothing, {}, filters, "popular", False)
        return _List(retriever.popular_items, {}, filters, "popular", False)

    def _of_row(
        self,
        request: types.Retrieve,
        user: str | None,
        events: Sequence[Any] | None,
        is_known: bool,
        options: dict[str, Any],
    ) -> dict[str, Any]:
        """Returns the arguments that describe somebody whose features or history a request brings.

        What the model does not read of the history is denied in the options.
        """
        row = self._row(request.features, request.history)
        # What the model reads of a history counts as seen anyway; a model that reads none would
        # show the clicked items again.
        if not self._history and request.history and request.exclude_seen:
            options["deny"] = [*options["deny"], *self._items_of(request.history)]
        if request.history is not None:
            events = None
        # What is stored of a known user stands beside the features of the request.
        if is_known and events is None:
            events = ()
        whom: dict[str, Any] = {"user": user, "events": events}
        if row:
            whom["rows"] = [row]
        return whom

    def _row(
        self, features: Mapping[str, Any], history: Sequence[types.Event | Any] | None
    ) -> dict[str, Any]:
        """Returns the row of raw user features that a request describes.

        Raises:
            RequestError: Nothing reads a feature.
        """
        known = self.user_columns
        for name in features:
            if name not in known:
                raise RequestError(
                    400,
                    f"features: nothing reads {echo(name)}{did_you_mean(name, known)}",
                    field=f"features.{name}",
                    value=echo(features[name]),
                    cure=f"Leave it out, or write one of {', '.join(known) or 'none'}.",
                )
        row = dict(features)
        if history is not None and self._history:
            # Most are ids alone, as they are.
            is_plain = set(map(type, history)) == {str}
            row[self._history] = list(history if is_plain else map(_as_event, history))
        return row

    def _shape(self, request: types.Retrieve, made: _List) -> Answer:
        """Returns the list of a request that wishes more than the order of the scores."""
        self._check_promotions(request.promotions)
        self._check_columns(request.max_per, "max_per.{name}")
        reorder = self._reorder(request, made.source)
        # By what the server could do for anybody, and not by who asks.
        if request.window and self._reorder(request, "model") is None:
            raise RequestError(
                400,
                f"window={request.window}: nothing re-ranks the lists of this server.",
                field="window",
                value=str(request.window),
                cure="Leave it out, or give diversity.",
            )
        shape = Shape(
            length=request.k + request.offset,
            where=as_conditions(request.where, self.retriever.forms),
            boosts=[
                Boost(self._where_of(boost, f"boosts[{number}]"), boost.factor or 1, boost.add or 0)
                for number, boost in enumerate(request.boosts)
            ],
            promotions=[
                Promotion(self._where_of(promotion, f"promotions[{number}]"), promotion.percent)
                for number, promotion in enumerate(request.promotions)
            ],
            max_per=request.max_per,
            explore=request.explore,
            seed=request.seed,
            reorder=reorder,
        )
        # Before the first search, while refusing costs nothing.
        _check_work(shape)
        # All columns: the shape may read others than those that the request asks for.
        options = {**made.options, "columns": None}
        if made.source == "model":
            options["rerank"] = ""  # what is left out may be that which the shape asks for
        notes: list[str] = []

        def search(k: int, where: Conditions) -> Recommendations:
            found = made.make(**made.whom, **{**options, "k": k, "where": where})
            notes.append(found.note)
            return found

        # From the first position on, whatever the offset: promotions and caps count from there, so
        # that pages fit together.
        placed = make_list(self.retriever, search, shape)[request.offset :]
        columns = self._columns_of(request)
        items = []
        for entry in placed:
            source = _SOURCES.get(entry.by, made.source)
            item = entry.item
            display = item.display
            if columns is not None:
                display = {name: display[name] for name in columns}
            items.append(
                Item(
                    item.item_id,
                    item.score,
                    source,
                    display,
                    propensity=entry.propensity,
                    best=entry.is_best,
                )
            )
        if request.reasons:
            self._explain(items, made)
        # The first search has the conditions of the request alone; those of boosts and promotions
        # may well find nothing.
        note = notes[0]
        if any(entry.is_behind for entry in placed):
            note = f"{note} {_BEHIND}".lstrip()
        return Answer(self._new_id(), self.version, items, made.known, note)

    def _where_of(self, wish: types.Boost | types.Promotion, field: str) -> Conditions:
        """Returns the conditions of a boost or a promotion.

        Raises:
            RequestError: They are none; the field says which.
        """
        try:
            where = as_conditions(wish.where, self.retriever.forms)
            # Asked of no item at all: an unknown column or operator is refused here, where the
            # field of the request is known.
            self.retriever.meets((), where)
        except ConfigError as error:
            raise RequestError(
                400,
                f"{field}: {error}",
                field=f"{field}.where",
                value=echo(wish.where),
                cure='Write conditions as in where: {"brand": "a"}, or [["price", "<=", 20]].',
            ) from error
        return where

    def _check_promotions(self, promotions: Sequence[types.Promotion]) -> None:
        total = sum(promotion.percent for promotion in promotions)
        # Thirds, written as 33.333334 each, sum to a little more.
        if total > 100 + 1e-6:
            raise RequestError(
                400,
                f"promotions: their percentages sum to {total:g}.",
                field="promotions",
                value=f"{total:g}",
                cure="Keep their sum at 100 or below.",
            )

    def _reorder(self, request: types.Retrieve, source: Source) -> Reorder | None:
        """Returns the re-ranking of a list; None where the order of the scores stays."""
        choose: Callable[[Candidates, int], Sequence[int] | np.ndarray] | None = None
        multiple = MULTIPLE
        is_greedy = False
        if request.diversity is not None:
            # What a request asks for goes before what the server is set to.
            choose = resolve_rerank(_mmr(request.diversity), RerankConfig())
            is_greedy = True
        elif source == "model" and self.hook is not None:
            choose = self.hook
            multiple = self.hook.multiple
        elif source == "model" and self.retriever.configured_rerank is not None:
            configured = self.retriever.configured_rerank
            choose = configured
            multiple = configured.config.multiple
            is_greedy = not self._ranks_whole
        if choose is None:
            return None
        user = request.user_id
        name = None if user is None else str(user)

        def reorder(pool: Sequence[Recommendation], k: int) -> Sequence[int]:
            positions = choose(self.retriever.candidates(pool, user=name), k)
            return [int(position) for position in positions]

        return Reorder(reorder, request.window or request.k * multiple, is_greedy)

    @functools.cached_property
    def _ranks_whole(self) -> bool:
        """Whether the bundle's re-ranker is one of its owner's own, and no hook is there.

        Its choice of ten need not be the beginning of its choice of twenty: it is asked for the
        order of the whole window, also for the first page.
        """
        configured = self.retriever.configured_rerank
        if configured is None or self.hook is not None:
            return False
        return RERANKERS.choose(configured.config.kind, "kind") not in GREEDY

    def _explain(self, items: Sequence[Item], made: _List) -> None:
        """Writes the reason of each item into it."""
        explain: Callable[..., list[Reason | None]] = explain_user
        if made.source == "similar":
            explain = explain_likeness
        # Popular and new items are anybody's.
        if not made.whom or not items:
            return
        ids = [item.item_id for item in items]
        for item, reason in zip(items, explain(self.retriever, ids, **made.whom)):
            if reason is not None:
                item.reason = types.Reason(*reason)

    # Vectors and scores.

    def encode_user(self, request: types.EncodeUser) -> Vector:
        """Returns the vector of a user."""
        user = request.user_id
        events: Sequence[Any] | None = None
        is_known = False
        if user is not None:
            user = read_id(user, self.retriever.forms.user_id, "user_id")
            is_known = user in self.retriever.user_rows.row_by_id
            if request.history is None:
                # Without events None, not (): then a known user has the stored vector, and no tower
                # runs.
                events = self._live_events(user) or None
        row = self._row(request.features, request.history)
        if user is None and not row:
            raise RequestError(
                400,
                "Nothing is said of the user.",
                cure="Give user_id, features or history.",
            )
        # What is stored of a known user stands beside the features of the request.
        if row and is_known:
            events = events or ()
        rows = [row] if row else None
        vector = self.retriever.encode_user(user, rows=rows, events=events)
        return Vector(self._new_id(), self.version, is_known, vector.tolist())

    def match(self, request: types.Match) -> types.Scores:
        """Returns the scores of pairs.

        Raises:
            RequestError: The model does not know a user.
        """
        known = self.retriever.user_rows.row_by_id
        for number, pair in enumerate(request.pairs):
            field = f"pairs[{number}].user_id"
            # Nobody new is scored: a guess would look like a score, and whoever ranks by it could
            # not tell.
            if read_id(pair.user_id, self.retriever.forms.user_id, field) not in known:
                raise RequestError(
                    404,
                    f"user {echo(pair.user_id)} is not known.",
                    field=field,
                    value=echo(pair.user_id),
                    cure="Leave the pair out: the model has nothing to score it by.",
                )
        users = self.retriever.embed_users([pair.user_id for pair in request.pairs])
        items = self.retriever.item_vectors([pair.item_id for pair in request.pairs])
        # Pair by pair: a product of matrices would score every user with every item.
        scores = np.einsum("bd,bd->b", users, items)
        probabilities = None
        if self.retriever.bundle.probability is not None:
            probabilities = to_probability(scores, self.retriever.bundle.probability).tolist()
        return types.Scores(self._new_id(), self.version, scores.tolist(), probabilities)

    # Changes.

    def put_items(self, items: Sequence[tuple[Any, Mapping[str, Any]]]) -> types.Changed:
        """Adds or replaces items; (id, columns) each."""
        rows = []
        for item_id, columns in items:
            # The path says which item; a second id could contradict it.
            if "item_id" in columns:
                raise RequestError(
                    400,
                    "columns: the id of an item is not among its columns.",
                    field="columns.item_id",
                    value=echo(columns["item_id"]),
                    cure="Leave it out.",
                )
            rows.append({**columns, "item_id": item_id})
        number = self.retriever.upsert(rows)
        return types.Changed(self.version, len(rows), number)

    def delete_item(self, item_id: str) -> types.Changed:
        """Deletes an item, if it is there."""
        number = self.retriever.delete([item_id])
        return types.Changed(self.version, number, len(self.retriever))

    def read_events(self, events: Sequence[types.SentEvent]) -> list[StoredEvent]:
        """Returns events in the form of the log, those without a time with that of now.

        Raises:
            ConfigError: An id or a time is none; the message says which.
        """
        forms = self.retriever.forms
        # One time for all of a request, so that their order stays that in which they were sent.
        now = int(time.time())
        read_time = TimeColumn("timestamp", forms.time)
        stored = []
        for number, event in enumerate(events):
            seconds = now
            if event.timestamp is not None:
                try:
                    (seconds,) = read_time([event.timestamp]).to_pylist()
                    # A time that no calendar has would be kept, and would fail each request of its
                    # user.
                    if seconds is not None:
                        _to_datetime(seconds)
                except ConfigError as error:
                    field = f"events[{number}].timestamp"
                    # The reader of tables tells of a row and a column, of which the client knows
                    # nothing.
                    detail = str(error).replace("rows, row 1, column 'timestamp'", field)
                    raise RequestError(
                        400,
                        detail,
                        field=field,
                        value=echo(event.timestamp),
                        cure=f"Give {forms.time.words}.",
                    ) from error
            stored.append(
                StoredEvent(
                    event.event_id,
                    read_id(event.user_id, forms.user_id, f"events[{number}].user_id"),
                    read_id(event.item_id, forms.item_id, f"events[{number}].item_id"),
                    event.event,
                    # A time may be one of the log's spellings of "missing".
                    now if seconds is None else seconds,
                    event.recommendation_id,
                )
            )
        return stored

    def keep_users(self, users: Collection[str]) -> None:
        """Forgets what was sent of all users but some."""
        self.histories.keep(users)
        self.cache.clear()

    def info(self) -> types.Info:
        """Returns what is served."""
        retriever = self.retriever
        manifest = retriever.bundle.manifest
        return types.Info(
            model_version=self.version,
            date=manifest["date"],
            items=len(retriever),
            users=len(retriever.user_rows.row_by_id),
            changes=retriever.changes,
            dim=manifest["dim"],
            index=retriever.bundle.index.kind,
            columns=self.columns,
            user_columns=self.user_columns,
            figures=manifest.get("figures", {}),
            data=manifest.get("data", {}),
        )

    @functools.cached_property
    def columns(self) -> list[str]:
        """Names of the display columns."""
        return [name for name in self.retriever.bundle.items.column_names if name != "item_id"]

    @functools.cached_property
    def user_columns(self) -> list[str]:
        """Names of the features that a request may bring; a history has a field of its own."""
        apart = ("user_id", self._history)
        return [name for name in self.retriever.user_rows.columns if name not in apart]

    @functools.cached_property
    def _history(self) -> str:
        """The column of the history that the model reads; "" where it reads none."""
        history = self.retriever.bundle.encoder.spec.history
        return history.column if history is not None else ""

    def _live_events(self, user: str) -> list[dict[str, Any]]:
        """Returns the events that were sent of a user, the latest last."""
        events: list[dict[str, Any]] = []
        for event in self.histories.of(user):
            # A number would be read in the unit of the log.
            events.append({**event, "timestamp": _to_datetime(event["timestamp"])})
        return events

    def _items_of(self, events: Iterable[Any]) -> list[str]:
        """Returns the ids of the items of events, each once, in the form of the log."""
        ids = []
        for number, event in enumerate(events):
            field = f"history[{number}]"
            ids.append(read_id(_item_of(event), self.retriever.forms.item_id, field))
        return list(dict.fromkeys(ids))

    def _filters(self, request: types.Listing) -> dict[str, Any]:
        """Returns the arguments of a list that all kinds of lists take."""
        # Each has its bound in the types; the work is that of their sum.
        if request.k + request.offset > types.MAX_K:
            raise RequestError(
                400,
                f"k={request.k} and offset={request.offset} reach beyond {types.MAX_K} items.",
                field="offset",
                value=str(request.offset),
                cure=f"Keep their sum at {types.MAX_K} or below.",
            )
        return {
            # The items before the offset are searched too: an index returns the best ones from the
            # first on.
            "k": request.k + request.offset,
            "where": request.where,
            "allow": request.allow,
            "deny": request.deny,
            "columns": self._columns_of(request),
        }

    def _options(self, request: types.Retrieve) -> dict[str, Any]:
        """Returns the arguments of `Retriever.recommend` but for the user."""
        options = self._filters(request)
        options["exclude_seen"] = request.exclude_seen
        options["popularity_weight"] = request.popularity_weight
        if request.diversity is not None:
            options["rerank"] = _mmr(request.diversity)
        return options

    def _answer(
        self,
        request: types.Listing,
        found: Recommendations,
        source: Source,
        *,
        known: bool = True,
    ) -> Answer:
        """Returns the answer of a list that was found."""
        items = [
            Item(item.item_id, item.score, source, item.display) for item in found[request.offset :]
        ]
        return Answer(self._new_id(), self.version, items, known, found.note)

    def _columns_of(self, request: types.Listing) -> list[str] | None:
        """Returns the display columns that a request asks for; None for all."""
        if request.columns is not None:
            self._check_columns(request.columns, "columns[{number}]")
        return request.columns

    def _check_columns(self, names: Collection[str], template: str) -> None:
        """Refuses what is no display column.

        Args:
            names: Names of a request.
            template: Field of each, with {number} or {name}.

        Raises:
            RequestError: One is none; its field says which.
        """
        for number, name in enumerate(names):
            if name not in self.columns:
                field = template.format(number=number, name=name)
                raise RequestError(
                    400,
                    f"{field}={echo(name)} is no display column{did_you_mean(name, self.columns)}",
                    field=field,
                    value=echo(name),
                    cure=f"Write any of {', '.join(self.columns) or 'none'}.",
                )

    def _new_id(self) -> str:
        return f"{self._prefix}{next(self._counter):x}"


def _tried(make: Callable[..., Answer], *values: Any) -> Answer | Exception:
    """Returns what a function returns or raises."""
    try:
        return make(*values)
    except Exception as error:
        return error


def _mmr(diversity: float) -> dict[str, Any]:
    """Returns the re-ranking of a request for diversity."""
    return {"kind": "mmr", "options": {"diversity": diversity}}


def _nothing(**_: Any) -> Recommendations:
    """Returns the list of somebody of whom nothing is known, where there is no fallback."""
    return Recommendations(note="Nothing is known of the user, and there is no fallback.")


def _item_of(event: types.Event | Any) -> Any:
    """Returns the id of the item of an event, as it was sent."""
    # Three forms: of a request, of the stored live events, and a mere id.
    if isinstance(event, types.Event):
        return event.item_id
    return event["item_id"] if isinstance(event, Mapping) else event


def _as_event(event: types.Event | Any) -> Any:
    """Returns an event of a request as `Retriever` takes it: an id, or a mapping of fields."""
    if not isinstance(event, types.Event):
        return event
    fields = msgspec.structs.asdict(event)
    return {name: value for name, value in fields.items() if value is not None}


def _check_work(shape: Shape) -> None:
    """Refuses a list that all other requests would wait for.

    Raises:
        RequestError: It takes more candidates than a list may have.
    """
    if shape.length * shape.searches > MAX_CANDIDATES:
        raise RequestError(
            400,
            f"k + offset, {shape.length}, times the searches for {len(shape.boosts)} boosts and "
            f"{len(shape.promotions)} promotions, {shape.searches}, are more than "
            f"{MAX_CANDIDATES:,} candidates.",
            field="k",
            value=str(shape.length),
            cure="Ask for fewer items, boosts or promotions.",
        )


def _to_datetime(seconds: int) -> datetime.datetime:
    """Returns a time as a date.

    Raises:
        ConfigError: It is beyond the years 1 to 9999.
    """
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    except (ValueError, OverflowError, OSError):
        raise ConfigError(f"rows, row 1, column 'timestamp': {seconds} is no date.") from None


def _end_of_data(data: Mapping[str, Any]) -> int:
    """Returns the time of the last row that a bundle was made of, in seconds; 0 without times."""
    times = [part["to"] for part in data.values() if isinstance(part, Mapping) and "to" in part]
    seconds = [TimeForm().one(text) or 0 for text in times]
    return max(seconds, default=0)

"""Answers to the requests of the API from one bundle; nothing of HTTP.

A user is answered by the model. Where the model knows nothing of somebody, items similar to what
they clicked are; and where there are no clicks either, the most popular ones. Each item says which.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from twotower.core.errors import ConfigError, did_you_mean, echo
from twotower.core.ids import read_id
from twotower.core.times import TimeForm
from twotower.retrieval import golden
from twotower.retrieval.requests import TimeColumn
from twotower.retrieval.retriever import Recommendations, Retriever
from twotower.serving import types
from twotower.serving.errors import RequestError
from twotower.serving.events import LiveHistories, StoredEvent
from twotower.serving.types import Answer, Item, Source, Vector

VERSION_LETTERS = 12  # of the hash that names a bundle


class Answers:
    """A bundle that answers.

    Attributes:
        retriever: Retriever of the bundle.
        version: Version of the bundle in answers: the beginning of the hash of its manifest.
        histories: Events since the bundle was made.
    """

    def __init__(self, retriever: Retriever):
        """Serves a bundle.

        Args:
            retriever: Retriever of a bundle that was loaded from a folder.
        """
        self.retriever = retriever
        manifest = retriever.bundle.manifest
        self.version = self.version_of(manifest)
        self.histories = LiveHistories(_end_of_data(manifest.get("data", {})))
        # Unique among processes and restarts, at the cost of a counter.
        self._prefix = secrets.token_hex(6)
        self._counter = itertools.count(1)

    @staticmethod
    def version_of(manifest: Mapping[str, Any]) -> str:
        """Returns the version of a bundle by its manifest."""
        return manifest["sha256"][:VERSION_LETTERS]

    def warm(self) -> list[str]:
        """Does what the first requests would wait for, and returns golden requests that differ."""
        self.retriever.warm()
        if len(self.retriever):
            self.retriever.popular_items(1)
            known = self.retriever.items()["item_id"][:1].to_pylist()
            self.retriever.similar_items(known[0], 1)
            self.retriever.recommend(events=known, k=1)
        recorded = self.retriever.bundle.read_golden()
        if recorded is None:
            return []
        return golden.differences(self.retriever.bundle, recorded)

    # Lists.

    def retrieve(self, request: types.Retrieve) -> Answer:
        """Returns the items that suit a user."""
        if request.like is not None:
            return self._like(request)
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
        if user is not None:
            known = retriever.user_rows.row_by_id
            # Most ids are those of the bundle, letter for letter.
            if user not in known:
                user = read_id(user, retriever.forms.user_id, "user_id")
            is_known = user in known
            if events is None:
                events = self._live_events(user)
        is_personal = is_known or request.features
        if not is_personal and self._history and events:
            # Of events with unknown items alone the model would make something up.
            is_personal = any(map(self.retriever.has_item, map(_item_of, events)))
        if not is_personal:
            return self._without_model(request, events or ())
        if request.features or request.history is not None:
            found = self._of_row(request, user, events, is_known)
        elif events:
            found = retriever.recommend(user, events=events, **self._options(request))
        else:
            found = retriever.recommend(user, **self._options(request))
        return self._answer(request, found, "model", known=is_known)

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

    def _like(self, request: types.Retrieve) -> Answer:
        """Returns the items that are like some and unlike others."""
        rest = ("user_id", "features", "history", "popularity_weight", "diversity")
        for name in rest:
            if getattr(request, name):
                raise RequestError(
                    400,
                    f"like and {name} do not go together.",
                    field=name,
                    value=echo(getattr(request, name)),
                    cure="Leave one of them out.",
                )
        found = self.retriever.items_like(
            request.like or (), unlike=request.unlike, **self._filters(request)
        )
        return self._answer(request, found, "similar")

    def _without_model(self, request: types.Retrieve, events: Sequence[Any]) -> Answer:
        """Returns a list for somebody of whom the model knows nothing."""
        items = self._items_of(events)
        present = [item for item in items if self.retriever.has_item(item)]
        filters = self._filters(request)
        if request.exclude_seen:
            filters["deny"] = [*filters["deny"], *items]
        if present:
            found = self.retriever.items_like(present, **filters)
            return self._answer(request, found, "similar", known=False)
        found = self.retriever.popular_items(**filters)
        return self._answer(request, found, "popular", known=False)

    def _of_row(
        self,
        request: types.Retrieve,
        user: str | None,
        events: Sequence[Any] | None,
        is_known: bool,
    ) -> Recommendations:
        """Returns the list of somebody whose features or history a request brings."""
        row = self._row(request.features, request.history)
        options = self._options(request)
        if not self._history and request.history and request.exclude_seen:
            options["deny"] = [*options["deny"], *self._items_of(request.history)]
        if request.history is not None:
            events = None
        # What is stored of a known user stands beside the features of the request.
        if is_known and events is None:
            events = ()
        if not row:
            return self.retriever.recommend(user, events=events, **options)
        if user is not None:
            return self.retriever.recommend(user, rows=[row], events=events, **options)
        return self.retriever.recommend(rows=[row], events=events, **options)

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
            row[self._history] = [_as_event(event) for event in history]
        return row

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
        return types.Scores(self._new_id(), self.version, scores.tolist())

    # Changes.

    def put_items(self, items: Sequence[tuple[Any, Mapping[str, Any]]]) -> types.Changed:
        """Adds or replaces items; (id, columns) each."""
        rows = []
        for item_id, columns in items:
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
        now = int(time.time())
        read_time = TimeColumn("timestamp", forms.time)
        stored = []
        for number, event in enumerate(events):
            seconds = now
            if event.timestamp is not None:
                try:
                    (seconds,) = read_time([event.timestamp]).to_pylist()
                except ConfigError as error:
                    place = f"events[{number}].timestamp"
                    detail = str(error).replace("rows, row 1, column 'timestamp'", place)
                    raise RequestError(
                        400,
                        detail,
                        field=place,
                        value=echo(event.timestamp),
                        cure=f"Give {forms.time.words}.",
                    ) from error
            stored.append(
                StoredEvent(
                    event.event_id,
                    read_id(event.user_id, forms.user_id, f"events[{number}].user_id"),
                    read_id(event.item_id, forms.item_id, f"events[{number}].item_id"),
                    event.event,
                    now if seconds is None else seconds,
                )
            )
        return stored

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
            moment = datetime.datetime.fromtimestamp(event["timestamp"], datetime.UTC)
            events.append({**event, "timestamp": moment})
        return events

    def _items_of(self, events: Iterable[Any]) -> list[str]:
        """Returns the ids of the items of events, each once, in the form of the log."""
        ids = []
        for number, event in enumerate(events):
            place = f"history[{number}]"
            ids.append(read_id(_item_of(event), self.retriever.forms.item_id, place))
        return list(dict.fromkeys(ids))

    def _filters(self, request: types.Listing) -> dict[str, Any]:
        """Returns the arguments of a list that all kinds of lists take."""
        if request.k + request.offset > types.MAX_K:
            raise RequestError(
                400,
                f"k={request.k} and offset={request.offset} reach beyond {types.MAX_K} items.",
                field="offset",
                value=str(request.offset),
                cure=f"Keep their sum at {types.MAX_K} or below.",
            )
        return {
            "k": request.k + request.offset,
            "where": request.where,
            "allow": request.allow,
            "deny": request.deny,
        }

    def _options(self, request: types.Retrieve) -> dict[str, Any]:
        """Returns the arguments of `Retriever.recommend` but for the user."""
        options = self._filters(request)
        options["exclude_seen"] = request.exclude_seen
        options["popularity_weight"] = request.popularity_weight
        if request.diversity is not None:
            options["rerank"] = {"kind": "mmr", "options": {"diversity": request.diversity}}
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
        names = request.columns
        if names is not None:
            self._check_columns(names)
        items = []
        for item in found[request.offset :]:
            display = item.display
            if names is not None:
                display = {name: display[name] for name in names}
            items.append(Item(item.item_id, item.score, source, display))
        return Answer(self._new_id(), self.version, items, known, found.note)

    def _check_columns(self, names: Sequence[str]) -> None:
        for number, name in enumerate(names):
            if name not in self.columns:
                raise RequestError(
                    400,
                    f"columns[{number}]={echo(name)} is no display column"
                    f"{did_you_mean(name, self.columns)}",
                    field=f"columns[{number}]",
                    value=echo(name),
                    cure=f"Write any of {', '.join(self.columns) or 'none'}.",
                )

    def _new_id(self) -> str:
        return f"{self._prefix}{next(self._counter):x}"


def _item_of(event: types.Event | Any) -> Any:
    """Returns the id of the item of an event, as it was sent."""
    if isinstance(event, types.Event):
        return event.item_id
    return event["item_id"] if isinstance(event, Mapping) else event


def _as_event(event: types.Event | Any) -> Any:
    """Returns an event of a request as `Retriever` takes it: an id, or a mapping of fields."""
    if not isinstance(event, types.Event):
        return event
    fields = msgspec.structs.asdict(event)
    return {name: value for name, value in fields.items() if value is not None}


def _end_of_data(data: Mapping[str, Any]) -> int:
    """Returns the time of the last row that a bundle was made of, in seconds; 0 without times."""
    times = [part["to"] for part in data.values() if isinstance(part, Mapping) and "to" in part]
    seconds = [TimeForm().one(text) or 0 for text in times]
    return max(seconds, default=0)

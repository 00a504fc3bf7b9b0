"""What the page asks for beside lists: items and users by name, histories, columns, the map.

All of it is read from memory. What has to be made first (an index of the titles, a map) is made in
a thread when a page first asks, so that no other request waits and no server without visitors pays.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import time
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa

from twotower.core.arrays import evenly_spaced
from twotower.core.arrow import is_list, pc, plain_text
from twotower.core.errors import UnknownItemError
from twotower.core.ids import read_id
from twotower.core.times import TimeForm
from twotower.retrieval.item_map.plane import (
    MAP_ITEMS,
    choose_columns,
    item_titles,
    map_data,
    project,
    title_column,
)
from twotower.retrieval.live.conditions import LATEST
from twotower.retrieval.requests import Forms
from twotower.serving.answers import Answers
from twotower.serving.page.search import Prefixes, Texts
from twotower.serving.page.types import (
    Catalogue,
    Column,
    FoundItem,
    FoundItems,
    FoundUser,
    FoundUsers,
    GetUser,
    ItemMap,
    Kind,
    PastItem,
    Profile,
    Search,
)
from twotower.serving.types import MAX_HISTORY, Event
from twotower.serving.versions.versions import Versions

PAST_ITEMS = 200  # items of a history that are shown
MAX_TITLE = 200  # letters of a title on the map
MAX_SEARCHED = 100_000  # items whose titles are searched, the most popular: within 40 ms
MAX_COUNTED = 2_000  # distinct values from which on none are offered
OFFERED_VALUES = 40
REMAKE_SECONDS = 30.0  # between one index of the titles and the next, however many items change
# Those that make sense to choose from a menu; conditions know others too.
OPERATORS: dict[Kind, list[str]] = {
    "text": ["==", "!=", "starts with"],
    "number": ["<=", ">=", "==", "!="],
    "list": ["contains", "not contains"],
    "time": [">=", "<=", LATEST],
    "flag": ["==", "!="],
}


class Lookup(NamedTuple):
    """An endpoint of the page, with the arguments of `twotower.serving.app.Endpoint`."""

    name: str
    route: str
    summary: str
    handle: Callable[[Any, str], Any]
    request: type[Any] | None
    answer: type[Any]


@dataclasses.dataclass(frozen=True)
class Made:
    """What was made of one bundle after one of its changes.

    Attributes:
        answers: Bundle; it must not be kept in memory once the server has dropped it.
        changes: Number of changes since the bundle was written.
        moment: Time of `time.monotonic` at which it was made.
        item_ids: Ids of the items that are searched, the most popular first.
        titles: Their titles and ids.
        users: Ids of the users.
        catalogue: Columns of the items.
        item_map: The map.
    """

    answers: weakref.ref[Answers]
    changes: int
    moment: float
    item_ids: list[str]
    titles: Texts
    users: Prefixes
    catalogue: Catalogue
    item_map: ItemMap


class Lookups:
    """The lookups of a server."""

    def __init__(self, versions: Versions):
        """Prepares the lookups, without making anything.

        Args:
            versions: Versions of the server, of which the main one is looked into.
        """
        self._versions = versions
        self._made: Made | None = None
        self._making: asyncio.Task[None] | None = None

    def endpoints(self) -> list[Lookup]:
        """Returns the endpoints of the page."""
        return [
            Lookup(
                "search_items",
                "POST /v1/search_items",
                "Items by the words of their title or by their id.",
                self._search_items,
                Search,
                FoundItems,
            ),
            Lookup(
                "search_users",
                "POST /v1/search_users",
                "Known users by the beginning of their id.",
                self._search_users,
                Search,
                FoundUsers,
            ),
            Lookup(
                "user",
                "POST /v1/user",
                "What is known of a user: features and history.",
                # The only one at once: a row and a history are looked up, and nothing has to be
                # made.
                lambda request, _: self._profile(request),
                GetUser,
                Profile,
            ),
            Lookup(
                "catalogue",
                "GET /v1/catalogue",
                "Columns of the items, and what conditions may ask of them.",
                self._catalogue,
                None,
                Catalogue,
            ),
            Lookup(
                "map",
                "GET /v1/map",
                "The items as points of a plane.",
                self._map,
                None,
                ItemMap,
            ),
        ]

    async def _search_items(self, request: Search, item_id: str) -> FoundItems:
        del item_id
        made = await self._latest()
        retriever = self._versions.main.retriever
        ids = [made.item_ids[row] for row in made.titles.find(request.text, request.k)]
        exact = request.text.strip()
        # An id that somebody pasted may be that of an item beyond those searched.
        if exact and _has_item(retriever.has_item, exact):
            ids = list(dict.fromkeys([exact, *ids]))[: request.k]
        items = []
        for found in ids:
            try:
                item = retriever.item(found)
            except UnknownItemError:  # deleted since
                continue
            items.append(FoundItem(item.item_id, item.display))
        return FoundItems(items)

    async def _search_users(self, request: Search, item_id: str) -> FoundUsers:
        del item_id
        made = await self._latest()
        answers = self._versions.main
        row_by_id = answers.retriever.user_rows.row_by_id
        offsets = answers.retriever.bundle.seen.offsets
        users = []
        for user in made.users.find(request.text.strip(), request.k):
            row = row_by_id.get(user)
            if row is not None:
                # So that somebody who tries the model out finds users with a history.
                users.append(FoundUser(user, int(offsets[row + 1] - offsets[row])))
        return FoundUsers(users)

    def _profile(self, request: GetUser) -> Profile:
        answers = self._versions.main
        retriever = answers.retriever
        user = read_id(request.user_id, retriever.forms.user_id, "user_id")
        is_known = user in retriever.user_rows.row_by_id
        history = []
        # The latest first: events since the export, then those of the log.
        for event in reversed(answers.histories.of(user)):
            try:
                item = retriever.item(event["item_id"])
            except UnknownItemError:
                continue
            kind = event.get("event") or ""
            history.append(PastItem(item.item_id, item.display, kind, event.get("timestamp")))
        stored = retriever.latest_items(user, PAST_ITEMS)
        for item, event in zip(stored, retriever.latest_events(user, PAST_ITEMS)):
            kind = event.get("event") or ""
            history.append(PastItem(item.item_id, item.display, kind, event.get("timestamp")))
        row: dict[str, Any] = {}
        if is_known:
            (row,) = retriever.user_rows.take([user]).to_pylist()
        wanted = [name for name in answers.user_columns if row.get(name) is not None]
        features = {name: row[name] for name in wanted}
        feature = retriever.bundle.encoder.spec.history
        if feature is not None:
            # All of them, as the model reads them; without one the items are what is known.
            stored_events = row.get(feature.column) or []
        else:
            stored_events = [item.item_id for item in reversed(stored)]
        events = [*stored_events, *answers.histories.of(user)]
        # As many as a request may bring back.
        sent = [_as_event(event) for event in events[-MAX_HISTORY:]]
        return Profile(user, is_known, features, history[:PAST_ITEMS], sent)

    async def _catalogue(self, request: None, item_id: str) -> Catalogue:
        del request, item_id
        made = await self._latest()
        # Versions come and go without a change of the items.
        return msgspec.structs.replace(made.catalogue, versions=self._versions.list().versions)

    async def _map(self, request: None, item_id: str) -> ItemMap:
        del request, item_id
        return (await self._latest()).item_map

    async def _latest(self) -> Made:
        """Returns what was made of the bundle that answers now.

        After changes it is made anew, and what was made before them answers until that is done.
        """
        # While this waited another version may have become the main one: then it is made once more.
        while True:
            answers = self._versions.main
            made = self._made
            if made is not None and made.answers() is answers:
                is_old = time.monotonic() - made.moment > REMAKE_SECONDS
                if is_old and made.changes != answers.retriever.changes:
                    self._begin(answers)
                return made
            # One request that goes away does not end what others wait for.
            await asyncio.shield(self._begin(answers))

    def _begin(self, answers: Answers) -> asyncio.Task[None]:
        """Returns the work that is going on, begun now where there is none."""
        if self._making is None or self._making.done():
            self._making = asyncio.create_task(self._make(answers))
        return self._making

    async def _make(self, answers: Answers) -> None:
        self._made = await asyncio.to_thread(make, answers)


def _as_event(event: Any) -> str | Event:
    """Returns a stored event, an id or a mapping, as a request has it."""
    if not isinstance(event, dict):
        return event
    moment = event.get("timestamp")
    if moment is not None:
        # A number would be read in the unit of the log.
        moment = datetime.datetime.fromtimestamp(moment, datetime.UTC).isoformat()
    return Event(item_id=event["item_id"], event=event.get("event"), timestamp=moment)


def make(answers: Answers) -> Made:
    """Returns the search index, the columns and the map of a bundle as it is now."""
    retriever = answers.retriever
    changes = retriever.changes
    items = retriever.items()
    counts = _counts(answers, items["item_id"])
    titles = item_titles(items, ())
    ids = items["item_id"].to_pylist()
    order = np.argsort(-counts, kind="stable")[:MAX_SEARCHED].tolist()
    users = list(retriever.user_rows.row_by_id)
    events = np.diff(retriever.bundle.seen.offsets)[: len(users)]
    return Made(
        weakref.ref(answers),
        changes,
        time.monotonic(),
        [ids[row] for row in order],
        Texts(f"{titles[row]} {ids[row]}" for row in order),
        Prefixes(users, events),
        _make_catalogue(answers, items),
        _make_map(answers, items, titles, counts),
    )


def _has_item(has_item: Callable[[str], bool], text: str) -> bool:
    """Whether a text is the id of an item; a text that can be none is not."""
    try:
        return has_item(text)
    except ValueError:
        return False


def _counts(answers: Answers, ids: pa.ChunkedArray) -> np.ndarray:
    """Returns the training rows of items, int64 [N]; 0 of those that came since."""
    bundle = answers.retriever.bundle
    rows = pc.index_in(ids, value_set=bundle.items["item_id"].combine_chunks())
    rows = pc.fill_null(rows, -1).to_numpy()
    # One more, which the row -1 of an item that came later points to.
    known = np.concatenate([bundle.counts, [0]])
    return known[rows]


def _make_catalogue(answers: Answers, items: pa.Table) -> Catalogue:
    retriever = answers.retriever
    bundle = retriever.bundle
    columns = []
    for name in items.column_names:
        if name != "item_id":
            columns.append(describe_column(name, items[name], retriever.forms))
    return Catalogue(
        answers.version,
        len(items),
        len(retriever.user_rows.row_by_id),
        title_column(items.column_names),
        columns,
        bundle.encoder.spec.history is not None,
        # The index has one dimension more than the vectors where it takes popularity into the
        # product.
        bundle.index.dim > bundle.vectors.shape[1],
    )


def describe_column(name: str, column: pa.ChunkedArray, forms: Forms) -> Column:
    """Returns the kind of a display column, and the values that conditions may ask for.

    Args:
        name: Name of the column.
        column: Values of all items.
        forms: Forms of the log.
    """
    kind = _kind_of(name, column, forms)
    described = Column(name, kind, OPERATORS[kind])
    # A range says more of them than the most frequent values.
    if kind in ("number", "time"):
        ends = pc.min_max(column).as_py()
        described.low = ends["min"]
        described.high = ends["max"]
        return described
    values = plain_text(column)
    if kind == "list":
        # Tags that the log has as one text, "a|b".
        if name in forms.separators:
            values = pc.split_pattern(values, forms.separators[name])
        values = pc.list_flatten(values)
        if pa.types.is_string(values.type):
            values = pc.utf8_trim_whitespace(values)
    if pa.types.is_nested(values.type):
        return described
    counted = pc.value_counts(values.drop_null())
    # A column of titles has as many values as items: none of them is worth a button.
    if len(counted) <= MAX_COUNTED:
        names = counted.field("values").to_pylist()
        order = np.argsort(-counted.field("counts").to_numpy(), kind="stable")
        described.values = [names[row] for row in order[:OFFERED_VALUES].tolist()]
    return described


def _kind_of(name: str, column: pa.ChunkedArray, forms: Forms) -> Kind:
    kind = column.type
    # What a column is used for decides, before what it is stored as: times are often numbers.
    form = forms.contract.columns.get(f"item.{name}")
    if pa.types.is_temporal(kind) or isinstance(form, TimeForm) or name in forms.units:
        return "time"
    if is_list(kind) or name in forms.separators:
        return "list"
    if pa.types.is_boolean(kind):
        return "flag"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return "number"
    return "text"


def _make_map(answers: Answers, items: pa.Table, titles: list[str], counts: np.ndarray) -> ItemMap:
    rows = evenly_spaced(np.arange(len(items)), MAP_ITEMS)
    sample = items.take(pa.array(rows))
    ids = sample["item_id"].to_pylist()
    shown = [titles[row][:MAX_TITLE] for row in rows.tolist()]
    labels: list[str] = []
    column = ""
    shares = (0.0, 0.0)
    drawn = {"places": "", "groups": "", "nearest": "", "count": 0}
    # Without two items there is nothing to move to.
    if len(rows) > 1:
        vectors = np.asarray(answers.retriever.item_vectors(ids), np.float32)
        plane = project(vectors)
        shares = plane.shares
        grouping = choose_columns(sample, (), counts[rows])[0]
        column = grouping.column
        labels = list(grouping.labels)
        drawn = map_data(plane, grouping, shown, vectors, np.arange(len(rows)))
    return ItemMap(
        answers.version,
        len(items),
        shares,
        column,
        ids,
        shown,
        labels,
        drawn["places"],
        drawn["groups"],
        drawn["nearest"],
        drawn["count"],
    )

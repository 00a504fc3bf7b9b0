"""The requests and answers that the page needs beside those of the API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from twotower.serving.types import Event, Id, Request
from twotower.serving.versions.types import VersionInfo

MAX_TEXT = 200  # letters of a text to search for
MAX_FOUND = 50  # items or users of one search

Kind = Literal["text", "number", "list", "time", "flag"]


class Search(Request):
    """A request for the items or users that a text names.

    Attributes:
        text: Beginning of a word of the title or of the id; "" finds the most frequent ones.
        k: Greatest number of them.
    """

    text: Annotated[str, Meta(max_length=MAX_TEXT)] = ""
    k: Annotated[int, Meta(ge=1, le=MAX_FOUND)] = 10


class FoundItem(Struct):
    """An item.

    Attributes:
        item_id: Id of the item.
        display: Display columns of the item.
    """

    item_id: str
    display: Mapping[str, Any]


class FoundItems(Struct):
    """The items of a search, the most popular of equally good ones first.

    Attributes:
        items: Items.
    """

    items: list[FoundItem]


class FoundUser(Struct):
    """A user.

    Attributes:
        user_id: Id of the user.
        events: Number of the user's items that the bundle has.
    """

    user_id: str
    events: int


class FoundUsers(Struct):
    """The users of a search.

    Attributes:
        users: Users.
    """

    users: list[FoundUser]


class GetUser(Request):
    """A request for what is known of a user.

    Attributes:
        user_id: Id of the user.
    """

    user_id: Id


class PastItem(Struct, omit_defaults=True):
    """An item of a user's history.

    Attributes:
        item_id: Id of the item.
        display: Display columns of the item.
        event: Kind of the event; "" where the log has none.
        timestamp: Time of the event in seconds since the epoch; None where the log has none.
    """

    item_id: str
    display: Mapping[str, Any]
    event: str = ""
    timestamp: float | None = None


class Profile(Struct):
    """What is known of a user.

    Attributes:
        user_id: Id of the user.
        known: Whether the user was known when the bundle was made.
        features: Raw features that are stored.
        history: Items of the user, the latest first.
        events: Events of the user, the latest last, as a request may bring them back: what
            `history` has once may have happened several times.
    """

    user_id: str
    known: bool
    features: Mapping[str, Any]
    history: list[PastItem]
    events: list[str | Event]


class Column(Struct, omit_defaults=True):
    """A display column, and how conditions ask for it.

    Attributes:
        name: Name of the column.
        kind: Kind of its values.
        operators: Operators that conditions may have.
        values: Frequent values, the most frequent first; none of numbers and times.
        low: Least value of a number or a time.
        high: Greatest value.
    """

    name: str
    kind: Kind
    operators: list[str]
    values: list[Any] = msgspec.field(default_factory=list)
    low: Any = None
    high: Any = None


class Catalogue(Struct):
    """What there is to choose from.

    Attributes:
        model_version: Version of the bundle.
        items: Number of items now.
        users: Number of known users.
        title: Display column of the titles; "" where ids are all there is.
        columns: Display columns.
        reads_history: Whether the model reads what users did.
        has_popularity: Whether lists take a popularity_weight.
        versions: Versions that requests may name.
    """

    model_version: str
    items: int
    users: int
    title: str
    columns: list[Column]
    reads_history: bool
    has_popularity: bool
    versions: list[VersionInfo] = msgspec.field(default_factory=list)


class ItemMap(Struct):
    """The items as points of a plane.

    Attributes:
        model_version: Version of the bundle.
        items: Number of items now, of which the map may show a sample.
        shares: Share of the variance of the vectors that each axis shows.
        column: Column whose values are the groups.
        item_ids: Ids of the items of the map, M of them.
        titles: Titles of the items.
        labels: Names of the groups.
        places: Base64 of uint16 [M, 2], positions from 0 to 65535.
        groups: Base64 of uint8 [M], group of each item.
        nearest: Base64 of uint16 [M, count], items of the map that are nearest by cosine.
        count: Number of the nearest items.
    """

    model_version: str
    items: int
    shares: tuple[float, float]
    column: str
    item_ids: list[str]
    titles: list[str]
    labels: list[str]
    # Base64, not lists of numbers: less than half of the text, and nothing to parse in the browser.
    places: str
    groups: str
    nearest: str
    count: int

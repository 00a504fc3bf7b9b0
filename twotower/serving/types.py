"""The requests and answers of the API, as types that are read, checked, written and documented.

Names are those of `twotower.Retriever`'s arguments, so that its refusals name fields of a request.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

MAX_K = 1_000  # items of a list, those that `offset` leaves out included
MAX_BATCH = 64  # requests of a batch
MAX_WINDOW = 1_000  # items that are re-ranked together
MAX_HISTORY = 1_000  # events of a request
MAX_IDS = 1_000  # ids that a request allows, denies or names as examples
MAX_PAIRS = 10_000  # pairs of a match
MAX_ITEMS = 1_000  # items that are changed together
MAX_EVENTS = 1_000  # events that are sent together
MAX_COLUMNS = 1_000  # features of a request, or columns of an item
MAX_CONDITIONS = 64
MAX_BOOSTS = 16  # boosts, or promotions, of a request
MAX_CAPS = 8  # columns whose values are capped
MAX_LETTERS = 512  # of an id, a kind of event or the name of a column

Text = Annotated[str, Meta(min_length=1, max_length=MAX_LETTERS)]
# Both forms, as shops send either; whether it is one of the log's is read later, by its contract.
Id = Text | Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Ids = Annotated[list[Id], Meta(max_length=MAX_IDS)]
Examples = Annotated[list[Id], Meta(min_length=1, max_length=MAX_IDS)]
Time = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | float | Text
Columns = Annotated[dict[Text, Any], Meta(max_length=MAX_COLUMNS)]
Conditions = (
    Annotated[dict[Text, Any], Meta(max_length=MAX_CONDITIONS)]
    | Annotated[list[Any], Meta(max_length=MAX_CONDITIONS)]
)
Source = Literal["model", "similar", "popular", "new", "promoted", "explored"]


# Unknown fields are refused: a misspelt option would go unnoticed. gc=False: requests hold no
# cycles, and Python's collector need not look at them.
class Request(Struct, forbid_unknown_fields=True, kw_only=True, gc=False):
    """Any request."""


class Event(Request):
    """An event of a user with an item.

    Attributes:
        item_id: Id of the item.
        event: Kind of the event, such as "purchase".
        timestamp: Time of the event, in the form of the log.
    """

    item_id: Id
    event: Text | None = None
    timestamp: Time | None = None


History = Annotated[list[Id | Event], Meta(max_length=MAX_HISTORY)]


class Listing(Request):
    """What every list takes.

    Attributes:
        k: Length of the list.
        offset: Number of the best items that are left out before.
        where: Conditions on display columns: {"brand": ["a", "b"]}, or [column, operator, value]
            each, such as ["price", "<=", 20].
        allow: Ids of the only items that may come back.
        deny: Ids of items to leave out.
        columns: Display columns to return; all by default.
        model_version: Version of the bundle that is to answer, or name of the bundle; by default
            the one that the server has chosen for the user.
    """

    k: Annotated[int, Meta(ge=1, le=MAX_K)] = 10
    offset: Annotated[int, Meta(ge=0, le=MAX_K)] = 0
    where: Conditions | None = None
    allow: Ids | None = None
    deny: Ids = msgspec.field(default_factory=list)
    columns: Annotated[list[Text], Meta(max_length=MAX_COLUMNS)] | None = None
    model_version: Text | None = None


class Boost(Request):
    """A change of the scores of items that meet conditions: by `factor`, or by `add`.

    Attributes:
        where: Conditions, as in `Listing`.
        factor: Factor of their scores; above 1 it raises those below 0 too, which it divides.
        add: Addend of their scores.
    """

    where: Conditions
    factor: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    add: Annotated[float, Meta(ge=-1e6, le=1e6)] | None = None

    def __post_init__(self):
        if (self.factor is None) == (self.add is None):
            raise ValueError("give either factor or add")


class Promotion(Request):
    """Positions that are kept for items that meet conditions, the best of them by score.

    Attributes:
        where: Conditions, as in `Listing`.
        percent: Share of the positions: 20 are positions 5, 10, 15 and so on.
    """

    where: Conditions
    percent: Annotated[float, Meta(gt=0, le=100)]


class Retrieve(Listing):
    """A request for the items that suit a user, or somebody of whom only clicks are known.

    Attributes:
        user_id: Id of the user, known or not.
        session_id: Id of the session of somebody without a user_id, by which a version is chosen.
        features: Raw user features; they take the place of those that are stored.
        history: Events of the user, ids or mappings, the latest last, in the place of those that
            are stored or were sent.
        exclude_seen: Whether to leave out the user's items.
        popularity_weight: Factor of the log of an item's training rows in its score.
        diversity: Weight of difference from the items before, from 0 to 1 (MMR).
        window: Number of the best items by score that `diversity`, or the server's re-ranker,
            reorders; by default five times `k`. Those behind them follow by score, and `note` says
            so. Pages fit together where it is the same: for pages of different lengths write it.
        like: Items to find similar ones of, in the place of a user's.
        unlike: Items to stay away from, with `like`.
        boosts: Changes of the scores of some items, one after another.
        promotions: Positions that are kept for some items; their percentages sum to 100 at most.
        max_per: Column -> greatest number of items of the list with one value in it.
        explore: Probability that a position shows an item drawn from the best hundred that are
            left.
        seed: Seed of the exploration: the same request with it has the same list, page by page.
        reasons: Whether items come with the event of the user that speaks most for each.
    """

    user_id: Id | None = None
    session_id: Id | None = None
    features: Columns = msgspec.field(default_factory=dict)
    history: History | None = None
    exclude_seen: bool = True
    popularity_weight: Annotated[float, Meta(ge=-1e6, le=1e6)] = 0.0
    diversity: Annotated[float, Meta(ge=0, le=1)] | None = None
    window: Annotated[int, Meta(ge=1, le=MAX_WINDOW)] | None = None
    like: Examples | None = None
    unlike: Ids = msgspec.field(default_factory=list)
    boosts: Annotated[list[Boost], Meta(max_length=MAX_BOOSTS)] = msgspec.field(
        default_factory=list
    )
    promotions: Annotated[list[Promotion], Meta(max_length=MAX_BOOSTS)] = msgspec.field(
        default_factory=list
    )
    max_per: Annotated[
        dict[Text, Annotated[int, Meta(ge=1, le=MAX_K)]], Meta(max_length=MAX_CAPS)
    ] = msgspec.field(default_factory=dict)
    explore: Annotated[float, Meta(ge=0, le=1)] = 0.0
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    reasons: bool = False


class EncodeUser(Request):
    """A request for the vector of a user.

    Attributes:
        user_id: As in `Retrieve`.
        session_id: As in `Retrieve`.
        features: As in `Retrieve`.
        history: As in `Retrieve`.
        model_version: As in `Retrieve`.
    """

    user_id: Id | None = None
    session_id: Id | None = None
    features: Columns = msgspec.field(default_factory=dict)
    history: History | None = None
    model_version: Text | None = None


class SimilarItems(Listing, kw_only=True):
    """A request for the items of greatest cosine to one.

    Attributes:
        item_id: Id of the item.
    """

    item_id: Id


class Popular(Listing):
    """A request for the items with the most training rows."""


class Latest(Listing):
    """A request for the newest items.

    Attributes:
        column: Display column of times or numbers; by default the one of times.
    """

    column: Text | None = None


class Pair(Request):
    """A user and an item.

    Attributes:
        user_id: Id of the user, known or not.
        item_id: Id of the item.
    """

    user_id: Id
    item_id: Id


class Match(Request):
    """A request for the scores of pairs.

    Attributes:
        pairs: Pairs.
        model_version: As in `Retrieve`.
    """

    pairs: Annotated[list[Pair], Meta(min_length=1, max_length=MAX_PAIRS)]
    model_version: Text | None = None


class RetrieveBatch(Request):
    """Several requests in one.

    Attributes:
        requests: Requests.
    """

    requests: Annotated[list[Retrieve], Meta(min_length=1, max_length=MAX_BATCH)]


class EncodeUserBatch(Request):
    """Several requests in one.

    Attributes:
        requests: Requests.
    """

    requests: Annotated[list[EncodeUser], Meta(min_length=1, max_length=MAX_BATCH)]


class SimilarItemsBatch(Request):
    """Several requests in one.

    Attributes:
        requests: Requests.
    """

    requests: Annotated[list[SimilarItems], Meta(min_length=1, max_length=MAX_BATCH)]


class PopularBatch(Request):
    """Several requests in one.

    Attributes:
        requests: Requests.
    """

    requests: Annotated[list[Popular], Meta(min_length=1, max_length=MAX_BATCH)]


class LatestBatch(Request):
    """Several requests in one.

    Attributes:
        requests: Requests.
    """

    requests: Annotated[list[Latest], Meta(min_length=1, max_length=MAX_BATCH)]


class PutItem(Request):
    """An item to add or to replace.

    Attributes:
        columns: Features and display columns of the item; one that is left out is missing.
    """

    columns: Columns = msgspec.field(default_factory=dict)


class NamedItem(PutItem, kw_only=True):
    """An item to add or to replace, with its id.

    Attributes:
        item_id: Id of the item.
    """

    item_id: Id


class PutItems(Request):
    """Items to add or to replace, all or none of them.

    Attributes:
        items: Items.
    """

    items: Annotated[list[NamedItem], Meta(min_length=1, max_length=MAX_ITEMS)]


class SentEvent(Event, kw_only=True):
    """An event that a shop tells the server.

    Attributes:
        event_id: Id of the event: one that was accepted before is not counted again.
        user_id: Id of the user.
        recommendation_id: Id of the answer that it came of, where there was one: the impressions
            are told by it what was shown and taken.
    """

    event_id: Text
    user_id: Id
    recommendation_id: Text | None = None


class Events(Request):
    """Events to remember, all or none of them.

    Attributes:
        events: Events.
    """

    events: Annotated[list[SentEvent], Meta(min_length=1, max_length=MAX_EVENTS)]


class Reason(Struct, omit_defaults=True):
    """The event of a user without which an item would lose most of its score.

    Attributes:
        item_id: Id of the item of the event.
        lost: Part of the score that the event makes up.
        event: Kind of the event, where it is known.
        timestamp: Time of the event in seconds since 1970, where it is known.
    """

    item_id: str
    lost: float
    event: str | None = None
    timestamp: int | None = None


class Item(Struct, gc=False, omit_defaults=True):
    """An item of a list.

    Attributes:
        item_id: Id of the item.
        score: Dot product, cosine of similar items, training rows of popular ones, time of new
            ones; with its boosts.
        source: What chose the item.
        display: Display columns of the item.
        reason: Event that speaks most for it, where `reasons` asked for one and one does.
        propensity: Probability of the item at its position, after those before it; 1 without
            exploration.
        best: Whether the item would be there without exploration.
    """

    item_id: str
    score: float | None
    source: Source
    display: Mapping[str, Any]
    reason: Reason | None = None
    propensity: float = 1.0
    best: bool = True


class Answer(Struct, omit_defaults=True):
    """A list of items, best first.

    Attributes:
        recommendation_id: Id of this answer, to be sent back with what came of it.
        model_version: Version of the bundle that answered.
        items: Items.
        known: Whether the user was known when the bundle was made.
        note: Sentence on what in the request found nothing.
        missing_shards: Shards of a divided bundle that did not answer: their items have no part in
            the list.
    """

    recommendation_id: str
    model_version: str
    items: list[Item]
    known: bool = True
    note: str = ""
    missing_shards: list[int] = msgspec.field(default_factory=list)


class Vector(Struct):
    """The vector of a user.

    Attributes:
        recommendation_id: Id of this answer.
        model_version: Version of the bundle that answered.
        known: Whether the user was known when the bundle was made.
        vector: Numbers whose dot product with an item's vector is its score.
    """

    recommendation_id: str
    model_version: str
    known: bool
    vector: list[float]


class Scores(Struct, omit_defaults=True):
    """The scores of pairs, in their order.

    Attributes:
        recommendation_id: Id of this answer.
        model_version: Version of the bundle that answered.
        scores: Dot products.
        probabilities: Probabilities that the labels are 1, of a model that was trained on labels.
    """

    recommendation_id: str
    model_version: str
    scores: list[float]
    probabilities: list[float] | None = None


class AnswerBatch(Struct):
    """Answers in the order of their requests.

    Attributes:
        answers: Answers.
    """

    answers: list[Answer]


class VectorBatch(Struct):
    """Answers in the order of their requests.

    Attributes:
        answers: Answers.
    """

    answers: list[Vector]


class Changed(Struct, omit_defaults=True):
    """A change that is on the disk, and that later answers show.

    Attributes:
        model_version: Version of the bundle that was changed.
        changed: Number of items that were added, replaced or deleted.
        items: Number of items now.
        refused: Versions that could not make the change, with the reason; the others have made it.
    """

    model_version: str
    changed: int
    items: int
    refused: dict[str, str] = msgspec.field(default_factory=dict)


class Accepted(Struct):
    """Events that are on the disk, and that the next request of their users shows.

    Attributes:
        accepted: Number of events that are new.
        duplicates: Number of events that were accepted before.
    """

    accepted: int
    duplicates: int


class EraseUser(Request):
    """A user whose events are to be deleted.

    Attributes:
        user_id: Id of the user.
    """

    user_id: Id


class Erased(Struct):
    """What was deleted of a user for good.

    Attributes:
        events: Number of events.
        impressions: Number of rows of what was shown.
    """

    events: int
    impressions: int


class Info(Struct):
    """What is served.

    Attributes:
        model_version: Version of the bundle.
        date: Date of the export.
        items: Number of items now.
        users: Number of known users.
        changes: Number of changes since the bundle was written.
        dim: Width of the vectors.
        index: Kind of index.
        columns: Display columns.
        user_columns: Names that `features` may have.
        figures: Figures of quality that were measured at the export.
        data: Rows of each part of the log, and its first and last times.
    """

    model_version: str
    date: str
    items: int
    users: int
    changes: int
    dim: int
    index: str
    columns: list[str]
    user_columns: list[str]
    figures: dict[str, Any]
    data: dict[str, Any]


class Status(Struct, omit_defaults=True):
    """Whether the server answers.

    Attributes:
        status: "ok", or what it waits for.
        differences: Golden requests that are answered otherwise than at the export.
        missing_shards: Shards of a divided bundle that do not answer.
    """

    status: str
    differences: list[str] = msgspec.field(default_factory=list)
    missing_shards: list[int] = msgspec.field(default_factory=list)


class Problem(Struct, omit_defaults=True):
    """A refusal (RFC 9457).

    Attributes:
        title: Kind of problem.
        status: Status of the answer.
        detail: What is wrong, in a sentence.
        type: Always "about:blank": the status says the kind.
        field: Field of the request that is wrong.
        value: Its value, shortened.
        cure: What to do.
    """

    title: str
    status: int
    detail: str
    type: str = "about:blank"
    field: str = ""
    value: str = ""
    cure: str = ""


def field_names() -> set[str]:
    """Returns the names of all fields of requests and answers."""
    # Those of this module, which holds all requests but those of the page and of administration.
    kinds = [kind for kind in globals().values() if isinstance(kind, type)]
    structs = [kind for kind in kinds if issubclass(kind, Struct)]
    return {name for kind in structs for name in kind.__struct_fields__}

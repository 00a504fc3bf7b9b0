"""The part of the report on ten people: what they had, what they get, what was right, and why."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from twotower.core.arrays import Ragged
from twotower.evaluation.queries import Queries, make_queries
from twotower.evaluation.report.page import Section, bidi_text, escape
from twotower.index.exact import top_k
from twotower.pipeline.batches import SPANS
from twotower.pipeline.prepare import PreparedData
from twotower.retrieval.embed import embed_rows
from twotower.retrieval.explain import explain
from twotower.towers.two_tower import TwoTower, Weights

BUSY = 4  # people of each kind; the others are in the middle and new
MEDIAN = 3
NEW = 3
LISTED = 10  # items of a list
REMEMBERED = 10  # events of a history that are shown, the latest
REASONS = 3  # events that speak for an item


@dataclasses.dataclass(frozen=True)
class Reason:
    """An event of a history, and what the first item of the list owes to it.

    Attributes:
        title: Title of the item of the event.
        lost: Score that the first item loses without the event.
    """

    title: str
    lost: float


@dataclasses.dataclass(frozen=True)
class Person:
    """One query, in words.

    Attributes:
        name: Id of the user.
        kind: "busy", "in the middle", "new", who had nothing before, or "few events".
        seen: Number of items that the user had.
        history: Titles of the latest of these, the latest first.
        titles: Titles of the list, best first.
        is_right: Whether each of them was right.
        wanted: Titles of right answers that are not in the list, the first of them.
        num_wanted: Number of all right answers that are not in the list.
        score: Score of the first item.
        reasons: Events that speak for the first item, the strongest first.
    """

    name: str
    kind: str
    seen: int
    history: Sequence[str]
    titles: Sequence[str]
    is_right: Sequence[bool]
    wanted: Sequence[str]
    num_wanted: int
    score: float
    reasons: Sequence[Reason]


def choose_queries(queries: Queries) -> list[tuple[int, str]]:
    """Returns the positions of ten queries with the kind of each: busy, in the middle, new.

    Only queries with an answer, one a user, and of equals the first. Where nobody is new the last
    are those of the fewest events, and are called so.
    """
    # One query each: ten of one busy user would show nobody else.
    _, first = np.unique(queries.user, return_index=True)
    asked = np.sort(first[queries.relevant.lengths[first] > 0])
    seen = queries.seen.lengths[queries.seen_row[asked]]
    order = asked[np.argsort(-seen, kind="stable")]
    # Of so few there is no middle.
    if len(order) <= BUSY + MEDIAN + NEW:
        return [(int(query), "shown") for query in order]
    middle = (len(order) - MEDIAN) // 2
    chosen = [(query, "busy") for query in order[:BUSY]]
    chosen += [(query, "in the middle") for query in order[middle : middle + MEDIAN]]
    for query in order[::-1][:NEW]:
        is_new = not queries.seen.lengths[queries.seen_row[query]]
        chosen.append((query, "new" if is_new else "few events"))
    return [(int(query), kind) for query, kind in chosen]


def describe_people(
    prepared: PreparedData,
    model: TwoTower,
    weights: Weights,
    items: np.ndarray,
    titles: Sequence[str],
    split: str,
    targets: str = "",
) -> list[Person]:
    """Returns ten people of a split with their lists.

    Args:
        prepared: Data of the run.
        model: Pair of towers.
        weights: Their weights.
        items: Vectors of the items, float32 [N, D].
        titles: Titles of the items.
        split: Rows to find.
        targets: Those of each user, see `make_queries`.
    """
    kind = prepared.config.evaluation.query
    # Right answers that they had before are masked in the lists, and would be shown as missed.
    queries = make_queries(prepared, split, kind, targets=targets).without_seen()
    chosen = choose_queries(queries)
    rows = np.array([query for query, _ in chosen], np.int64)
    if not len(rows):
        return []
    part = queries.take(rows)
    # As at the time of the query: a history holds nothing that came later.
    features = prepared.user_features(part.user, part.context)
    vectors = embed_rows(model, weights, "user", features)
    seen = part.seen_lists(slice(0, len(part)))
    scores, lists = _lists(vectors, items, seen)
    times = prepared.positives(split).timestamp
    names = prepared.users["user_id"]
    people = []
    for number, (_, kind_of_user) in enumerate(chosen):
        # Places that are left are -1, where somebody has seen nearly all items.
        listed = lists[number][lists[number] >= 0]
        relevant = part.relevant[number]
        reasons: list[Reason] = []
        if len(listed):
            one = {name: values[number : number + 1] for name, values in features.items()}
            time = None if times is None else int(times[part.row[number]])
            spans = part.context.get(SPANS)
            span = None if spans is None else spans[number : number + 1]
            # Of the first item alone: leaving out each event of a history takes a run of the tower
            # for each.
            reasons = _reasons(prepared, model, weights, one, span, time, items[listed[:1]], titles)
        missed = relevant[~np.isin(relevant, listed)]
        people.append(
            Person(
                name=str(names[int(part.user[number])].as_py()),
                kind=kind_of_user,
                seen=len(seen[number]),
                history=[titles[int(row)] for row in seen[number][::-1][:REMEMBERED]],
                titles=[titles[int(row)] for row in listed],
                is_right=np.isin(listed, relevant).tolist(),
                wanted=[titles[int(row)] for row in missed[:LISTED]],
                num_wanted=len(missed),
                score=float(scores[number][0]) if len(listed) else 0.0,
                reasons=reasons,
            )
        )
    return people


def _lists(users: np.ndarray, items: np.ndarray, seen: Ragged) -> tuple[np.ndarray, np.ndarray]:
    # Exactly, as the metrics are: an index may miss what is shown here as missed by the model.
    scores, rows = top_k(users, items, min(LISTED, len(items)), exclude=seen)
    return np.asarray(scores), np.asarray(rows).astype(np.int64)


def _reasons(
    prepared: PreparedData,
    model: TwoTower,
    weights: Weights,
    features: dict[str, np.ndarray],
    span: np.ndarray | None,
    time: int | None,
    item: np.ndarray,
    titles: Sequence[str],
) -> list[Reason]:
    """Returns the events of one query's history that speak most for an item."""
    history = prepared.encoder.spec.history
    if prepared.histories is None or history is None or span is None:
        return []
    events = prepared.histories.requests_at(prepared.raw, span)
    columns: dict[str, pa.Array] = {history.column: events}
    # The age of an event is counted from the time of the query.
    if time is not None and history.request_gap:
        columns["timestamp"] = pa.array([time])

    def encode(rows: pa.Table) -> Mapping[str, np.ndarray]:
        # All but the history is as the query has it.
        repeated = {name: np.repeat(values, len(rows), 0) for name, values in features.items()}
        return repeated | prepared.encoder.encode("user", rows, [history.name])

    embed = functools.partial(embed_rows, model, weights, "user")
    lost = explain(history, encode, embed, pa.table(columns), item)[:, 0]
    ids = _item_ids(events.flatten())
    row_of = {item_id: row for row, item_id in enumerate(prepared.items["item_id"].to_pylist())}
    reasons: dict[str, Reason] = {}
    for event in np.argsort(-lost, kind="stable"):
        if len(reasons) == REASONS:
            break
        # A view and a purchase of one item would be read as one line printed twice.
        if ids[event] in reasons:
            continue
        row = row_of.get(ids[event])
        # An item of a history may have left the corpus, and has no title then.
        title = ids[event] if row is None else titles[row]
        reasons[ids[event]] = Reason(title, float(lost[event]))
    return list(reasons.values())


def _item_ids(events: pa.Array) -> list[str]:
    if pa.types.is_struct(events.type):
        events = events.field("item_id")
    return events.to_pylist()


def people_section(people: Sequence[Person], *, reads_history: bool) -> Section:
    """Returns the people of the report.

    Args:
        people: What `describe_people` returned.
        reads_history: Whether the model reads the history of a user.
    """
    cards = []
    for number, person in enumerate(people):
        # One is open, so that somebody who prints or skims the page sees what is in them.
        cards.append(_card(person, is_open=number == 0, reads_history=reads_history))
    lead = (
        "Figures are means; these are people. The busiest, some in the middle, and those with the "
        "fewest events: would you have shown them this?"
    )
    if people and not any(person.kind == "new" for person in people):
        fewest = min(person.seen for person in people)
        lead += f" Nobody here is new: everybody had {_count_items(fewest)} or more before."
    block = f'<div class="people">{"".join(cards)}</div>'
    return Section("people", "Ten people", lead, [block])


def _card(person: Person, *, is_open: bool, reads_history: bool) -> str:
    right = sum(person.is_right)
    heading = (
        f'User {bidi_text(person.name)} <span class="aside">{escape(person.kind)}: '
        f"{_count_items(person.seen)} before; {right} of {len(person.titles)} right</span>"
    )
    listed = []
    for title, is_right in zip(person.titles, person.is_right):
        mark = ' <span class="right">✓ right</span>' if is_right else ""
        listed.append(f"<li>{bidi_text(title)}{mark}</li>")
    before = "".join(f"<li>{bidi_text(title)}</li>" for title in person.history)
    history = f"<ul>{before}</ul>" if before else "<p>Nothing: nothing is known of them.</p>"
    wanted = "".join(f"<li>{bidi_text(title)}</li>" for title in person.wanted)
    columns = (
        f'<div class="columns"><div><h4>Had before, the latest first</h4>{history}</div>'
        f"<div><h4>Recommended, best first</h4><ol>{''.join(listed)}</ol></div></div>"
    )
    if wanted:
        # The busy took a hundred: ten of them unmarked would look like all.
        share = ""
        if person.num_wanted > len(person.wanted):
            share = f" (the first {len(person.wanted)} of {person.num_wanted:,})"
        columns += f"<h4>Took, and not in the list{share}</h4><ul>{wanted}</ul>"
    columns += _why(person, reads_history=reads_history)
    opened = " open" if is_open else ""
    return (
        f'<details class="person"{opened}><summary>{heading}</summary>'
        f'<div class="inside">{columns}</div></details>'
    )


def _count_items(number: int) -> str:
    if not number:
        return "nothing"
    return "1 item" if number == 1 else f"{number:,} items"


def _why(person: Person, *, reads_history: bool) -> str:
    """Returns why the first item came, as far as the history tells."""
    if not person.titles:
        return ""
    title = "<h4>Why the first came</h4>"
    # Said, and not left out: readers look for the reasons, and would take silence for a defect.
    if not reads_history:
        return (
            f"{title}<p>This model knows people by their id and columns, not by their history: no "
            "single event can be left out.</p>"
        )
    if not person.reasons:
        return f"{title}<p>The history is empty: it came by what holds for everybody.</p>"
    rows = []
    for reason in person.reasons:
        rows.append(f"<li>{reason.lost:+.3f} by {bidi_text(reason.title)}</li>")
    said = (
        f"<p>Its score is {person.score:.3f}. These events of the history added most to it, one "
        "for each item, each measured by leaving it out alone:</p>"
    )
    return f"{title}{said}<ul>{''.join(rows)}</ul>"

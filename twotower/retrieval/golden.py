"""Golden answers: requests with the lists that a bundle gave when it was written.

A server makes the lists again before it answers anybody. Another library, processor or file that
ranks differently is seen then, and not by the customers. The requests are made of the bundle's own
ids, and their lists of its items alone, before any change to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from twotower.core.arrays import Ragged, evenly_spaced
from twotower.features.encoder import Encoder
from twotower.retrieval.bundle import Bundle
from twotower.retrieval.live.segments import BaseSegment, MemTable
from twotower.retrieval.live.snapshot import Snapshot
from twotower.retrieval.users import UserRows

REQUESTS = 64
OF_USERS = 24  # requests of known users
OF_ITEMS = 16  # requests of similar items; the others are made rows
HISTORY = 3  # items in the history of a made row
K = 10
TOLERANCE = 1e-3  # of a score, relative to the largest where that is above 1


class Request(TypedDict, total=False):
    """One golden request: a known user, an item, or a made row of user features.

    Attributes:
        user: Id of a user.
        item: Id of an item, whose similar items are asked for.
        row: Raw user features.
    """

    user: str
    item: str
    row: dict[str, Any]


def make(bundle: Bundle) -> dict[str, Any]:
    """Returns golden requests to a bundle, with their answers, as JSON.

    Args:
        bundle: Bundle that is about to be written, or was loaded.
    """
    requests = _make_requests(bundle)
    return {"k": K, "requests": requests, "answers": answer(bundle, requests)}


def differences(bundle: Bundle, golden: Mapping[str, Any]) -> list[str]:
    """Returns a sentence on each golden request that a bundle answers otherwise than was recorded.

    Args:
        bundle: Bundle that was loaded.
        golden: Requests and answers, as `make` returns them.
    """
    told = []
    answers = answer(bundle, golden["requests"])
    for request, recorded, now in zip(golden["requests"], golden["answers"], answers):
        difference = _difference(recorded, now)
        if difference:
            ((kind, value),) = request.items()
            told.append(f"{kind} {value!r}: {difference}")
    return told


def answer(bundle: Bundle, requests: Sequence[Request]) -> list[list[tuple[str, float]]]:
    """Returns the list of each request: id and score of each item, best first."""
    snapshot = _snapshot(bundle)
    users = UserRows(bundle.encoder, bundle.users)
    row_by_item = {item: row for row, item in enumerate(bundle.items["item_id"].to_pylist())}
    answers = []
    for request in requests:
        exclude = np.zeros(0, np.int32)
        # By the stored vectors, as a server answers: the tower is looked at by the made rows.
        if "user" in request:
            row = users.row_by_id[request["user"]]
            query = bundle.user_vectors[row : row + 1]
            exclude = bundle.seen[row]
        elif "item" in request:
            row = row_by_item[request["item"]]
            query = snapshot.vectors(np.array([row]))
            query = query / max(float(np.linalg.norm(query)), 1e-30)
            exclude = np.array([row], np.int32)
        else:
            table = users.read([request.get("row")])
            query = bundle.towers.embed("user", users.encode(table))
        if not query.any():
            # Somebody of whom the tower reads nothing: searches refuse such a query.
            answers.append([])
            continue
        scores, positions = snapshot.search(
            query, K, exclude=Ragged.one(exclude), cosine="item" in request
        )
        is_filled = positions[0] >= 0
        ids = snapshot.item_ids(positions[0][is_filled]).to_pylist()
        answers.append(list(zip(ids, scores[0][is_filled].tolist())))
    return answers


def _make_requests(bundle: Bundle) -> list[Request]:
    requests: list[Request] = []
    for row in evenly_spaced(np.arange(len(bundle.users)), OF_USERS).tolist():
        requests.append({"user": bundle.users["user_id"][row].as_py()})
    items = bundle.items["item_id"].to_pylist()
    for row in evenly_spaced(np.arange(len(items)), OF_ITEMS).tolist():
        requests.append({"item": items[row]})
    for number in range(REQUESTS - len(requests)):
        requests.append({"row": _made_row(bundle.encoder, items, number)})
    return requests


def _made_row(encoder: Encoder, items: Sequence[str], number: int) -> dict[str, Any]:
    """Returns user features of nobody: values of vocabularies, and a history of items."""
    row: dict[str, Any] = {"user_id": None}
    for name, words in encoder.spec.to_dict()["user"].items():
        # Never an id of a user: a bundle without users names none of them here.
        if words["type"] != "string" or words["column"] == "user_id":
            continue
        values = encoder.fitted["user", name].require_vocabulary().values
        if len(values):
            row[words["column"]] = values[number % len(values)].as_py()
    history = encoder.spec.history
    if history is not None and items:
        # Other steps for each row, so that histories differ in more than their beginning.
        rows = [number + turn * (1 + number) for turn in range(HISTORY)]
        row[history.column] = [items[position % len(items)] for position in rows]
    return row


def _difference(recorded: Sequence[Sequence[Any]], now: Sequence[tuple[str, float]]) -> str:
    """Returns what differs between two lists; "" where none does but for the order of near ties."""
    if len(recorded) != len(now):
        return f"{len(now)} items in the place of {len(recorded)}"
    largest = max((abs(score) for _, score in recorded), default=0.0)
    tolerance = TOLERANCE * max(1.0, largest)
    scores = dict(now)
    for (item, score), (_, other) in zip(recorded, now):
        if not abs(score - other) <= tolerance:  # NaN too
            return f"a score {other:.4f} in the place of {score:.4f}"
        # At the end of the list another item of the same score may stand in its place.
        is_at_end = abs(score - recorded[-1][1]) <= tolerance
        if item not in scores and not is_at_end:
            return f"item {item!r} is missing"
        if item in scores and not abs(scores[item] - score) <= tolerance:
            return f"item {item!r} has the score {scores[item]:.4f} in the place of {score:.4f}"
    return ""


def _snapshot(bundle: Bundle) -> Snapshot:
    """Returns the items of a bundle as they were written."""
    numbers = np.arange(len(bundle.items), dtype=np.int64)
    base = BaseSegment.build(
        bundle.index,
        bundle.vectors,
        bundle.items,
        bundle.counts,
        numbers,
        num_numbers=len(numbers),
    )
    # As written: changes would be told as differences.
    memtable = MemTable.empty(bundle.vectors.shape[1])
    return Snapshot(base, memtable, 0, 0, 0, {})

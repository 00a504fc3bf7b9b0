"""User ids from files, and recommendations as text or as a Parquet file."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from twotower.core.errors import ConfigError
from twotower.core.fields import check_fields
from twotower.core.files import atomic
from twotower.core.tables import format_table, shorten
from twotower.retrieval.live.conditions import Conditions
from twotower.retrieval.retriever import Recommendation, Retriever

MAX_CELL_WIDTH = 48  # longer texts are cut
LATEST_ITEMS = 5  # latest items of a user, shown above the recommendations


@dataclasses.dataclass(frozen=True)
class ListOptions:
    """Options of the lists that are shown or written.

    Attributes:
        k: Length of the lists.
        exclude_seen: Whether items that a user has seen are left out.
        where: Conditions on the items that may come back.
        rerank: Re-ranker of recommendations, as `parse_rerank` reads it; None for that of the
            bundle's configuration.
    """

    k: int = 10
    exclude_seen: bool = True
    where: Conditions = ()
    rerank: str | None = None


def read_ids(path: Path) -> list[str]:
    """Reads the user ids of a file: a column `user_id`, or a line each in a text file.

    Raises:
        ConfigError: The file is not there, cannot be read, or holds no id.
    """
    if not path.is_file():
        raise ConfigError(f"--users={path} is not a file.")
    try:
        ids = _read_ids(path)
    except (pa.ArrowInvalid, UnicodeError) as error:
        raise ConfigError(f"--users={path} cannot be read: {error}.") from error
    if not ids:
        raise ConfigError(f"--users={path} holds no user id.")
    return ids


def _read_ids(path: Path) -> list[str]:
    if path.suffix == ".parquet":
        table = pq.read_table(path)
    elif path.suffix == ".csv" or path.name.endswith(".csv.gz"):
        # As text: a column of numbers would lose leading zeros.
        as_text = pyarrow.csv.ConvertOptions(column_types={"user_id": "string"})
        table = pyarrow.csv.read_csv(path, convert_options=as_text)
    else:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        # A header is allowed, as if the file were a CSV of one column.
        return [line for line in lines if line and line != "user_id"]
    if "user_id" not in table.column_names:
        raise ConfigError(
            f"--users={path} has no column 'user_id'; it has: {', '.join(table.column_names)}."
        )
    return [str(user) for user in table["user_id"].to_pylist() if user is not None]


def format_items(items: Sequence[Recommendation], *, ranked: bool = True) -> str:
    """Returns a table of items with their display columns.

    Args:
        items: Items, the best first.
        ranked: Whether rank and score stand beside each item.
    """
    if not items:
        return "  (nothing)"
    columns = list(items[0].display)
    header = ["item", *columns]
    rows = [_cells(item, columns) for item in items]
    align = "l" * len(header)
    if ranked:
        # Numbers to the right, on either side of the item.
        header = ["rank", *header, "score"]
        rows = [
            [str(rank), *row, f"{item.score:.4f}"]
            for rank, (item, row) in enumerate(zip(items, rows), 1)
        ]
        align = f"r{align}r"
    return textwrap.indent(format_table(rows, header, align=align), "  ")


def _cells(item: Recommendation, columns: Sequence[str]) -> list[str]:
    return [item.item_id, *(_text(item.display[name]) for name in columns)]


def format_user(retriever: Retriever, user: str, options: ListOptions) -> str:
    """Returns the latest items of a user above a table of recommendations."""
    recommended = retriever.recommend(user, **dataclasses.asdict(options))
    lines = []
    if not recommended.known:
        lines.append(f"User {user} is not known: these are the recommendations for somebody new.\n")
    latest = retriever.latest_items(user, LATEST_ITEMS)
    if latest:
        lines.append(f"Latest items of user {user}, the latest first:")
        events = retriever.latest_events(user, LATEST_ITEMS)
        dated = [_with_event(item, event) for item, event in zip(latest, events)]
        lines.append(format_items(dated, ranked=False) + "\n")
    lines += [f"Recommended to user {user}:", format_items(recommended)]
    return "\n".join(lines)


def _with_event(item: Recommendation, event: Mapping[str, Any]) -> Recommendation:
    """Returns an item with the time and the event by which a user had it among its columns."""
    columns: dict[str, Any] = {}
    if event.get("timestamp") is not None:
        # Python's own dates end with the year 9999, which a log in another unit passes.
        time = np.datetime64(event["timestamp"], "s").astype("datetime64[m]")
        columns["time (UTC)"] = str(time).replace("T", " ")
    if "event" in event:
        columns["event"] = event["event"]
    return dataclasses.replace(item, display=columns | dict(item.display))


def read_rows(text: str, retriever: Retriever) -> list[dict[str, Any]]:
    """Reads raw user features from JSON: one object, or a list of them.

    Args:
        text: JSON, or the path of a .json file of it.
        retriever: Retriever whose user features they are.

    Raises:
        ConfigError: It is not JSON of this form, or names a column that no feature of users reads.
    """
    field = f"--rows={shorten(text, MAX_CELL_WIDTH)}"
    known = retriever.user_rows.columns
    (_, example, *_) = known
    try:
        if text.endswith(".json"):
            text = Path(text).read_text(encoding="utf-8")
        rows = json.loads(text)
    except ValueError as error:
        raise ConfigError(
            f"{field} is not JSON: {error}. Give an object with columns of users, such as "
            f"--rows='{{\"{example}\": ...}}'."
        ) from None
    if isinstance(rows, dict):
        rows = [rows]
    if not rows or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{field} must be a JSON object, or a list of them.")
    for row in rows:
        check_fields(row, known, field)
    return rows


def format_new_user(retriever: Retriever, row: Mapping[str, Any], options: ListOptions) -> str:
    """Returns a table of recommendations for a user of whom only a row of raw features is known."""
    recommended = retriever.recommend(rows=[row], **dataclasses.asdict(options))
    user = shorten(json.dumps(row, ensure_ascii=False), 2 * MAX_CELL_WIDTH)
    return f"Recommended to {user}:\n{format_items(recommended)}"


def format_similar(retriever: Retriever, item: str, options: ListOptions) -> str:
    """Returns an item above a table of the items that are most similar to it."""
    similar = retriever.similar_items(item, options.k, where=options.where)
    header = format_items([retriever.item(item)], ranked=False)
    return f"Items like {item}:\n{header}\n\n{format_items(similar)}"


def write_lists(retriever: Retriever, users: Path, out: Path, options: ListOptions) -> str:
    """Writes the recommendations of many users as Parquet: user_id, rank, item_id, score.

    Args:
        retriever: Retriever that recommends.
        users: File of user ids, see `read_ids`.
        out: File to write, whole or not at all.
        options: Options of the lists.

    Returns:
        A line that says what was written, and for how many unknown users.
    """
    if out.is_dir():
        raise ConfigError(f"--out={out} is a folder; name a Parquet file.")
    # Both paths are checked before the long part.
    ids = read_ids(users)
    lists = retriever.recommend_many(ids, **dataclasses.asdict(options))
    # An earlier file stays whole until the new one is.
    with atomic(out) as temporary:
        pq.write_table(lists, temporary)
    unknown = sum(not retriever.knows(user) for user in ids)
    return (
        f"{out}: {len(lists):,} rows, lists of {options.k} for {len(ids):,} users "
        f"({unknown:,} of them not known)."
    )


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        text = f"{value:.2f}"
    elif isinstance(value, list):
        text = ", ".join(map(str, value))
    else:
        text = str(value)
    return shorten(text, MAX_CELL_WIDTH)

"""User ids from files, and recommendations as text or as a Parquet file."""

from __future__ import annotations

import dataclasses
import json
import re
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import logging

from twotower.config import TableConfig
from twotower.core.arrow import BadValue
from twotower.core.errors import ConfigError, choose, echo
from twotower.core.fields import check_fields
from twotower.core.files import atomic
from twotower.core.ids import IdForm, ReadsIds
from twotower.core.tables import format_table, shorten
from twotower.retrieval.live.conditions import Conditions
from twotower.retrieval.retriever import Recommendation, Retriever

MAX_CELL_WIDTH = 40  # longer texts are cut
# Columns that stand first, by which people know an item.
TITLES = ("title", "name", "item_name", "product_name", "product_title")
# Names of files whose first line holds the names of columns, or that have their own.
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".pq", ".json", ".jsonl", ".ndjson", ".zip", ".xlsx")
FIRST_BYTES = 1 << 16  # bytes in which the first line of a file is looked for
LEAST_KNOWN = 0.5  # share of the users of a file that a bundle should know
UNMATCHED = "unmatched_users"  # the finding that it knows fewer, as `config.data.accept` names it
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


def read_ids(path: Path, form: ReadsIds = IdForm.TEXT) -> list[str]:
    """Reads the user ids of a file of any kind that logs are read from.

    Args:
        path: File with a column `user_id`; in one of text without that name, each line is an id.
        form: Form of the ids.

    Raises:
        ConfigError: The file is not there, cannot be read, or holds no id.
    """
    field = f"--users={path}"
    if not path.is_file():
        raise ConfigError(f"{field} is not a file.")
    column, describe_row = _read_column(path, field)
    try:
        column = form.column(column)
    except BadValue as error:
        location = field if error.row is None else describe_row(error.row)
        shown = "it" if error.value is None else echo(error.value)
        raise ConfigError(f"{location}, column 'user_id': {shown} {error.problem}.") from None
    ids = column.drop_null().to_pylist()
    if not ids:
        raise ConfigError(f"{field} holds no user id.")
    if column.null_count:
        logging.warning(
            "%s: %d of %d rows have no id: left out.", field, column.null_count, len(column)
        )
    return ids


def _read_column(path: Path, field: str) -> tuple[pa.ChunkedArray, Callable[[int], str]]:
    """Returns the ids of a file as they are, and the function that names the place of a row."""
    with pa.input_stream(str(path), compression="detect") as stream:
        first_line = stream.read(FIRST_BYTES).split(b"\n")[0]
    # A plain list, with a header or without, is text of one column whatever its name.
    # Separators, a tab, or bytes that no text has.
    is_table = path.suffix in TABLE_SUFFIXES or re.search(rb"[,;\t|{\x00]", first_line)
    if not is_table:
        lines = _read_lines(path, field)
        return pa.chunked_array(
            [pa.array(lines, pa.string())]
        ), lambda row: f"{field}, id {row + 1}"
    # Loaded here: the readers of all kinds of files take longer to load than a user to answer.
    from twotower.data.sources import frames

    try:
        table, origin = frames.read_table(path, TableConfig(), "users")
    except ConfigError as error:
        # The reader names its option, and the file a second time.
        reason = str(error).replace("config.data.users.path", "--users")
        reason = reason.removeprefix(f"users: {path} ").removeprefix("cannot be read: ")
        raise ConfigError(f"{field} cannot be read: {reason}") from error
    if "user_id" not in table.column_names:
        raise ConfigError(
            f"{field} has no column 'user_id'; it has: {', '.join(table.column_names)}."
        )
    return table["user_id"], origin.describe_row


def _read_lines(path: Path, field: str) -> list[str]:
    """Returns the lines of a text file but for blank ones and a header."""
    with pa.input_stream(str(path), compression="detect") as stream:
        content = stream.read()
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeError as error:
        raise ConfigError(f"{field} cannot be read: {error}. Save it as UTF-8.") from None
    # Tables of other tools have a header, lists by hand have none.
    if lines and lines[0].strip(' "') == "user_id":
        del lines[0]
    return [line for line in lines if line.strip()]


def format_items(items: Sequence[Recommendation], *, ranked: bool = True) -> str:
    """Returns a table of items with their display columns.

    Args:
        items: Items, the best first.
        ranked: Whether rank and score stand beside each item.
    """
    if not items:
        return "  (nothing)"
    # Stable: the other columns keep their order.
    columns = sorted(items[0].display, key=_rank_of_column)
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


def _rank_of_column(name: str) -> int:
    """Returns the place of a column of titles, or one behind them all."""
    if name.lower() in TITLES:
        return TITLES.index(name.lower())
    return len(TITLES)


def _cells(item: Recommendation, columns: Sequence[str]) -> list[str]:
    return [item.item_id, *(_text(item.display[name]) for name in columns)]


def format_user(retriever: Retriever, user: str, options: ListOptions) -> str:
    """Returns the latest items of a user above a table of recommendations."""
    recommended = retriever.recommend(user, **dataclasses.asdict(options))
    lines = []
    # Said above the list: it is the one for somebody new.
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
    # The first column is the id, which no row of a new user needs.
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
    # Before the towers, which tell neither flag nor row.
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


def write_lists(
    retriever: Retriever,
    users: Path,
    out: Path,
    options: ListOptions,
    accept: Collection[str] = (),
) -> str:
    """Writes the recommendations of many users as Parquet: user_id, rank, item_id, score.

    Args:
        retriever: Retriever that recommends.
        users: File of user ids, see `read_ids`.
        out: File to write, whole or not at all.
        options: Options of the lists.
        accept: Names of findings that are right for these users: "unmatched_users".

    Returns:
        A line that says what was written, and for how many unknown users.

    Raises:
        ConfigError: The file cannot be read, or most of its users are not known.
    """
    for finding in accept:
        choose({UNMATCHED: finding}, finding, "--accept")
    if out.is_dir():
        raise ConfigError(f"--out={out} is a folder; name a Parquet file.")
    # Both paths are checked before the long part.
    ids = read_ids(users, retriever.forms.user_id)
    unknown = [user for user in ids if not retriever.knows(user)]
    if len(unknown) > (1 - LEAST_KNOWN) * len(ids) and UNMATCHED not in accept:
        known = next(iter(retriever.user_rows.row_by_id), "")
        raise ConfigError(
            f"--users={users}: {len(unknown):,} of {len(ids):,} users are not known, such as "
            f"{echo(unknown[0])}; the bundle knows ids such as {echo(known)}. All of them "
            f"would get the list for somebody new. If they are new users: --accept={UNMATCHED}."
        )
    lists = retriever.recommend_many(ids, **dataclasses.asdict(options))
    # An earlier file stays whole until the new one is.
    with atomic(out) as temporary:
        pq.write_table(lists, temporary)
    return (
        f"{out}: {len(lists):,} rows, lists of {options.k} for {len(ids):,} users "
        f"({len(unknown):,} of them not known)."
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

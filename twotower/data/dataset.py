"""A log as every source yields it: three Arrow tables, and the truth of a generated shop."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import pyarrow as pa
from absl import logging

from twotower.core.arrow import join_chunks, pc
from twotower.core.codes import codes_and_values, distinct, encode_columns
from twotower.core.errors import ConfigError
from twotower.data.contract import KEYS, Contract
from twotower.data.matching import Match, match_ids


@dataclasses.dataclass(frozen=True)
class TruePreferences:
    """The preferences that a log was generated from.

    The preference of user u for item i is `user_factors[u] @ item_factors[i]`.

    Attributes:
        user_factors: float32 [U, T], rows aligned with `Dataset.users`.
        item_factors: float32 [I, T], rows aligned with `Dataset.items`.
    """

    user_factors: np.ndarray
    item_factors: np.ndarray


@dataclasses.dataclass(frozen=True)
class Dropped:
    """Rows of a table that were left out.

    Attributes:
        reason: End of a sentence that begins with "3 of 10 rows", such as "without user_id".
        rows: Number of rows that were left out.
        total: Number of rows before.
        locations: Files and lines of the first of them, where these are known.
    """

    reason: str
    rows: int
    total: int
    locations: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A log, and the attributes of its users and items.

    Attributes:
        interactions: The log in file order: user_id and item_id (string, or codes of strings; see
            `twotower.core.codes`), and if the source has them timestamp (int64 seconds since the
            epoch, UTC), event (string), weight, label (float32), split (string) and context
            columns.
        users: user_id (string, unique) and columns of users; holds every user of `interactions`.
        items: item_id (string, unique) and columns of items; holds every item of `interactions`.
        has_catalogue: Whether items came from a table of their own, so that all of them can be
            recommended.
        truth: The preferences behind the log, which a generated shop alone has.
        dropped: Rows that were left out so far, in the order in which they were.
        matches: Ids of the tables of users and items beside those of the log.
        warnings: Sentences on what was found odd so far, with what to do.
        notes: Sentences on what was done so far.
        log_items: Columns of the items in each row of the file of the log, where that describes the
            items; see `twotower.pipeline.log_items`.
        log_positions: Row of that file for each interaction, int64 [N]; -1 for those of others.
        contract: Forms in which the log writes ids, times and numbers.
    """

    interactions: pa.Table
    users: pa.Table
    items: pa.Table
    has_catalogue: bool
    truth: TruePreferences | None = None
    dropped: tuple[Dropped, ...] = ()
    matches: tuple[Match, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    log_items: pa.Table | None = None
    log_positions: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    contract: Contract = Contract()

    def keep_rows(self, mask: np.ndarray) -> Dataset:
        """Returns the dataset with the interactions that a mask, bool [N], marks."""
        # Empty where the log describes no items.
        positions = self.log_positions
        if self.log_items is not None:
            positions = positions[mask]
        return dataclasses.replace(
            self, interactions=self.interactions.filter(pa.array(mask)), log_positions=positions
        )

    def with_codes(self) -> Dataset:
        """Returns the dataset with the ids of the log as codes; see `twotower.core.codes`."""
        return dataclasses.replace(self, interactions=encode_columns(self.interactions, KEYS))


def assemble(
    interactions: pa.Table, users: pa.Table | None = None, items: pa.Table | None = None
) -> Dataset:
    """Makes a `Dataset` of raw tables.

    Rows without ids are dropped; the tables of users and items become unique and complete.

    Raises:
        ConfigError: No row has both ids.
    """
    # Before ids are dropped, for the message.
    num_rows = len(interactions)
    dropped: list[Dropped] = []
    for column in ("user_id", "item_id"):
        interactions = drop_missing(interactions, column, "", dropped)
    if not len(interactions):
        raise ConfigError(
            f"interactions: none of {num_rows} rows has both a user_id and an item_id; check "
            "config.data.interactions.columns, which maps them to columns of the file."
        )
    matches: list[Match] = []
    return Dataset(
        interactions=interactions,
        users=collect_entities(users, interactions["user_id"], "user", dropped, matches),
        items=collect_entities(items, interactions["item_id"], "item", dropped, matches),
        has_catalogue=items is not None,
        dropped=tuple(dropped),
        matches=tuple(matches),
    )


def drop_missing(table: pa.Table, column: str, name: str, dropped: list[Dropped]) -> pa.Table:
    """Returns a table without the rows that lack a column, which are noted.

    Args:
        table: Rows of a table.
        column: Name of the column.
        name: Name of the table; empty for the log.
        dropped: Notes of rows that were left out, to which one is added.
    """
    # Dropped and counted rather than refused: published logs do have rows without a user.
    missing = table[column].null_count
    if not missing:
        return table
    reason = f"without {column}"
    if name:
        reason = f"of {name} {reason}"
    dropped.append(Dropped(reason, missing, len(table)))
    return table.filter(pc.is_valid(table[column]))


def collapse(table: pa.Table, key: str) -> pa.Table:
    """Merges the rows of each value of `key`, in order of first appearance.

    Each column takes the first value of the merged rows that is not null.
    """
    codes, count = _codes(table[key])
    # Every key is unique already: no copy.
    if count == len(table):
        return table
    columns = {}
    # Column by column, since the first row of a key may lack values that a later one has.
    for name in table.column_names:
        rows = _first_valid(table[name], codes, count)
        columns[name] = table[name].take(rows)
    return pa.table(columns)


def _codes(values: pa.ChunkedArray) -> tuple[np.ndarray, int]:
    """Returns codes in order of first appearance, int32 [N], and their number."""
    # Keys have no null here, so there is no code for one.
    codes, distinct_values = codes_and_values(values)
    return codes, len(distinct_values)


def _first_valid(values: pa.ChunkedArray, codes: np.ndarray, count: int) -> pa.Array:
    """Returns for each code the first row whose value is not null, or null without one."""
    valid_rows = np.flatnonzero(pc.is_valid(values).to_numpy())
    first = np.full(count, -1, np.int64)
    # Backwards: of several rows with one code the last write is the first row.
    backwards = valid_rows[::-1]
    first[codes[backwards]] = backwards
    # `take` gives null for a null index.
    return pa.array(first, mask=first < 0)


def collect_entities(
    table: pa.Table | None,
    ids: pa.ChunkedArray,
    side: Literal["user", "item"],
    dropped: list[Dropped],
    matches: list[Match],
) -> pa.Table:
    """Returns the table of users or items, one row an id, with every id of the log.

    Args:
        table: Table as it was read; None makes one of the ids alone.
        ids: Ids of the log.
        side: Side that the table describes.
        dropped: Notes of rows that were left out, to which one may be added.
        matches: Notes of the ids that log and table share, to which one is added.
    """
    # Compared before the missing ids of the log are appended, or every id would match.
    key = f"{side}_id"
    ids_of_log = distinct(ids)
    if table is None:
        return pa.table({key: ids_of_log})
    rows = drop_missing(table, key, f"{side}_table", dropped)
    unique = collapse(rows, key)
    if len(unique) < len(rows):
        logging.info("%ss: %d rows of %d distinct ids", side, len(rows), len(unique))
    matches.append(match_ids(ids_of_log, join_chunks(unique[key]), side))
    # Nothing is known of these but the id; they are users and items all the same.
    is_known = pc.is_in(ids_of_log, value_set=unique[key])
    absent = ids_of_log.filter(pc.invert(is_known))
    if not len(absent):
        return unique
    # At the end, so that the rows of the table keep their numbers; other columns become null.
    return pa.concat_tables([unique, pa.table({key: absent})], promote_options="default")

"""What every source yields: three Arrow tables, and for the generated shop the truth behind
them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
from absl import logging

from twotower.core.arrow import pc
from twotower.core.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class TruePreferences:
    """The generator's own preferences; user u's preference for item i is `user_factors[u] @
    item_factors[i]`.

    Attributes:
        user_factors: float32 [U, T], rows aligned with `Dataset.users`.
        item_factors: float32 [I, T], rows aligned with `Dataset.items`.
    """

    user_factors: np.ndarray
    item_factors: np.ndarray


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A log and what is known of its users and items.

    Attributes:
        interactions: user_id and item_id (string), and where the source has them timestamp (int64
            seconds since the epoch, UTC), event (string), weight, label (float32), split (string)
            and context columns. File order.
        users: user_id (string, unique) and columns of users; holds every user of `interactions`.
        items: item_id (string, unique) and columns of items; holds every item of `interactions`.
        has_catalogue: items came from a table of their own, so that all of them can be recommended.
        truth: of the generated shop only.
    """

    interactions: pa.Table
    users: pa.Table
    items: pa.Table
    has_catalogue: bool
    truth: TruePreferences | None = None


def assemble(
    interactions: pa.Table, users: pa.Table | None = None, items: pa.Table | None = None
) -> Dataset:
    """A `Dataset` of tables as they were read: rows without ids dropped, entities unique and
    complete.

    Raises:
        ConfigError: no row has both ids.
    """
    rows = len(interactions)
    interactions = drop_missing(interactions, ("user_id", "item_id"), "interactions")
    if not len(interactions):
        raise ConfigError(
            f"interactions: none of {rows} rows has both a user_id and an item_id; check "
            f"config.data.interactions.columns, which says what they are called in the file."
        )
    return Dataset(
        interactions=interactions,
        users=_entities(users, interactions["user_id"], "user_id", "users"),
        items=_entities(items, interactions["item_id"], "item_id", "items"),
        has_catalogue=items is not None,
    )


def drop_missing(table: pa.Table, columns: tuple[str, ...], name: str) -> pa.Table:
    """`table` without the rows that lack one of `columns`; how many those were is logged."""
    for column in columns:
        missing = table[column].null_count
        if missing:
            logging.warning(
                "%s: dropped %d of %d rows without %s", name, missing, len(table), column
            )
            table = table.filter(pc.is_valid(table[column]))
    return table


def collapse(table: pa.Table, key: str) -> pa.Table:
    """One row a value of `key`, in the order of first appearance; each column takes its first
    non-null value."""
    codes, count = _codes(table[key])
    if count == len(table):
        return table
    return pa.table(
        {
            name: table[name].take(_first_valid(table[name], codes, count))
            for name in table.column_names
        }
    )


def _codes(values: pa.ChunkedArray) -> tuple[np.ndarray, int]:
    """int32 [N] codes in the order of first appearance, and how many there are."""
    encoded = pa.chunked_array([values.combine_chunks()]) if values.num_chunks != 1 else values
    dictionary = encoded.chunk(0).dictionary_encode()
    return dictionary.indices.to_numpy(zero_copy_only=False), len(dictionary.dictionary)


def _first_valid(values: pa.ChunkedArray, codes: np.ndarray, count: int) -> pa.Array:
    """Per code the first row whose value is not null, or null where no row has one."""
    rows = np.flatnonzero(pc.is_valid(values).to_numpy())[::-1]
    first = np.full(count, -1, np.int64)
    first[codes[rows]] = rows  # backwards: of several rows with one code the first is written last
    return pa.array(first, mask=first < 0)


def _entities(table: pa.Table | None, ids: pa.ChunkedArray, key: str, name: str) -> pa.Table:
    found = pc.unique(ids)
    if table is None:
        return pa.table({key: found})
    table = drop_missing(table, (key,), name)
    unique = collapse(table, key)
    if len(unique) < len(table):
        logging.info("%s: %d rows of %d distinct ids", name, len(table), len(unique))
    absent = found.filter(pc.invert(pc.is_in(found, value_set=unique[key])))
    if not len(absent):
        return unique
    logging.info("%s: %d ids of the log are not in the table", name, len(absent))
    return pa.concat_tables([unique, pa.table({key: absent})], promote_options="default")

"""The sources of a log: one dict of readers, each of which yields a `Dataset` of Arrow tables.

A source keeps the order of the rows, turns ids into strings and timestamps into seconds, and makes
the tables of users and items unique and complete. It filters nothing but rows without ids.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa

from twotower.config import DataConfig, TableConfig
from twotower.core.arrow import pc
from twotower.core.errors import ConfigError
from twotower.core.kinds import Kinds
from twotower.data.contract import apply_contract, similar_name_hint
from twotower.data.dataset import Dataset, assemble, collapse
from twotower.data.shop import generate as shop
from twotower.data.sources import bigquery, files, lists, tfds
from twotower.data.sources.frames import TableLike, read_table

# Columns that a log must have.
LOG_KEYS = ("user_id", "item_id")
# Name of a column with the number of each row, for as long as rows are dropped.
_POSITION = "\0position"


class Tables(NamedTuple):
    """The tables of a source of one's own, as they were read.

    Each is a frame of pandas or polars, an Arrow table, or the path of a file. Ids, times and
    numbers get their types here, as those of files do, and `config.data.interactions` may rename
    columns.

    Attributes:
        interactions: Log with user_id, item_id and further columns, such as timestamp.
        users: Table with user_id and attributes of users; None for their ids alone.
        items: Table with item_id and attributes of items, which is also the corpus; None for the
            items of the log.
    """

    interactions: TableLike
    users: TableLike | None = None
    items: TableLike | None = None


@runtime_checkable
class Source(Protocol):
    """A reader of the log that a configuration names.

    A module of `config.plugins` may add one to `SOURCES`; where it was registered with options, it
    is called with them as `options`.
    """

    def __call__(self, config: DataConfig) -> Dataset | Tables | TableLike: ...


@runtime_checkable
class LogReader(Protocol):
    """A reader of one table of interactions; `name` is its name in the configuration."""

    def __call__(self, config: TableConfig, name: str) -> pa.Table: ...


@runtime_checkable
class TableReader(Protocol):
    """A reader of any table; `keys` are the columns that it must have."""

    def __call__(self, config: TableConfig, name: str, *, keys: tuple[str, ...]) -> pa.Table: ...


def load_dataset(config: DataConfig) -> Dataset:
    """Reads the log that `config` names, with items grouped if it names an `item_group`.

    Raises:
        ConfigError: An unknown source, or a file, row or column that cannot be used; the message
            says which.
    """
    dataset = _read(config)
    if not config.item_group:
        return dataset
    return _group_items(dataset, config.item_group)


def _read(config: DataConfig) -> Dataset:
    # One of a user's own takes its options too, where it was registered with some.
    read: Callable[..., Dataset | Tables | TableLike] = SOURCES.choose(
        config.source, "config.data.source"
    )
    options = SOURCES.build_options(config.source, config.options, "config.data.options")
    _refuse_unread(config)
    if options is None:
        tables = read(config)
    else:
        tables = read(config, options=options)
    if isinstance(tables, Dataset):
        return tables
    # A lone table is the log.
    if not isinstance(tables, Tables):
        tables = Tables(tables)
    return _from_raw(tables, config)


def _refuse_unread(config: DataConfig) -> None:
    """Refuses tables that a source does not read, and whose rows nobody would miss."""
    if config.source not in ("shop", "tfds"):
        return
    paths = {"data.path": config.path}
    for name in ("interactions", "user_table", "item_table", "validation", "test"):
        table: TableConfig = getattr(config, name)
        paths[f"data.{name}.path"] = table.path
    for field, path in paths.items():
        if path:
            raise ConfigError(
                f"config.{field}={path!r} is not read by config.data.source={config.source!r}: set "
                "config.data.source='csv' (which reads Parquet and JSON too), or leave the path "
                "out."
            )


def _from_raw(tables: Tables, config: DataConfig) -> Dataset:
    """Returns the tables of a source of one's own, held to the contract of all tables."""

    def typed(rows: TableLike, table: TableConfig, name: str, keys: tuple[str, ...]) -> pa.Table:
        raw, origin = read_table(rows, table, name)
        return apply_contract(raw, table, name, keys=keys, origin=origin)

    users = None
    if tables.users is not None:
        users = typed(tables.users, config.user_table, "user_table", ("user_id",))
    items = None
    if tables.items is not None:
        items = typed(tables.items, config.item_table, "item_table", ("item_id",))
    return assemble(
        typed(tables.interactions, config.interactions, "interactions", LOG_KEYS), users, items
    )


def _csv(config: DataConfig) -> Dataset:
    # The kind is for files whose suffix does not tell; others are read by their suffix.
    read_table = functools.partial(files.read, kind="csv")
    return _from_tables(config, functools.partial(read_table, keys=LOG_KEYS), read_table)


def _parquet(config: DataConfig) -> Dataset:
    read_table = functools.partial(files.read, kind="parquet")
    return _from_tables(config, functools.partial(read_table, keys=LOG_KEYS), read_table)


def _bigquery(config: DataConfig) -> Dataset:
    # One client for all tables, so that credentials are looked up once.
    client = bigquery.make_client(config.project, config.location)
    read_table = functools.partial(bigquery.read, client=client)
    return _from_tables(config, functools.partial(read_table, keys=LOG_KEYS), read_table)


def _json(config: DataConfig) -> Dataset:
    read_table = functools.partial(files.read, kind="json")
    return _from_tables(config, functools.partial(read_table, keys=LOG_KEYS), read_table)


def _pairs(config: DataConfig) -> Dataset:
    return _from_tables(config, lists.read_pairs, functools.partial(files.read, kind="csv"))


def _user_lists(config: DataConfig) -> Dataset:
    return _from_tables(config, lists.read_user_lists, functools.partial(files.read, kind="csv"))


def _baskets(config: DataConfig) -> Dataset:
    return _from_tables(config, lists.read_baskets, functools.partial(files.read, kind="csv"))


def _matrix(config: DataConfig) -> Dataset:
    return _from_tables(config, lists.read_matrix, functools.partial(files.read, kind="csv"))


def _shop(config: DataConfig) -> Dataset:
    return shop.generate(config.num_interactions, seed=config.shop_seed, num_items=config.num_items)


def _tfds(config: DataConfig) -> Dataset:
    return assemble(*tfds.read(config.dataset, data_dir=config.data_dir))


# Open to modules of users, which is why `DataConfig.source` is text and no Literal.
SOURCES: Kinds[Source] = Kinds(
    "source",
    {
        "csv": _csv,
        "parquet": _parquet,
        "json": _json,
        "bigquery": _bigquery,
        "tfds": _tfds,
        "pairs": _pairs,
        "user_lists": _user_lists,
        "baskets": _baskets,
        "matrix": _matrix,
        "shop": _shop,
    },
    synonyms={
        "tsv": "csv",
        "text": "csv",
        "file": "csv",
        "arrow": "parquet",
        "pq": "parquet",
        "jsonl": "json",
        "ndjson": "json",
        "bq": "bigquery",
        "sql": "bigquery",
        "movielens": "tfds",
        "lists": "user_lists",
        "transactions": "baskets",
        "wide": "matrix",
        "generated": "shop",
        "synthetic": "shop",
    },
)


def _from_tables(config: DataConfig, read_log: LogReader, read_table: TableReader) -> Dataset:
    """Reads the log, followed by its held-out rows, and the tables of users and items."""
    path = config.path or config.interactions.path
    # `config.data.path` is a short form of `config.data.interactions.path`.
    interactions = read_log(dataclasses.replace(config.interactions, path=path), "interactions")
    num_rows = len(interactions)
    parts = []
    for name, table in (("validation", config.validation), ("test", config.test)):
        if _is_configured(table):
            parts.append(_with_split(read_log(table, name), name))
    if parts:
        parts.insert(0, _with_split(interactions, "train"))
        # A column that one part lacks is null in its rows.
        interactions = pa.concat_tables(parts, promote_options="permissive")
    # Without a table, `assemble` makes one of the ids in the log.
    users = None
    if _is_configured(config.user_table):
        users = read_table(config.user_table, "user_table", keys=("user_id",))
    items = None
    if _is_configured(config.item_table):
        items = read_table(config.item_table, "item_table", keys=("item_id",))
    if items is None or not takes_items_of_log(config) or len(items) != num_rows:
        return assemble(interactions, users, items)
    # The values of an item are taken from its rows once these are filtered and divided.
    numbers = np.full(len(interactions), -1)
    numbers[:num_rows] = np.arange(num_rows)
    numbered = interactions.append_column(_POSITION, pa.array(numbers))
    dataset = assemble(numbered, users)
    return dataclasses.replace(
        dataset,
        interactions=dataset.interactions.drop_columns([_POSITION]),
        log_items=items,
        log_positions=dataset.interactions[_POSITION].to_numpy(),
    )


def takes_items_of_log(config: DataConfig) -> bool:
    """Returns whether the training rows of the log describe the items."""
    # A group of items is made before the rows are divided.
    return describes_items(config) and config.item_rows == "train" and not config.item_group


def describes_items(config: DataConfig) -> bool:
    """Returns whether the table of items is the file of the log."""
    path = config.path or config.interactions.path
    is_file = config.source in ("csv", "parquet", "json")
    return is_file and bool(path) and config.item_table.path == path


def _with_split(rows: pa.Table, name: str) -> pa.Table:
    """Adds the column that a fixed split follows.

    Raises:
        ConfigError: The rows have such a column already, which says otherwise.
    """
    if "split" in rows.column_names:
        raise ConfigError(
            f"interactions: the {name} rows have a column 'split' of their own: leave out that "
            "column, or config.data.validation and config.data.test."
        )
    return rows.append_column("split", pa.repeat(name, len(rows)))


def _is_configured(table: TableConfig) -> bool:
    return bool(table.path or table.query or table.event_files)


def _group_items(dataset: Dataset, column: str) -> Dataset:
    """Returns the dataset with a column of the items as the item id, in the log too.

    All items of one group become one item.
    """
    items = dataset.items
    if column == "item_id":
        return dataset
    if column not in items.column_names:
        hint = similar_name_hint(column, items.column_names)
        raise ConfigError(f"config.data.item_group={column!r} is not a column of the items{hint}.")
    # An item without a group stays itself.
    group = pc.coalesce(items[column].cast(pa.string()), items["item_id"])
    # Never null: `items` holds every item of the log.
    row_of_item = pc.index_in(dataset.interactions["item_id"], value_set=items["item_id"])
    interactions = _set_column(dataset.interactions, "item_id", group.take(row_of_item))
    items = collapse(_set_column(items, "item_id", group), "item_id")
    # Without the truth, whose rows are single items.
    return dataclasses.replace(dataset, interactions=interactions, items=items, truth=None)


def _set_column(table: pa.Table, name: str, values: pa.ChunkedArray) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)

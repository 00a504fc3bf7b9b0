"""The sources of a log: one dict of readers, each of which yields a `Dataset` of Arrow tables.

A source keeps the order of the rows, turns ids into strings and timestamps into seconds, and makes
the tables of users and items unique and complete. It filters nothing but rows without ids.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa

from twotower.config import DataConfig, TableConfig
from twotower.core.arrow import pc
from twotower.core.codes import encode, encode_columns, positions
from twotower.core.errors import ConfigError
from twotower.core.ids import IdForm
from twotower.core.kinds import Kinds
from twotower.data.contract import KEYS, Contract, Uses
from twotower.data.dataset import Dataset, Dropped, assemble, collapse
from twotower.data.shop import generate as shop
from twotower.data.sources import bigquery, files, lists, tfds
from twotower.data.sources.frames import TableLike, read_table
from twotower.data.tables import (
    Origin,
    RawTable,
    keys_of,
    near_equal_ids,
    read_tables,
    read_uses,
    similar_name_hint,
)

# The tables of a source of one's own in `config.data`.
_TABLES = ("interactions", "user_table", "item_table")
# End of the note on rows that `bad_rows` = "skip" leaves out.
SKIPPED = "with other fields than the header"
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

    def __call__(self, config: DataConfig) -> Dataset | list[RawTable] | Tables | TableLike: ...


class Reader(Protocol):
    """A reader of a table as its source has it; `name` is its name in the configuration."""

    def __call__(self, config: TableConfig, name: str) -> tuple[pa.Table, Origin]: ...


def load_dataset(
    config: DataConfig, *, uses: Uses | None = None, contract: Contract | None = None
) -> Dataset:
    """Reads the log that `config` names, with items grouped if it names an `item_group`.

    Args:
        config: Options of the data.
        uses: Uses of columns by features and labels, which say how they are read.
        contract: Contract of a run whose log has grown; by default one is found.

    Raises:
        ConfigError: An unknown source, or a file, row or column that cannot be used; the message
            says which.
    """
    tables = _read(config)
    # A source that makes its log in memory has types already.
    if isinstance(tables, Dataset):
        dataset = tables
        if contract is None:
            contract = Contract.find([dataset.interactions])
        dataset = dataclasses.replace(dataset, contract=contract)
        if uses:
            dataset = with_uses(dataset, uses)
    else:
        log = [table for table in tables if table.keys == KEYS]
        others = [table for table in tables if table.keys != KEYS]
        dataset = _assemble(config, log, others, uses, contract)
    if not config.item_group:
        return dataset
    return _group_items(dataset, config.item_group)


def with_uses(dataset: Dataset, uses: Uses) -> Dataset:
    """Returns a log in memory with the columns that are used as numbers or times read as such.

    Raises:
        ConfigError: A value is not what its column is used for.
    """
    users, contract = read_uses(dataset.users, "user", uses, dataset.contract)
    items, contract = read_uses(dataset.items, "item", uses, contract)
    rows, contract = read_uses(dataset.interactions, "user", uses, contract)
    rows, contract = read_uses(rows, "log", uses, contract)
    return dataclasses.replace(
        dataset, interactions=rows, users=users, items=items, contract=contract
    )


def _read(config: DataConfig) -> Dataset | list[RawTable]:
    # One of a user's own takes its options too, where it was registered with some.
    read: Callable[..., Dataset | list[RawTable] | Tables | TableLike] = SOURCES.choose(
        config.source, "config.data.source"
    )
    options = SOURCES.build_options(config.source, config.options, "config.data.options")
    _refuse_unread(config)
    if options is None:
        tables = read(config)
    else:
        tables = read(config, options=options)
    if isinstance(tables, (Dataset, list)):
        return tables
    # A lone table is the log.
    if not isinstance(tables, Tables):
        tables = Tables(tables)
    raw = []
    for name, rows in zip(_TABLES, tables, strict=True):
        if rows is not None:
            raw.append(_raw_table(getattr(config, name), name, functools.partial(read_table, rows)))
    return raw


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


def _raw_table(config: TableConfig, name: str, read: Reader) -> RawTable:
    rows, origin = read(config, name)
    return RawTable(rows, config, name, origin)


def _assemble(
    config: DataConfig,
    log: list[RawTable],
    tables: list[RawTable],
    uses: Uses | None,
    contract: Contract | None,
) -> Dataset:
    """Returns the log of raw tables, held to the contract of all tables."""
    parts, typed, contract = read_tables(log, tables, uses, contract)
    by_name = {}
    for raw, table in zip(tables, typed, strict=True):
        by_name[raw.name] = _in_order(raw, table)
    parts = [_in_order(raw, part) for raw, part in zip(log, parts, strict=True)]
    interactions = parts[0]
    if len(parts) > 1:
        names = ["train", *(raw.name for raw in log[1:])]
        named = [with_split(part, name) for part, name in zip(parts, names, strict=True)]
        # A column that one part lacks is null in its rows.
        interactions = pa.concat_tables(named, promote_options="permissive")
    # Once for all that counts, matches and looks up ids later.
    interactions = _joined_times(encode_columns(interactions, KEYS))
    # Without a table, `assemble` makes one of the ids in the log.
    users = by_name.get("user_table")
    items = by_name.get("item_table")
    num_rows = len(parts[0])
    # Rows of the log and of the items are paired by their numbers, which gathered rows have lost.
    if items is None or not takes_items_of_log(config) or len(items) != num_rows:
        dataset = assemble(interactions, users, items)
    else:
        dataset = _with_items_of_log(interactions, num_rows, users, items)
    warnings = list(dataset.warnings)
    # Whole numbers without leading zeros differ as numbers do.
    if contract.user_id is IdForm.TEXT:
        warnings += near_equal_ids(dataset.users["user_id"], "user")
    if contract.item_id is IdForm.TEXT:
        warnings += near_equal_ids(dataset.items["item_id"], "item")
    dropped = (*skipped_rows([*log, *tables]), *dataset.dropped)
    return dataclasses.replace(
        dataset, contract=contract, warnings=tuple(warnings), dropped=dropped
    )


def skipped_rows(tables: Sequence[RawTable]) -> list[Dropped]:
    """Returns a note on each table of which rows were skipped when it was read."""
    notes = []
    for raw in tables:
        count = raw.origin.skipped
        if count:
            reason = SKIPPED
            if raw.keys != KEYS:
                reason = f"of {raw.name} {SKIPPED}"
            total = len(raw.rows) + count
            notes.append(Dropped(reason, count, total, raw.origin.skipped_locations))
    return notes


def _joined_times(rows: pa.Table) -> pa.Table:
    """Returns rows whose times are one chunk, of which all arrays of times are views."""
    if "timestamp" not in rows.column_names:
        return rows
    times = pa.chunked_array([rows["timestamp"].combine_chunks()])
    return _set_column(rows, "timestamp", times)


def _with_items_of_log(
    interactions: pa.Table, num_rows: int, users: pa.Table | None, items: pa.Table
) -> Dataset:
    """Returns a log whose own rows describe its items.

    The values of an item are taken from its rows once these are filtered and divided.

    Args:
        interactions: Rows of all parts.
        num_rows: Number of those of the log itself, which come first.
        users: Table of the users; None for none.
        items: Columns of the item in each row of the log.
    """
    # Rows of a fixed split's other files describe no item.
    numbers = np.full(len(interactions), -1)
    numbers[:num_rows] = np.arange(num_rows)
    # A column of numbers stays with its row where rows without ids are dropped.
    dataset = assemble(interactions.append_column(_POSITION, pa.array(numbers)), users)
    return dataclasses.replace(
        dataset,
        interactions=dataset.interactions.drop_columns([_POSITION]),
        log_items=items,
        log_positions=dataset.interactions[_POSITION].to_numpy(),
    )


def _csv(config: DataConfig) -> list[RawTable]:
    # The kind is for files whose suffix does not tell; others are read by their suffix.
    return _from_tables(config, functools.partial(files.read, kind="csv"))


def _parquet(config: DataConfig) -> list[RawTable]:
    return _from_tables(config, functools.partial(files.read, kind="parquet"))


def _bigquery(config: DataConfig) -> list[RawTable]:
    # One client for all tables, so that credentials are looked up once.
    client = bigquery.make_client(config.project, config.location)
    return _from_tables(config, functools.partial(bigquery.read_raw, client=client))


def _json(config: DataConfig) -> list[RawTable]:
    return _from_tables(config, functools.partial(files.read, kind="json"))


def _pairs(config: DataConfig) -> list[RawTable]:
    return _from_lines(config, lists.read_pairs)


def _user_lists(config: DataConfig) -> list[RawTable]:
    return _from_lines(config, lists.read_user_lists)


def _baskets(config: DataConfig) -> list[RawTable]:
    return _from_lines(config, lists.read_baskets)


def _matrix(config: DataConfig) -> list[RawTable]:
    return _from_lines(config, lists.read_matrix)


def _from_lines(config: DataConfig, read_log: Reader) -> list[RawTable]:
    """Reads a log of lines of another form than a table, and tables of users and items."""
    return _from_tables(config, functools.partial(files.read, kind="csv"), read_log)


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


def _from_tables(
    config: DataConfig,
    read_table: Reader,
    read_log: Reader | None = None,
) -> list[RawTable]:
    """Reads the log, its held-out rows, and the tables of users and items.

    Args:
        config: Options of the data.
        read_table: Reader of tables.
        read_log: Reader of a log of another form, whose columns have our names; None for a table.
    """
    path = config.path or config.interactions.path
    # `config.data.path` is a short form of `config.data.interactions.path`.
    options = {"interactions": dataclasses.replace(config.interactions, path=path)}
    for name in ("validation", "test", "user_table", "item_table"):
        table: TableConfig = getattr(config, name)
        if table.path or table.query or table.event_files:
            options[name] = table
    tables = []
    for name, table in options.items():
        read = read_table
        # Held-out rows have the form of the log; users and items are tables all the same.
        if read_log is not None and keys_of(name) == KEYS:
            read = read_log
            # Their columns have our names.
            table = dataclasses.replace(table, columns={})
        tables.append(_raw_table(table, name, read))
    return tables


def takes_items_of_log(config: DataConfig) -> bool:
    """Returns whether the training rows of the log describe the items."""
    # A group of items is made before the rows are divided.
    return describes_items(config) and config.item_rows == "train" and not config.item_group


def describes_items(config: DataConfig) -> bool:
    """Returns whether the table of items is the file of the log."""
    path = config.path or config.interactions.path
    # Lines of lists hold ids alone, and BigQuery reads queries.
    is_file = config.source in ("csv", "parquet", "json")
    return is_file and bool(path) and config.item_table.path == path


def _in_order(raw: RawTable, table: pa.Table) -> pa.Table:
    """Returns rows in the order of their source, or sorted where it has none."""
    if raw.origin.is_ordered:
        return table
    return bigquery.sort_rows(table, raw.keys)


def with_split(rows: pa.Table, name: str) -> pa.Table:
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


def _group_items(dataset: Dataset, column: str) -> Dataset:
    """Returns the dataset with a column of the items as the item id, in the log too.

    All items of one group become one item.
    """
    items = dataset.items
    if column == "item_id":
        return dataset
    group = groups_of_items(items, column)
    # Never null: `items` holds every item of the log.
    row_of_item = pa.array(positions(dataset.interactions["item_id"], items["item_id"]))
    grouped = encode(group.take(row_of_item))
    interactions = _set_column(dataset.interactions, "item_id", grouped)
    items = merge_groups(items, group)
    # Without the truth, whose rows are single items.
    return dataclasses.replace(dataset, interactions=interactions, items=items, truth=None)


def groups_of_items(items: pa.Table, column: str) -> pa.ChunkedArray:
    """Returns the id of the group of each item, text.

    Args:
        items: Table of the items.
        column: Its column that names the groups.

    Raises:
        ConfigError: There is no such column.
    """
    if column not in items.column_names:
        hint = similar_name_hint(column, items.column_names)
        raise ConfigError(f"config.data.item_group={column!r} is not a column of the items{hint}.")
    # An item without a group stays itself.
    return pc.coalesce(items[column].cast(pa.string()), items["item_id"])


def merge_groups(items: pa.Table, groups: pa.ChunkedArray) -> pa.Table:
    """Returns the table of groups, in order of first appearance.

    Args:
        items: Table of the items.
        groups: Id of the group of each.
    """
    return collapse(_set_column(items, "item_id", groups), "item_id")


def _set_column(table: pa.Table, name: str, values: pa.ChunkedArray) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, values)

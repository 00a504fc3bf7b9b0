"""Where a log comes from: one dict of readers, each of which yields a `Dataset` of Arrow tables.

A reader keeps the order of the rows, turns ids into strings and timestamps into seconds, and makes
the tables of users and items unique and complete. It filters nothing but rows without ids.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import pyarrow as pa

from twotower.config import DataConfig, TableConfig
from twotower.core.arrow import pc
from twotower.core.errors import ConfigError, choose
from twotower.data.dataset import Dataset, assemble, collapse
from twotower.data.shop import generate as synthetic
from twotower.data.sources import bigquery, lists, tfds
from twotower.data.sources import files as tables

__all__ = ["SOURCES", "Dataset", "load"]


def load(config: DataConfig) -> Dataset:
    """Reads what `config` names; `config.item_group` then takes the place of the item id.

    Raises:
        ConfigError: an unknown source, or a file, row or column that cannot be used; the message
            says which.
    """
    dataset = choose(SOURCES, config.source, "config.data.source")(config)
    return _grouped(dataset, config.item_group) if config.item_group else dataset


def _csv(config: DataConfig) -> Dataset:
    return _from_tables(
        config, functools.partial(tables.read, keys=("user_id", "item_id"), kind="csv")
    )


def _parquet(config: DataConfig) -> Dataset:
    return _from_tables(
        config, functools.partial(tables.read, keys=("user_id", "item_id"), kind="parquet")
    )


def _bigquery(config: DataConfig) -> Dataset:
    client = bigquery.make_client(config.project, config.location)
    read = functools.partial(bigquery.read, client=client)
    return _from_tables(
        config, functools.partial(read, keys=("user_id", "item_id")), read_known=read
    )


def _pairs(config: DataConfig) -> Dataset:
    return _from_tables(config, lists.read_pairs)


def _user_lists(config: DataConfig) -> Dataset:
    return _from_tables(config, lists.read_user_lists)


def _shop(config: DataConfig) -> Dataset:
    return synthetic.generate(
        config.num_interactions, seed=config.shop_seed, num_items=config.num_items
    )


def _tfds(config: DataConfig) -> Dataset:
    return assemble(*tfds.read(config.dataset, data_dir=config.data_dir))


SOURCES: dict[str, Callable[[DataConfig], Dataset]] = {
    "csv": _csv,
    "parquet": _parquet,
    "bigquery": _bigquery,
    "tfds": _tfds,
    "pairs": _pairs,
    "user_lists": _user_lists,
    "shop": _shop,
}


def _from_tables(
    config: DataConfig,
    read: Callable[[TableConfig, str], pa.Table],
    *,
    read_known: Callable[..., pa.Table] | None = None,
) -> Dataset:
    """The log by `read`, with the rows of `config.test` after it; users and items by `read_known`,
    or from files."""
    interactions = read(
        dataclasses.replace(config.interactions, path=config.path or config.interactions.path),
        "interactions",
    )
    if _is_given(config.test):
        parts = [("train", interactions), ("test", read(config.test, "test"))]
        marked = [part.append_column("split", pa.repeat(name, len(part))) for name, part in parts]
        interactions = pa.concat_tables(marked, promote_options="permissive")
    kind = "parquet" if config.source == "parquet" else "csv"
    read_known = read_known or functools.partial(tables.read, kind=kind)
    known = {
        name: read_known(table, name, keys=(key,)) if _is_given(table) else None
        for name, table, key in (
            ("user_table", config.user_table, "user_id"),
            ("item_table", config.item_table, "item_id"),
        )
    }
    return assemble(interactions, known["user_table"], known["item_table"])


def _is_given(table: TableConfig) -> bool:
    return bool(table.path or table.query)


def _grouped(dataset: Dataset, column: str) -> Dataset:
    """`column` of the items becomes the item id, in the log too; items of one group become one
    row."""
    items = dataset.items
    if column == "item_id":
        return dataset
    if column not in items.column_names:
        near = tables.nearest(column, items.column_names)
        raise ConfigError(f"config.data.item_group={column!r} is not a column of the items{near}.")
    group = pc.coalesce(
        items[column].cast(pa.string()), items["item_id"]
    )  # an item without a group stays itself
    rows = pc.index_in(dataset.interactions["item_id"], value_set=items["item_id"])
    at = dataset.interactions.column_names.index("item_id")
    interactions = dataset.interactions.set_column(at, "item_id", group.take(rows))
    items = collapse(
        items.set_column(items.column_names.index("item_id"), "item_id", group), "item_id"
    )
    return Dataset(interactions, dataset.users, items, dataset.has_catalogue)
